rule fit_compensation:
    """Fit the linear compensation of each block on the calibration images."""
    input:
        **detector_input("calibration"),
        warmup="results/{model}/{quantization}/warmup.pth",
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
        **step_resources("fit_compensation"),
    params:
        **detector_params("fit_compensation"),
        settings=from_wildcards(SETTINGS.entry, "compensation", section="compensation"),
    script:
        "../../scripts/fit_compensation.py"
