"""What `snakemake --logger qwt` shows of a run."""

import io
import logging
import re
import sys
from pathlib import Path

import pytest
from snakemake.logging import LogEvent
from snakemake.settings.types import OutputSettings
from snakemake_logger_plugin_qwt import LogHandler, check_config_files
from snakemake_logger_plugin_qwt.time_left import TimeLeft, earlier_seconds, in_words

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def in_a_folder_without_benchmarks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def log(*messages: tuple[int, str | None, dict], dryrun: bool = False) -> None:
    """Hand records with level, text and further fields to a handler, and end it."""
    handler = LogHandler(OutputSettings(dryrun=dryrun, stdout=dryrun), None)
    for level, text, fields in messages:
        record = logging.LogRecord("snakemake", level, "", 0, text, (), None)
        record.__dict__.update(fields)
        handler.handle(record)
    handler.close()


def plan(**counts):
    stats = counts | {"total": sum(counts.values())}
    return logging.INFO, "job count", {"event": LogEvent.RUN_INFO, "stats": stats}


def began(job: int, rule: str, *wildcards: str, at: float):
    named = dict(enumerate(wildcards))
    fields = {"jobid": job, "rule_name": rule, "wildcards": named, "created": at}
    return logging.INFO, "", {"event": LogEvent.JOB_INFO, **fields}


def ended(job: int, *, at: float):
    return logging.INFO, "", {"event": LogEvent.JOB_FINISHED, "job_id": job, "created": at}


def failed(job: int, rule: str, *, at: float):
    fields = {"jobid": job, "rule_name": rule, "log": [f"logs/{rule}.log"], "created": at}
    return logging.ERROR, "Error in rule", {"event": LogEvent.JOB_ERROR, **fields}


LOCKED = (logging.ERROR, "the folder is locked", {"event": LogEvent.ERROR})
BUILDING = (logging.INFO, "Building DAG of jobs...", {})
NOTHING = (logging.INFO, "Nothing to be done (all requested files are present).", {})
TWO = [
    plan(fit=2, all=1),
    began(1, "fit", "demo", "w4a4", at=0),
    began(2, "fit", "demo", "w" * 99, at=0),
    ended(1, at=31.4),
    ended(2, at=150),
    began(0, "all", at=150),
    ended(0, at=150),
]
FAILING = [
    plan(fit=1),
    began(1, "fit", "demo", at=0),
    (logging.ERROR, "RuleException:\nCalledProcessError in file a.smk", {"event": LogEvent.ERROR}),
    failed(1, "fit", at=12),
    (logging.ERROR, "Exiting because a job execution failed. Look below", {}),
    (logging.ERROR, "WorkflowError:\nAt least one job did not complete", {"event": LogEvent.ERROR}),
]


@pytest.mark.parametrize(
    ("messages", "dryrun", "shown"),
    [
        ([BUILDING, (logging.INFO, "Unlocked working directory.", {})], False, "Unlocked working directory.\n"),
        ([BUILDING, NOTHING], False, f"{NOTHING[1]}\n"),
        ([plan(fit=1), (logging.INFO, "Select jobs to execute...", {})], False, ""),
        ([plan(fit=1), (logging.WARNING, "the clock is wrong", {})], False, "the clock is wrong\n"),
        ([LOCKED], False, "the folder is locked\n"),
        ([plan(fit=1), began(1, "fit", at=0), plan(fit=1)], True, "job count\n"),
        (FAILING, False, "[failed] fit demo (12 s)\n  log: logs/fit.log\n"),
    ],
)  # fmt: skip
def test_what_is_told_is_what_concerns_the_user(capsys, messages, dryrun, shown):
    log(*messages, dryrun=dryrun)
    captured = capsys.readouterr()
    assert (captured.out if dryrun else captured.err) == shown


def test_a_run_with_nothing_to_do_tells_the_results_of_the_earlier_one(capsys):
    Path("results").mkdir()
    Path("results/report.html").touch()
    log(BUILDING, NOTHING)
    assert capsys.readouterr().out == "\nReport: results/report.html\n"
    log(BUILDING, NOTHING, dryrun=True)
    assert "Report" not in capsys.readouterr().out


def test_a_file_gets_one_line_of_80_columns_for_each_finished_step(capsys):
    log(*TWO)
    first, second, last = capsys.readouterr().err.splitlines()
    assert first == "[1 of 2] fit demo w4a4 (31 s)"
    assert re.fullmatch(r"\[2 of 2\] fit demo w+…w+ \(2 min\)", second)
    assert len(second) == 80
    assert last == "Finished after 2 min"


def test_a_file_tells_the_time_left_where_it_is_known(capsys):
    log(
        plan(fit=3),
        began(1, "fit", at=0),
        ended(1, at=60),
        began(2, "fit", at=60),
        ended(2, at=120),
    )
    assert [line.partition(", ")[2] for line in capsys.readouterr().err.splitlines()] == [
        "about 2 min left",
        "about 60 s left",
    ]


def test_a_terminal_draws_one_line_again_and_keeps_none_of_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    log(*TWO)
    screen = terminal.getvalue()
    assert re.search(r"━{16}\S* 0 of 2: fit demo w4a4, fit demo www", screen)
    pieces = re.split(r"[\r\n]+", re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", screen))
    assert max(map(len, pieces)) <= 80
    kept = re.sub(r"[^\n]*(\r\x1b\[2K|\n\r\x1b\[1A\x1b\[2K)", "", screen.replace("\x1b[?25h", ""))
    assert re.findall(r"^\[.*\)$", kept, re.MULTILINE) == [
        "[1 of 2] fit demo w4a4 (31 s)",
        f"[2 of 2] fit demo {'w' * 22}…{'w' * 31} (2 min)",
    ]
    assert "━" not in kept


def test_an_error_of_the_bar_does_not_silence_what_follows(capsys, monkeypatch):
    monkeypatch.setattr(LogHandler, "_begin", lambda *_: 1 / 0)
    log(plan(fit=1), began(1, "fit", at=0), LOCKED)
    assert "ZeroDivisionError" in (said := capsys.readouterr().err)
    assert said.endswith("the folder is locked\n")


def test_the_time_left_is_that_of_the_jobs_that_remain_over_those_at_once():
    time = TimeLeft({"fit": 5, "draw": 1}, {"draw": 30.0})
    assert time.seconds(0) is None
    time.begin(1, "fit", 0)
    time.begin(2, "fit", 0)
    assert time.seconds(5) is None, "of 6 jobs, one is known"
    time.finish(1, 10)
    time.finish(2, 10)
    assert time.seconds(10) == pytest.approx((3 * 10 + 30) / 2)  # two at once so far
    time.begin(3, "draw", 10)
    assert time.seconds(14) == pytest.approx((3 * 10 + 26) / (24 / 14))
    time.stop(3)
    assert time.seconds(20) == pytest.approx(30)


def test_a_rule_without_a_finished_job_is_like_those_of_its_verb():
    time = TimeLeft({"fit_a": 1, "fit_b": 2}, {})
    time.begin(1, "fit_a", 0)
    time.finish(1, 10)
    assert time.seconds(10) == pytest.approx(20)


def test_earlier_runs_tell_the_seconds_of_each_rule(tmp_path):
    folder = tmp_path / "benchmarks" / "fit" / "demo"
    folder.mkdir(parents=True)
    for name, text in {
        "a": "s\th:m:s\n2.0\t0:00:02\n",
        "b": "s\n4\n",
        "c": "",
        "d": "s\n-\n",
    }.items():
        (folder / f"{name}.tsv").write_text(text)
    assert earlier_seconds(tmp_path / "benchmarks") == {"fit": 3.0}
    assert earlier_seconds(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (99.4, "99 s"), (100, "2 min"), (7800, "2 h 10 min")]
)
def test_durations_are_rounded(seconds, words):
    assert in_words(seconds) == words


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
