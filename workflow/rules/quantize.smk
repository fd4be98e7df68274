WARMUP = "results/{model}/{quantization}/warmup.pth"


rule quantize_model:
    """Calibrate a detector's quantizers, or take the warmup file that the config supplies."""
    input:
        **detector_input("calibration"),
        recipe=from_wildcards(SETTINGS.recipe, "model", "quantization"),
    output:
        warmup=WARMUP if config["keep_warmup"] else temp(WARMUP),
        summary="results/{model}/{quantization}/warmup.json",
    log:
        "logs/quantize_model/{model}/{quantization}.log",
    benchmark:
        "benchmarks/quantize_model/{model}/{quantization}.tsv"
    conda:
        "../../envs/qwt.yaml"
    threads: detector_threads
    resources:
        **step_resources("quantize_model"),
    params:
        **detector_params("quantize_model"),
        settings=from_wildcards(SETTINGS.plain, "quantization"),
        supplied=from_wildcards(SETTINGS.supplied_warmup, "model", "quantization"),
    script:
        "../../scripts/quantize_model.py"
