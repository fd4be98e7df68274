"""Which layers hurt: `snakemake sensitivity`, beside what `rule all` makes."""


rule rank_layers:
    """Quantize each layer alone; rank them and suggest a mixed precision."""
    input:
        checkpoint="results/{model}/checkpoint.pth",
        annotations=images("calibration"),
        config_files=local_config,
        warmup="results/{model}/{quantization}/warmup.pth",
    output:
        table="results/{model}/{quantization}/sensitivity.csv",
        suggestion="results/{model}/{quantization}/sensitivity.yaml",
    log:
        "logs/rank_layers/{model}/{quantization}.log",
    benchmark:
        "benchmarks/rank_layers/{model}/{quantization}.tsv"
    conda:
        "../../envs/qwt.yaml"
    threads: detector_threads
    resources:
        gpu=detector_gpu,
    params:
        config=model_setting("config"),
        config_options=model_setting("config_options"),
        settings=config["sensitivity"],
        code=source_hash("rank_layers"),
    script:
        "../../scripts/rank_layers.py"


rule sensitivity:
    """The ranking and the suggestion for every model and quantization of the config."""
    input:
        [
            f"{os.path.dirname(path)}/sensitivity.{suffix}"
            for path in row_files("warmup")
            for suffix in ("csv", "yaml")
        ],
