rule summarize_results:
    """Put all results into one table, with intervals from the paired bootstrap."""
    input:
        metrics=PLAN.result_files("metrics.json"),
        predictions=PLAN.result_files("predictions.json"),
        exports=PLAN.exported_files(),
        annotations=PLAN.row_files("annotations"),
        warmups=PLAN.row_files("warmup", ".json"),
        recipes=PLAN.row_files("recipe"),
        compensations=PLAN.result_files("compensation.json", kinds=["compensated"]),
    output:
        **({"exports": EXPORTS_TABLE} if PLAN.exports else {}),
        tradeoffs=list(PLAN.tradeoffs.values()),
        table=report(
            TABLE,
            caption="../report/summary.rst",
            category="Results",
            labels={"result": "table of all numbers"},
        ),
        document=report(
            DOCUMENT,
            caption="../report/summary_json.rst",
            category="Results",
            labels={"result": "all numbers, with classes and layers, for programs"},
        ),
    log:
        "logs/summarize_results.log",
    benchmark:
        "benchmarks/summarize_results.tsv"
    conda:
        "../../envs/qwt.yaml"
    threads: summary_threads
    resources:
        mem_mb=table_mb,
    params:
        rows=plain(PLAN.rows),
        exports=plain(PLAN.export_rows),
        resamples=config["bootstrap"]["resamples"],
        seed=config["seed"],
        failed=plain(PLAN.stopped.failed),
        tradeoffs=PLAN.tradeoffs,
        code=source_hash("summarize_results"),
    script:
        "../../scripts/summarize_results.py"


rule render_report:
    """Render the report: one HTML file without external parts."""
    input:
        document=DOCUMENT,
        metrics=PLAN.result_files("metrics.json"),
        predictions=PLAN.result_files("predictions.json"),
        annotations=PLAN.annotation_files(),
        blocks=PLAN.result_files("blocks.csv", kinds=["compensated"]),
    output:
        report=report(
            REPORT,
            caption="../report/report.rst",
            category="Results",
            labels={"result": "report"},
        ),
    log:
        "logs/render_report.log",
    benchmark:
        "benchmarks/render_report.tsv"
    conda:
        "../../envs/qwt.yaml"
    resources:
        mem_mb=report_mb,
    params:
        rows=plain(PLAN.rows),
        code=source_hash("render_report"),
    script:
        "../../scripts/render_report.py"
