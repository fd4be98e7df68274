"""Write a detector, in full precision or quantized, as an ONNX file with its description."""

from qwt_mmdet.runtime import step

with step(snakemake) as job:
    from qwt_mmdet.steps.export import export
    from qwt_mmdet.steps.inputs import Inputs

    export(
        Inputs.of(snakemake, job, "calibration"),
        output=snakemake.output.graph,
        warmup=snakemake.input.get("warmup"),
        compensation=snakemake.input.get("compensation"),
        metrics=snakemake.input.get("metrics"),
        graphs=snakemake.params.graphs,
        **snakemake.params.settings,
    )
