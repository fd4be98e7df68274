"""What scripts do around their library call: log, explain, choose the device."""

import logging
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from qwt_mmdet import runtime
from qwt_mmdet.archives import save_archive
from qwt_mmdet.data.annotations import read_annotations
from qwt_mmdet.errors import QwtError
from qwt_mmdet.files import read_json, write_atomically

FILE_SIZES = resource.getrlimit(resource.RLIMIT_FSIZE)


def job(tmp_path, *, gpu=None, seed=0, threads=1):
    resources = {} if gpu is None else {"gpu": gpu}
    return SimpleNamespace(
        rule="quantize_model",
        wildcards=["demo", "w4a4"],
        log=[str(tmp_path / "logs" / "job.log")],
        params={"seed": seed},
        resources=resources,
        threads=threads,
        config={
            "device": "auto",
            "evaluation": {"workers": 4, "batch_size": 5},
            "calibration": {"workers": 0, "batch_size": 5},
        },
    )


def log_of(snakemake) -> str:
    with open(snakemake.log[0]) as stream:
        return stream.read()


def test_the_log_of_a_failed_step_ends_with_the_sentence_and_the_traceback(tmp_path, capsys):
    snakemake = job(tmp_path)
    with pytest.raises(SystemExit) as caught, runtime.step(snakemake):
        raise QwtError("The checkpoint x.pth is truncated; fetch it again.")
    assert caught.value.code == 1
    text = log_of(snakemake)
    assert text.index("x.pth is truncated") < text.index("Traceback")
    assert text.rstrip().endswith("QwtError: The checkpoint x.pth is truncated; fetch it again.")
    terminal = capsys.readouterr().err
    assert "[quantize_model demo w4a4] The checkpoint x.pth is truncated" in terminal
    assert "Traceback" not in terminal


def test_a_bug_is_not_presented_as_the_users_mistake(tmp_path, capsys):
    snakemake = job(tmp_path)
    with pytest.raises(SystemExit), runtime.step(snakemake):
        _ = {}["missing"]
    assert "Unexpected KeyError" in capsys.readouterr().err
    assert "Traceback" in log_of(snakemake)


@pytest.mark.parametrize(
    ("error", "rule", "hint"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "evaluate_quantized",
            "evaluation.batch_size",
        ),
        (RuntimeError("CUDA error: CUDA out of memory"), "evaluate_baseline", "gpu=0"),
        (torch.OutOfMemoryError("CUDA out of memory."), "fit_compensation", ".device_gb"),
        (torch.OutOfMemoryError("CUDA out of memory."), "quantize_model", "end what else uses it"),
        (torch.OutOfMemoryError("CUDA out of memory."), "choose_recipe", ".device_gb"),
        (MemoryError(), "", "--cores"),
        (MemoryError(), "fit_compensation", "activation_cache.memory_gb"),
        (MemoryError(), "quantize_model", "activation_cache.memory_gb"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "", "memory"),
        (OSError(12, "Cannot allocate memory"), "", "memory"),
        (OSError(28, "No space left on device", "results/x.pth"), "", "/results is full"),
        (OSError(28, "No space left on device"), "", tempfile.gettempdir()),
        (OSError(122, "Disk quota exceeded", "results/x.pth"), "", "/results is full"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"), "", "is full"),
        (OSError(27, "File too large", "results/x.pth"), "", "ulimit -f"),
        (
            OSError(5, "Input/output error", "results/x.pth"),
            "",
            "/results cannot be read or written",
        ),
        (OSError(116, "Stale file handle", "results/x.pth"), "", "mounted anew"),
        (OSError(24, "Too many open files"), "", "ulimit -n"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), "", "TMPDIR"),
        (
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 6 vs 5"),
            "",
            "is full",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"),
            "evaluate_shard",
            "lower batch_size and workers of evaluation",
        ),
        (
            RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. "),
            "",
            "was killed, most likely because memory ran out; lower calibration.workers",
        ),
        (
            RuntimeError(
                "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible"
            ),
            "",
            "/dev/shm",
        ),
        (
            RuntimeError("DataLoader worker (pid 12) is killed by signal: Segmentation fault. "),
            "",
            "stopped (Segmentation fault)",
        ),
        (
            PermissionError(13, "Permission denied", "results/x.pth"),
            "",
            "results/x.pth cannot be used",
        ),
        (OSError(30, "Read-only file system", "results/x.pth"), "", "mount it for writing"),
    ],
)
def test_running_out_of_something_names_the_remedy(error, rule, hint):
    text = runtime.explain(error, rule)
    assert ("batch_size" in text) == rule.startswith("evaluate")
    assert hint in text
    assert "Unexpected" not in text


def test_a_full_disk_names_the_folder_of_the_file_that_was_written(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, write_atomically(tmp_path / "x.pth"):
        Path("/dev/full").write_bytes(b"x")
    assert f"{tmp_path} is full" in runtime.explain(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved_for_want_of_room_is_no_bug_of_ours(tmp_path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, FILE_SIZES[1]))
    try:
        with pytest.raises(RuntimeError, match="enforce fail") as caught:
            save_archive({"weights": torch.zeros(10_000)}, tmp_path / "x.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, FILE_SIZES)
    assert f"{tmp_path} got larger than it may be" in runtime.explain(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_however_often_the_writer_fails(tmp_path):
    """torch.save ends in one more error for the archive and one for the stream."""

    def write(path):
        try:
            Path("/dev/full").write_bytes(b"x")
        finally:
            try:
                raise RuntimeError("unexpected pos 6 vs 5")
            finally:
                raise OSError(28, "No space left on device", str(path))

    target = tmp_path / "x.pth"
    with pytest.raises(OSError, match="No space") as caught, write_atomically(target) as partial:
        write(partial)
    assert f"{tmp_path} is full" in runtime.explain(caught.value)


def test_a_folder_in_which_no_file_can_be_written_is_named(tmp_path, monkeypatch):
    assert runtime.unusable([tmp_path, tmp_path / "none" / "deep"]) is None
    assert "/sys cannot be used" in runtime.unusable([tmp_path, "/sys/none"])
    full = Mock(side_effect=OSError(28, "No space left on device"))
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert f"quota of {tmp_path} is full" in runtime.unusable([tmp_path])


def test_a_log_that_cannot_be_written_is_told_once_and_costs_no_result(tmp_path, capsys):
    snakemake = job(tmp_path)
    log = Path(snakemake.log[0])
    log.parent.mkdir()
    log.symlink_to("/dev/full")
    with runtime.step(snakemake):
        for message in ("one", "two"):
            logging.getLogger("qwt_mmdet").warning(message)
    shown = capsys.readouterr().err.splitlines()
    assert [line.partition("] ")[2] for line in shown] == [
        f"The log of this step ends here. The disk or the quota of {log.parent} is full; free some space and run "
        "again.",
        "one",
        "two",
    ]
    snakemake.log = ["/sys/none/job.log"]
    with pytest.raises(SystemExit, match="/sys/none cannot be used"), runtime.step(snakemake):
        pass


def test_a_folder_that_cannot_be_written_names_the_file(tmp_path, monkeypatch):
    refused = PermissionError(13, "Permission denied", ".x.json.abc.json")
    monkeypatch.setattr(tempfile, "mkstemp", Mock(side_effect=refused))
    with pytest.raises(PermissionError) as caught, write_atomically(tmp_path / "x.json"):
        pass
    assert f"{tmp_path / 'x.json'} cannot be used" in runtime.explain(caught.value)


def test_the_machines_fault_is_told_whatever_was_raised_because_of_it():
    full = QwtError("The file x.pth cannot be read; get it again.")
    full.__cause__ = OSError(28, "No space left on device", "/data/x.pth")
    assert "The disk or the quota of /data is full" in runtime.explain(full)
    rights = QwtError("The file x.pth cannot be read.")
    rights.__cause__ = PermissionError(13, "Permission denied", "/data/x.pth")
    assert runtime.explain(rights) == "The file x.pth cannot be read."


@pytest.mark.parametrize(
    ("rule", "stays"),
    [
        ("", "what is finished stays"),
        ("choose_recipe", "finished steps stay, and finished rounds of this one"),
        ("measure_candidates", "finished numbers of bits of this one"),
        ("fit_compensation", "finished blocks"),
        ("quantize_model", "this one starts anew"),
    ],
)
def test_an_interrupt_says_what_stays(rule, stays):
    assert stays in runtime.explain(KeyboardInterrupt(), rule)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line_and_status_130(tmp_path, capsys, request, number):
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, interrupt))
    with pytest.raises(SystemExit) as caught, runtime.step(job(tmp_path)):
        signal.raise_signal(number)
    assert caught.value.code == 130
    assert capsys.readouterr().err.splitlines() == [
        "[quantize_model demo w4a4] Interrupted; run again to go on: finished steps stay, and this one "
        "starts anew."
    ]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("read", "advice"),
    [(read_json, "delete it and run again"), (read_annotations, "copy or fetch it again")],
)
def test_a_truncated_file_gets_the_advice_of_its_role(tmp_path, read, advice):
    (tmp_path / "x.json").write_text('[{"image_id": 1, "sco')
    with pytest.raises(QwtError, match=advice):
        read(tmp_path / "x.json")


def test_the_terminal_shows_our_warnings_and_the_log_has_everything(tmp_path, capsys):
    snakemake = job(tmp_path)
    with runtime.step(snakemake):
        logging.getLogger("qwt_mmdet.steps.quantize").info("half done")
        logging.getLogger("qwt_mmdet.steps.quantize").warning("few images")
        logging.getLogger("mmengine").warning("chatter")
        print("printed by a library")
        print("complained by a library", file=sys.stderr)
        warnings.warn("old function", FutureWarning, stacklevel=1)
    text = log_of(snakemake)
    for part in (
        "half done",
        "few images",
        "chatter",
        "printed by",
        "complained by",
        "old function",
    ):
        assert part in text
    shown = capsys.readouterr()
    assert shown.err == "[quantize_model demo w4a4] few images\n"
    assert shown.out == ""


def test_on_a_terminal_a_message_takes_the_place_of_the_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with runtime.step(job(tmp_path)):
        logging.getLogger("qwt_mmdet").warning("few images")
    assert capsys.readouterr().err == "\r\x1b[2K[quantize_model demo w4a4] few images\n"


def test_logging_is_as_before_after_a_step(tmp_path):
    before = list(logging.getLogger().handlers)
    with pytest.raises(SystemExit), runtime.step(job(tmp_path)):
        raise QwtError("x")
    with runtime.step(job(tmp_path)):
        pass
    assert logging.getLogger().handlers == before


def test_the_same_seed_gives_the_same_random_numbers(tmp_path):
    drawn = []
    for seed in (1, 1, 2):
        with runtime.step(job(tmp_path, gpu=0, seed=seed)):
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[1], drawn[2], strict=True))


def test_a_step_computes_where_it_is_granted(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with runtime.step(job(tmp_path, gpu=0)) as running:
        assert running.device == "cpu"


def test_a_step_fails_with_the_remedy_of_its_rule(tmp_path, capsys):
    snakemake = job(tmp_path)
    snakemake.rule = "fit_compensation"
    with pytest.raises(SystemExit), runtime.step(snakemake):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert "activation_cache.device_gb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "threads", "readers"),
    [("evaluation", 2, 2), ("evaluation", 8, 4), ("calibration", 8, 0)],
)
def test_readers_are_at_most_the_threads_granted(tmp_path, section, threads, readers, monkeypatch):
    from qwt_mmdet.steps import inputs as module
    from qwt_mmdet.steps.inputs import Inputs

    monkeypatch.setattr(module, "_evaluated_on", lambda *_: None)
    snakemake = job(tmp_path, threads=threads)
    snakemake.params = SimpleNamespace(config="a.py", config_options={}, get={"seed": 3}.get)
    snakemake.input = SimpleNamespace(checkpoint="a.pth", annotations="a.json")
    snakemake.wildcards = SimpleNamespace(model="a")
    inputs = Inputs.of(snakemake, runtime.Job("cpu", 0.0), section)
    assert (inputs.workers, inputs.batch_size, inputs.seed) == (readers, 5, 3)


def test_a_job_accounts_for_its_time_its_machine_and_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("QWT_MMDET_COMMAND", "snakemake --cores 4")
    with runtime.step(job(tmp_path)) as running:
        time.sleep(0.3)
        account = running.account()
    assert 0.3 <= account["seconds"] < 10
    assert f"{os.cpu_count()} logical cores" in account["hardware"]
    assert account["command"] == "snakemake --cores 4"


def test_steps_without_a_detector_do_not_pay_for_torch(tmp_path):
    code = textwrap.dedent(f"""
        import sys
        from types import SimpleNamespace
        from qwt_mmdet.runtime import step
        job = SimpleNamespace(rule="r", wildcards=[], log=[{str(tmp_path / "a.log")!r}],
                              params={{}}, resources={{}}, threads=1)
        with step(job):
            assert "torch" not in sys.modules
        import qwt_mmdet.config, qwt_mmdet.reporting.terminal
        assert not {{"torch", "mmdet", "pandas", "snakemake"}} & set(sys.modules)
    """)
    subprocess.run([sys.executable, "-c", code], check=True)
