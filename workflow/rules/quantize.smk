rule quantize_model:
    """Calibrate a detector's quantizers, or take the warmup file that the config supplies."""
    input:
        checkpoint="results/{model}/checkpoint.pth",
        annotations=images("calibration"),
        config_files=local_config,
        supplied=supplied_warmup,
    output:
        warmup=kept("results/{model}/{quantization}/warmup.pth", config["keep_warmup"]),
        summary="results/{model}/{quantization}/warmup.json",
    log:
        "logs/quantize_model/{model}/{quantization}.log",
    benchmark:
        "benchmarks/quantize_model/{model}/{quantization}.tsv"
    conda:
        "../../envs/qwt.yaml"
    threads: detector_threads
    resources:
        gpu=detector_gpu,
    params:
        config=model_setting("config"),
        config_options=model_setting("config_options"),
        settings=entry("quantization", "quantization"),
        seed=config["seed"],
        code=source_hash("quantize_model"),
    script:
        "../../scripts/quantize_model.py"
