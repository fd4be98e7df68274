"""Sensitivity of layers: `snakemake sensitivity`, which is not part of `rule all`."""


rule rank_layers:
    """Quantize each layer alone, and rank the layers by the error at the heads."""
    input:
        **detector_input("calibration"),
        warmup="results/{model}/{quantization}/warmup.pth",
    output:
        table="results/{model}/{quantization}/sensitivity.csv",
    log:
        "logs/rank_layers/{model}/{quantization}.log",
    benchmark:
        "benchmarks/rank_layers/{model}/{quantization}.tsv"
    conda:
        "../../envs/qwt.yaml"
    threads: detector_threads
    resources:
        **step_resources("rank_layers"),
    params:
        **detector_params("rank_layers"),
        settings=config["sensitivity"],
    script:
        "../../scripts/rank_layers.py"


rule sensitivity:
    """The ranking for every model and quantization of the config."""
    input:
        [
            f"{os.path.dirname(path)}/sensitivity.csv"
            for path in PLAN.row_files("warmup")
        ],
