# Where jobs are sent to a cluster, these stay on the machine that has a network.
localrules:
    fetch_checkpoint,
    prepare_dataset,
    select_images,


rule fetch_checkpoint:
    """Copy or download a model's weights, verify them, and keep the weights alone."""
    input:
        checkpoint=local_checkpoint,
    output:
        checkpoint="results/{model}/checkpoint.pth",
    log:
        "logs/fetch_checkpoint/{model}.log",
    benchmark:
        "benchmarks/fetch_checkpoint/{model}.tsv"
    conda:
        "../../envs/qwt.yaml"
    params:
        source=model_setting("checkpoint"),
        sha256=lambda wildcards: config["models"][wildcards.model].get("sha256"),
        code=source_hash("fetch_checkpoint"),
    script:
        "../../scripts/fetch_checkpoint.py"


rule prepare_dataset:
    """Generate a dataset, fetch its annotations, or check the local folder that holds it."""
    input:
        annotations=local_annotations,
    output:
        source="results/datasets/{dataset}/source.json",
    log:
        "logs/prepare_dataset/{dataset}.log",
    benchmark:
        "benchmarks/prepare_dataset/{dataset}.tsv"
    conda:
        "../../envs/qwt.yaml"
    params:
        settings=dataset_source,
        code=source_hash("prepare_dataset"),
    script:
        "../../scripts/prepare_dataset.py"


rule select_images:
    """Choose calibration and evaluation images, which never overlap, and fetch them if remote."""
    input:
        source="results/datasets/{dataset}/source.json",
    output:
        calibration="results/datasets/{dataset}/calibration.json",
        evaluation="results/datasets/{dataset}/evaluation.json",
    log:
        "logs/select_images/{dataset}.log",
    benchmark:
        "benchmarks/select_images/{dataset}.tsv"
    conda:
        "../../envs/qwt.yaml"
    params:
        settings=entry("datasets", "dataset"),
        code=source_hash("select_images"),
    script:
        "../../scripts/select_images.py"
