"""After a failed run: a note of the failed jobs, and a summary of the finished results."""

import atexit
import subprocess

# absolute, since Snakemake returns to its first folder at exit
WRITTEN = [
    os.path.abspath(name) for name in ("results", "logs", "benchmarks", ".snakemake")
]


def begin():
    """Check that files can be written, and remove the note of the failures of an earlier run."""
    if said := unusable(WRITTEN):
        sys.exit(said)
    atexit.register(tell_unusable)
    Path(UNFINISHED).unlink(missing_ok=True)


def tell_unusable():
    """Report a folder that cannot be written; Snakemake itself ends with a traceback."""
    if said := unusable(WRITTEN):
        print(said, file=sys.stderr)


def summarize_finished():
    """Note the failures of this run, and run the last two rules on the finished results.

    They run in a new Snakemake process, so that they get the environments that the user chose. The failed and
    pending jobs come from Snakemake's scheduler and DAG: a killed job leaves no message, and an existing file may
    be outdated.
    """
    end_progress()
    atexit.unregister(tell_unusable)
    entries = workflow.scheduler.failed
    failed = [job for one in entries for job in (one if one.is_group() else [one])]
    if not failed:  # the user stopped it
        return
    pending = [str(path) for job in workflow.dag.needrun_jobs() for path in job.output]
    failures = []
    for job in sorted(failed, key=str):
        wildcards, log = dict(job.wildcards_dict), str(job.log[0])
        step = " ".join([job.rule.name, *wildcards.values()])
        folders = [os.path.dirname(path) for path in (*job.output, log, job.benchmark)]
        said = last_error(log, since=STARTED, folders=[*folders, *WRITTEN])
        failures.append(Failure(step, wildcards, log, said))
    given = Path(".snakemake") / "given_config.yaml"
    try:
        Stopped(failures, pending).write(UNFINISHED)
        write_json(given, GIVEN_CONFIG)
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
        command += ["--workflow-profile", "none"]
        command += ["--configfile", given, "--cores", str(all_cores(None))]
        command += ["--allowed-rules", "summarize_results", "render_report"]
        command += ["--nolock", "--notemp", "--no-hooks", "--quiet", "all"]
        command += ["--sdm", *methods] if methods else []
        if subprocess.run(command, env={**os.environ, SUMMARIZING: "1"}).returncode:
            print("No summary of the finished results; see the message above.")
    print(f"\n{run_summary()}")
