rule fit_compensation:
    """Fit the linear compensation of each block on the calibration images."""
    input:
        checkpoint="results/{model}/checkpoint.pth",
        warmup="results/{model}/{quantization}/warmup.pth",
        annotations=images("calibration"),
        config_files=local_config,
    output:
        compensation="results/{model}/{quantization}/{compensation}/compensation.pth",
        summary="results/{model}/{quantization}/{compensation}/compensation.json",
        blocks=report(
            "results/{model}/{quantization}/{compensation}/blocks.csv",
            caption="../report/blocks.rst",
            category="Compensation per block",
            labels={
                "model": "{model}",
                "quantization": "{quantization}",
                "compensation": "{compensation}",
            },
        ),
    log:
        "logs/fit_compensation/{model}/{quantization}/{compensation}.log",
    benchmark:
        "benchmarks/fit_compensation/{model}/{quantization}/{compensation}.tsv"
    conda:
        "../../envs/qwt.yaml"
    threads: detector_threads
    resources:
        gpu=detector_gpu,
    params:
        config=model_setting("config"),
        config_options=model_setting("config_options"),
        settings=entry("compensation", "compensation"),
        seed=config["seed"],
        code=source_hash("fit_compensation"),
    script:
        "../../scripts/fit_compensation.py"
