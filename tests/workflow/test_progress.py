"""What a run shows with the workflow's default profile."""

import re

import pytest
from running import ROOT, Workflow
from snakemake_logger_plugin_qwt import TARGETS

TINY = str(ROOT / "tests" / "configs" / "demo_tiny.yaml")
PROFILE = re.compile(r"Using workflow specific profile .*\n")


def shown(workflow: Workflow, *arguments: str, code: int = 0) -> str:
    """What Snakemake says with the default profile, but for its line about the profile."""
    done = workflow.run_with_profile("--configfile", TINY, *arguments)
    assert done.returncode == code, done.stdout
    said, profiles = PROFILE.subn("", done.stdout)
    assert profiles == 1
    return said


def test_a_dry_run_counts_the_jobs_of_each_rule(workflow: Workflow):
    said = shown(workflow, "--dry-run")
    assert re.search(r"^evaluate_baseline +1$", said, re.MULTILINE)
    assert "Reasons" not in said


def test_a_run_shows_a_line_for_each_step_and_why_one_failed(workflow: Workflow):
    part = "results/datasets/shapes/calibration.json"
    said = shown(workflow, "--cores", "1", part)
    assert re.findall(r"^\[\d.*(?= \()", said, re.MULTILINE) == [
        "[1 of 2] prepare_dataset shapes calibration",
        "[2 of 2] select_images shapes calibration",
    ]
    assert "[select_images shapes calibration] shapes.calibration: 1 of 10 classes" in said
    assert re.search(r"^Finished after \d+ s$", said, re.MULTILINE)
    assert len(said.splitlines()) <= 6
    assert "Nothing to be done" in shown(workflow, "--cores", "1", part)

    wrong = [
        "results/demo/checkpoint.pth",
        "--config",
        f"models={{demo: {{sha256: '{'0' * 64}'}}}}",
    ]
    said = shown(workflow, "--cores", "1", *wrong, code=1)
    assert said.count("[fetch_checkpoint demo] ") == 1
    assert "[failed] fetch_checkpoint demo (" in said
    assert "  log: logs/fetch_checkpoint/demo.log\n" in said
    assert "Exception" not in said
    assert "Exiting" not in said


@pytest.mark.parametrize("words", [["--unlock"], ["--lint"], ["--summary"], ["--dag"]])
def test_other_commands_say_what_they_do(workflow: Workflow, words):
    assert shown(workflow, *words).strip()


def test_the_logger_knows_which_rules_are_no_steps(workflow: Workflow):
    rules = (
        path.read_text() for path in [ROOT / "Snakefile", *(ROOT / "workflow" / "rules").iterdir()]
    )
    named = [
        part for text in rules for part in re.findall(r"^rule (\w+):\n((?: .*\n|\n)*)", text, re.M)
    ]
    assert {name for name, body in named if "output:" not in body} == set(TARGETS)
