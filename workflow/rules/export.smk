"""Export of detectors as ONNX files, and their evaluation and latency in runtimes, by the config's `export`."""

# notes the modules of a runtime of the user's own
RUNTIME_FILES = noted("results/{model}/{variant}/{runtime}/files.json")


rule export_model:
    """Write a detector, in full precision or quantized, as an ONNX file with its description."""
    input:
        unpack(from_wildcards(SETTINGS.exported, "model", "variant")),
        **detector_input("calibration"),
    output:
        graph="results/{model}/{variant}/model.onnx",
        description="results/{model}/{variant}/model.json",
    log:
        "logs/export_model/{model}/{variant}.log",
    benchmark:
        "benchmarks/export_model/{model}/{variant}.tsv"
    conda:
        "../../envs/qwt.yaml"
    resources:
        **step_resources("export_model", gpu=0),
    params:
        **detector_params("export_model"),
        settings=from_wildcards(SETTINGS.export, "model", "variant"),
        # notes the graphs of second-stage heads, whose number is unknown before
        graphs=noted("results/{model}/{variant}/graphs.json"),
    script:
        "../../scripts/export_model.py"


rule evaluate_exported:
    """Evaluate an exported detector in a runtime."""
    input:
        **detector_input("evaluation"),
        graph="results/{model}/{variant}/model.onnx",
        description="results/{model}/{variant}/model.json",
    output:
        metrics="results/{model}/{variant}/{runtime}/metrics.json",
        predictions="results/{model}/{variant}/{runtime}/predictions.json",
    log:
        "logs/evaluate_exported/{model}/{variant}/{runtime}.log",
    benchmark:
        "benchmarks/evaluate_exported/{model}/{variant}/{runtime}.tsv"
    conda:
        "../../envs/qwt.yaml"
    resources:
        **step_resources("evaluate_exported", gpu=runtime_gpu),
    params:
        **{**detector_params("evaluate_exported"), "read": RUNTIME_FILES},
    script:
        "../../scripts/evaluate_exported.py"


rule benchmark_exported:
    """Measure the latency of an exported detector and of the same model's file in full precision."""
    input:
        graph="results/{model}/{variant}/model.onnx",
        description="results/{model}/{variant}/model.json",
        full_precision="results/{model}/baseline/model.onnx",
        full_precision_description="results/{model}/baseline/model.json",
    output:
        benchmark="results/{model}/{variant}/{runtime}/benchmark.json",
    log:
        "logs/benchmark_exported/{model}/{variant}/{runtime}.log",
    benchmark:
        "benchmarks/benchmark_exported/{model}/{variant}/{runtime}.tsv"
    conda:
        "../../envs/qwt.yaml"
    # the runtime uses one core; the others stay idle, so that no other job disturbs it
    threads: all_cores
    resources:
        gpu=runtime_gpu,
        mem_mb=step_resources("benchmark_exported")["mem_mb"],
        runtime=step_resources("benchmark_exported")["runtime"],
    params:
        read=RUNTIME_FILES,
        code=source_hash("benchmark_exported"),
    script:
        "../../scripts/benchmark_exported.py"
