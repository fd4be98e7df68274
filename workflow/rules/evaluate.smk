# A param, since kernels add in another order for another batch size. Snakemake compares params without their names,
# hence the mapping.
BATCHES = {"batch_size": config["evaluation"]["batch_size"]}

SHARDS = from_wildcards(
    SETTINGS.shards, "model", "quantization", "compensation", jobs=detector_jobs()
)


rule evaluate_baseline:
    """Evaluate the full-precision detector."""
    input:
        **detector_input("evaluation"),
        shards=SHARDS,
    output:
        metrics="results/{model}/baseline/metrics.json",
        predictions="results/{model}/baseline/predictions.json",
    log:
        "logs/evaluate_baseline/{model}.log",
    benchmark:
        "benchmarks/evaluate_baseline/{model}.tsv"
    # runs first, so that classes that do not fit are reported before anything is quantized
    priority: 1
    conda:
        "../../envs/qwt.yaml"
    threads: detector_threads
    resources:
        **step_resources("evaluate_baseline"),
    params:
        **detector_params("evaluate_baseline"),
        loading=BATCHES,
    script:
        "../../scripts/evaluate_detector.py"


use rule evaluate_baseline as evaluate_quantized with:
    """Evaluate the quantized detector."""
    input:
        **detector_input("evaluation"),
        shards=SHARDS,
        warmup="results/{model}/{quantization}/warmup.pth",
    output:
        metrics="results/{model}/{quantization}/quantized/metrics.json",
        predictions="results/{model}/{quantization}/quantized/predictions.json",
    log:
        "logs/evaluate_quantized/{model}/{quantization}.log",
    benchmark:
        "benchmarks/evaluate_quantized/{model}/{quantization}.tsv"
    priority: 0
    resources:
        **step_resources("evaluate_quantized"),
    params:
        **detector_params("evaluate_quantized"),
        loading=BATCHES,


use rule evaluate_quantized as evaluate_compensated with:
    """Evaluate the quantized detector with its compensation."""
    input:
        **detector_input("evaluation"),
        shards=SHARDS,
        warmup="results/{model}/{quantization}/warmup.pth",
        compensation="results/{model}/{quantization}/{compensation}/compensation.pth",
    output:
        metrics="results/{model}/{quantization}/{compensation}/metrics.json",
        predictions="results/{model}/{quantization}/{compensation}/predictions.json",
    log:
        "logs/evaluate_compensated/{model}/{quantization}/{compensation}.log",
    benchmark:
        "benchmarks/evaluate_compensated/{model}/{quantization}/{compensation}.tsv"
    resources:
        **step_resources("evaluate_compensated"),
    params:
        **detector_params("evaluate_compensated"),
        loading=BATCHES,


rule evaluate_shard:
    """Run a detector on some of the evaluation images."""
    input:
        unpack(from_wildcards(SETTINGS.parts, "model", "evaluated")),
        **detector_input("evaluation"),
    output:
        predictions=temp("results/{model}/{evaluated}/shards/{shard}-of-{shards}.json"),
    log:
        "logs/evaluate_shard/{model}/{evaluated}/{shard}-of-{shards}.log",
    benchmark:
        "benchmarks/evaluate_shard/{model}/{evaluated}/{shard}-of-{shards}.tsv"
    conda:
        "../../envs/qwt.yaml"
    threads: detector_threads
    resources:
        **step_resources("evaluate_compensated"),
    params:
        **detector_params("evaluate_shard"),
        loading=BATCHES,
    script:
        "../../scripts/evaluate_shard.py"
