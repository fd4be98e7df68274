"""The demo's own training; `rule all` uses the checkpoint in workflow/demo/ instead."""


rule train_demo:
    """Train the demo's detector from random weights: `snakemake train_demo`; about an hour on two cores."""
    input:
        config="workflow/demo/mask-rcnn_swin-xxs-p4-w8_fpn_shapes.py",
    output:
        checkpoint="results/train_demo/mask-rcnn_swin-xxs-p4-w8_fpn_shapes.pth",
        metrics="results/train_demo/mask-rcnn_swin-xxs-p4-w8_fpn_shapes.json",
    log:
        "logs/train_demo.log",
    benchmark:
        "benchmarks/train_demo.tsv"
    conda:
        "../../envs/qwt.yaml"
    threads: 2
    resources:
        **step_resources("train_demo"),
    params:
        images=6000,
        labelling_epochs=2,
        seed=1,
        work_dir="results/train_demo/work",
        code=source_hash("train_demo"),
    script:
        "../../scripts/train_demo.py"
