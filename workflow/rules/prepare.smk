# On a cluster, these run on the machine of Snakemake, which has a network.
localrules:
    fetch_checkpoint,
    prepare_dataset,
    select_images,


rule fetch_checkpoint:
    """Copy or download a model's checkpoint, verify it, and keep its weights alone."""
    output:
        checkpoint="results/{model}/checkpoint.pth",
    log:
        "logs/fetch_checkpoint/{model}.log",
    benchmark:
        "benchmarks/fetch_checkpoint/{model}.tsv"
    conda:
        "../../envs/qwt.yaml"
    params:
        source=from_wildcards(
            SETTINGS.entry, "model", section="models", key="checkpoint"
        ),
        state=from_wildcards(SETTINGS.local_checkpoint, "model"),
        sha256=from_wildcards(SETTINGS.entry, "model", section="models", key="sha256"),
        code=source_hash("fetch_checkpoint"),
    script:
        "../../scripts/fetch_checkpoint.py"


rule prepare_dataset:
    """Generate a part of a dataset, fetch its annotations, or check the local folder that holds it."""
    output:
        source="results/datasets/{dataset}/{part}_source.json",
    log:
        "logs/prepare_dataset/{dataset}/{part}.log",
    benchmark:
        "benchmarks/prepare_dataset/{dataset}/{part}.tsv"
    conda:
        "../../envs/qwt.yaml"
    params:
        settings=from_wildcards(SETTINGS.part, "dataset", "part", chosen=False),
        state=from_wildcards(SETTINGS.local_annotations, "dataset", "part"),
        read=noted("results/datasets/{dataset}/source_files.json"),
        code=source_hash("prepare_dataset"),
    script:
        "../../scripts/prepare_dataset.py"


FILES_NOTE = "results/datasets/{dataset}/{part}_files.json"


rule select_images:
    """Choose the images of a part, none of which the other part has, and fetch remote ones."""
    input:
        source=from_wildcards(SETTINGS.source_file, "dataset", "part"),
    output:
        annotations="results/datasets/{dataset}/{part}.json",
    log:
        "logs/select_images/{dataset}/{part}.log",
    benchmark:
        "benchmarks/select_images/{dataset}/{part}.tsv"
    conda:
        "../../envs/qwt.yaml"
    params:
        settings=from_wildcards(SETTINGS.part, "dataset", "part", chosen=True),
        # not an output: Snakemake would delete it before the job compares it
        files=FILES_NOTE,
        images=lambda wildcards: changed_files(FILES_NOTE.format(**wildcards)),
        read=noted("results/datasets/{dataset}/source_files.json"),
        code=source_hash("select_images"),
    script:
        "../../scripts/select_images.py"
