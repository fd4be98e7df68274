rule summarize_results:
    """Put all results into one table, with intervals from the paired bootstrap."""
    input:
        metrics=result_files("metrics.json"),
        predictions=result_files("predictions.json"),
        exports=export_files(),
        annotations=row_files("annotations"),
        warmups=warmup_summaries(),
        recipes=row_files("recipe"),
        compensations=result_files("compensation.json", variants=["compensated"]),
    output:
        **({"exports": "results/exports.csv"} if EXPORTS else {}),
        table=report(
            "results/summary.csv",
            caption="../report/summary.rst",
            category="Results",
            labels={"result": "table of all numbers"},
        ),
        document=report(
            "results/summary.json",
            caption="../report/summary_json.rst",
            category="Results",
            labels={"result": "all numbers, with classes and layers, for machines"},
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
        rows=RESULT_ROWS,
        exports=EXPORT_ROWS,
        resamples=config["bootstrap"]["resamples"],
        seed=config["seed"],
        failed=STOPPED["failed"],
        code=source_hash("summarize_results"),
    script:
        "../../scripts/summarize_results.py"


rule render_report:
    """Render the report that people read: one HTML file without external parts."""
    input:
        document="results/summary.json",
        metrics=result_files("metrics.json"),
        predictions=result_files("predictions.json"),
        annotations=annotation_files(),
        blocks=result_files("blocks.csv", variants=["compensated"]),
    output:
        report=report(
            "results/report.html",
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
        rows=RESULT_ROWS,
        code=source_hash("render_report"),
    script:
        "../../scripts/render_report.py"
