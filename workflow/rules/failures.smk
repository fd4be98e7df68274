"""What a run that failed leaves: a note of what failed, and a summary of what is finished."""

import atexit
import subprocess

# absolute, as Snakemake is back in its first folder at the exit
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
    """Say which folder cannot be written to, if one cannot: Snakemake ends with a traceback then."""
    if said := unusable(WRITTEN):
        print(said, file=sys.stderr)


def summarize_finished():
    """Note what failed in this run and why; let a run of the last two rules summarize what is finished.

    A run of its own, as both want the environments that the user chose. Only Snakemake's scheduler and DAG know
    which jobs failed and which are left: a job that was killed leaves no word, and a file of an earlier run may
    be one that has to be made again.
    """
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
        command += ["--configfile", given, "--cores", str(all_cores(None))]
        command += ["--allowed-rules", "summarize_results", "render_report"]
        command += ["--nolock", "--notemp", "--no-hooks", "--quiet", "all"]
        command += ["--sdm", *methods] if methods else []
        if subprocess.run(command, env={**os.environ, SUMMARIZING: "1"}).returncode:
            print("What is finished could not be summarized; the message stands above.")
    print(f"\n{run_summary()}")
