# Kernels add up in another order for another number of images. Snakemake compares params without
# their names, hence the mapping.
BATCHES = {"batch_size": config["evaluation"]["batch_size"]}


rule evaluate_baseline:
    """Evaluate the full-precision detector."""
    input:
        checkpoint="results/{model}/checkpoint.pth",
        annotations=images("evaluation"),
        config_files=local_config,
    output:
        metrics="results/{model}/baseline/metrics.json",
        predictions="results/{model}/baseline/predictions.json",
    log:
        "logs/evaluate_baseline/{model}.log",
    benchmark:
        "benchmarks/evaluate_baseline/{model}.tsv"
    # first, since classes that do not fit show here before anything is quantized
    priority: 1
    conda:
        "../../envs/qwt.yaml"
    threads: detector_threads
    resources:
        gpu=detector_gpu,
    params:
        config=model_setting("config"),
        config_options=model_setting("config_options"),
        seed=config["seed"],
        loading=BATCHES,
        code=source_hash("evaluate_baseline"),
    script:
        "../../scripts/evaluate_baseline.py"


rule evaluate_quantized:
    """Evaluate the quantized detector."""
    input:
        checkpoint="results/{model}/checkpoint.pth",
        warmup="results/{model}/{quantization}/warmup.pth",
        annotations=images("evaluation"),
        config_files=local_config,
    output:
        metrics="results/{model}/{quantization}/quantized/metrics.json",
        predictions="results/{model}/{quantization}/quantized/predictions.json",
    log:
        "logs/evaluate_quantized/{model}/{quantization}.log",
    benchmark:
        "benchmarks/evaluate_quantized/{model}/{quantization}.tsv"
    conda:
        "../../envs/qwt.yaml"
    threads: detector_threads
    resources:
        gpu=detector_gpu,
    params:
        config=model_setting("config"),
        config_options=model_setting("config_options"),
        seed=config["seed"],
        loading=BATCHES,
        code=source_hash("evaluate_quantized"),
    script:
        "../../scripts/evaluate_quantized.py"


rule evaluate_compensated:
    """Evaluate the quantized detector with its compensation."""
    input:
        checkpoint="results/{model}/checkpoint.pth",
        warmup="results/{model}/{quantization}/warmup.pth",
        compensation="results/{model}/{quantization}/{compensation}/compensation.pth",
        annotations=images("evaluation"),
        config_files=local_config,
    output:
        metrics="results/{model}/{quantization}/{compensation}/metrics.json",
        predictions="results/{model}/{quantization}/{compensation}/predictions.json",
    log:
        "logs/evaluate_compensated/{model}/{quantization}/{compensation}.log",
    benchmark:
        "benchmarks/evaluate_compensated/{model}/{quantization}/{compensation}.tsv"
    conda:
        "../../envs/qwt.yaml"
    threads: detector_threads
    resources:
        gpu=detector_gpu,
    params:
        config=model_setting("config"),
        config_options=model_setting("config_options"),
        seed=config["seed"],
        loading=BATCHES,
        code=source_hash("evaluate_compensated"),
    script:
        "../../scripts/evaluate_compensated.py"
