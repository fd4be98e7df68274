"""What a run that failed leaves: a note of what failed, and a summary of what is finished."""

import json
import subprocess


def forget_failures():
    """Remove the note of the failures of an earlier run."""
    try:
        Path(UNFINISHED).unlink(missing_ok=True)
    except OSError as error:
        sys.exit(explain(error))


def summarize_finished():
    """Note what failed in this run and why; let a run of the last two rules summarize what is finished.

    A run of its own, as both want the environments that the user chose. Only Snakemake's scheduler and DAG know
    which jobs failed and which are left: a job that was killed leaves no word, and a file of an earlier run may
    be one that has to be made again.
    """
    entries = workflow.scheduler.failed
    failed = [job for one in entries for job in (one if one.is_group() else [one])]
    if not failed:  # the user stopped it
        return
    pending = [str(path) for job in workflow.dag.needrun_jobs() for path in job.output]
    failures = []
    for job in sorted(failed, key=str):
        wildcards, log = dict(job.wildcards_dict), str(job.log[0])
        step = " ".join([job.rule.name, *wildcards.values()])
        failures.append(Failure(step, wildcards, log, last_error(log, since=STARTED)))
    given = Path(".snakemake") / "given_config.yaml"
    try:
        Stopped(failures, pending).write(UNFINISHED)
        given.write_text(json.dumps(GIVEN_CONFIG), encoding="utf-8")
    except OSError as error:
        print(f"\nThe results cannot be summarized. {explain(error)}")
        return
    if TABLE in pending and "summarize_results" not in [
        job.rule.name for job in failed
    ]:
        chosen = workflow.deployment_settings.deployment_method
        methods = [method.item_to_choice() for method in chosen]
        command = [sys.executable, "-m", "snakemake", TABLE, REPORT]
        command += ["--snakefile", f"{workflow.basedir}/Snakefile"]
        command += ["--configfile", given, "--cores", str(all_cores(None))]
        command += ["--allowed-rules", "summarize_results", "render_report"]
        command += ["--nolock", "--notemp", "--no-hooks", "--quiet", "all"]
        command += ["--sdm", *methods] if methods else []
        if subprocess.run(command, env={**os.environ, SUMMARIZING: "1"}).returncode:
            print("What is finished could not be summarized; the message stands above.")
    print(f"\n{run_summary()}")
