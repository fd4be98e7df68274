"""What `snakemake --logger qwt` shows of a run."""

import logging
import sys
from pathlib import Path

import pytest
from snakemake.logging import LogEvent
from snakemake.settings.types import OutputSettings
from snakemake_logger_plugin_qwt import LogHandler, check_config_files

ROOT = Path(__file__).parents[2]


@pytest.fixture
def said(capsys):
    """Log messages with level, text and event; what was shown then."""

    def log(*messages: tuple[int, str | None, dict], dryrun: bool = False) -> str:
        handler = LogHandler(OutputSettings(dryrun=dryrun), None)
        for level, text, event in messages:
            record = logging.LogRecord("snakemake", level, "", 0, text, (), None)
            record.__dict__.update(event)
            handler.emit(record)
        handler.close()
        return capsys.readouterr().err

    return log


LOCKED = (logging.ERROR, "the folder is locked", {"event": LogEvent.ERROR})
FAILED = (logging.ERROR, "Error in rule all", {"event": LogEvent.JOB_ERROR})
PLAN = (logging.INFO, "job count", {"event": LogEvent.RUN_INFO})
BUILDING = (logging.INFO, "Building DAG of jobs...", {})


@pytest.mark.parametrize(
    ("messages", "dryrun", "shown"),
    [
        ([(logging.INFO, None, {"event": LogEvent.PROGRESS, "done": 2, "total": 7})], False, "2 of 7 steps\n"),
        ([BUILDING], False, ""),
        ([LOCKED], False, "the folder is locked\n"),
        ([FAILED, (logging.ERROR, "Exiting because a job execution failed.", {})], False, ""),
        ([PLAN], False, ""),
        ([PLAN, PLAN], True, "job count\n"),
        ([(logging.ERROR, "the folder is locked", {})], True, "the folder is locked\n"),
    ],
)  # fmt: skip
def test_what_is_told_is_what_concerns_the_user(said, messages, dryrun, shown):
    assert said(*messages, dryrun=dryrun) == shown


def test_a_dry_run_without_jobs_says_so(said):
    assert said(BUILDING, dryrun=True).endswith("up to date.\n")


BOMB = "a0: &a0 {k: 1, l: 1}\n" + "".join(
    f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("&a\nmodels: *a\n", "look for an alias"),
        ("x: " + "[" * 3000, "nested too deeply"),
        (BOMB, "bring more than 20000 values"),
        (None, "does not exist; check the path"),
        ("x: 2001-13-45", "on line 1 looks like YAML's timestamp"),
    ],
    ids=["recursive", "deep", "merges", "missing", "date"],
)
def test_what_snakemake_cannot_read_of_a_command_line_is_told(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my.yaml"
    if text is not None:
        path.write_text(text)
    arguments = ["-n", "--snakefile", str(ROOT / "Snakefile"), "--config", "seed=1"]
    check_config_files(arguments)
    check_config_files(["--configfile", str(path)])  # of another workflow
    with pytest.raises(SystemExit, match=rf"^Error in the configuration \({path}\):\n.*{message}"):
        check_config_files([*arguments, "--configfile", str(path)])
