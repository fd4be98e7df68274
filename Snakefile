from snakemake.utils import min_version

min_version("9.27.1")  # that is tested


include: "workflow/rules/common.smk"


# jobs on other machines get it, too
envvars:
    JOBS,


include: "workflow/rules/prepare.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/search.smk"
include: "workflow/rules/quantize.smk"
include: "workflow/rules/compensate.smk"
include: "workflow/rules/export.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/sensitivity.smk"
include: "workflow/rules/demo.smk"
include: "workflow/rules/failures.smk"


rule all:
    """Everything that the config asks for, with one table and one report of it."""
    default_target: True
    input:
        PLAN.results(),


onstart:
    begin()


onsuccess:
    end_progress()
    atexit.unregister(tell_unusable)
    print(f"\n{run_summary()}")


onerror:
    summarize_finished()
