"""`qwt-mmdet estimate`: time and memory of a run."""

import os
from pathlib import Path
from typing import Annotated

import typer
from tabulate import tabulate

from ..config import read_file, resolve
from ..errors import QwtError
from ..plan import Plan
from ..reporting.text import duration, number
from ..resources import ESTIMATE, save_estimate
from .common import CoresOption, DeviceOption, check_cuda, plain_errors


def estimate(
    config: Annotated[Path, typer.Argument(help="A config of the workflow.")],
    device: DeviceOption = "auto",
    cores: CoresOption = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Parallel jobs, as on a cluster; default: one for each core or GPU."
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs for these jobs; default: those of this machine.")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(help=f"File for the costs; the requests to a cluster follow {ESTIMATE}."),
    ] = None,
) -> None:
    """Estimate time and memory of a run of a config on this machine; needs neither weights nor images.

    The workflow runs twice with random weights, on a few generated images and on some more, one step at a time.
    This takes minutes. Downloads, summary and report are not included.
    """
    with plain_errors():
        from ..devices import count_gpus, gpu_fault
        from ..estimate import estimate_run, run_seconds

        plan = Plan(resolve(read_file(config)))
        if device == "cuda":
            check_cuda()
        on_gpu = "cpu" not in (device, plan.config["device"]) and gpu_fault() is None
        if gpus and not on_gpu:
            raise QwtError(
                f"--gpus {gpus} needs times of a GPU, but the steps are measured on the CPU here; estimate on a "
                "machine with such a GPU, or leave --gpus out."
            )
        cores = cores or os.cpu_count() or 1
        threads = cores if on_gpu else 1
        found = estimate_run(plan, threads=threads, gpu=on_gpu)
        if save is not None:
            save_estimate(found, save)
        rows = [
            {
                "model": entry.model,
                "step": entry.step,
                "jobs": entry.jobs,
                "images": entry.images,
                "an image": f"{entry.seconds_per_image:.2f} s",
                "once": duration(entry.seconds),
                "all jobs": duration(entry.all_seconds),
                "memory": f"{entry.gigabytes:.1f} GB",
                **({"GPU memory": number(entry.device_gigabytes, 1)} if on_gpu else {}),
            }
            for entry in found
        ]
        typer.echo(tabulate(rows, headers="keys", disable_numparse=True))
        total = sum(entry.all_seconds for entry in found)
        typer.echo(
            f"\nOne after the other: {duration(total)}, on {'a GPU' if on_gpu else 'cpu'}, {threads} threads each."
        )
        gpus = gpus or count_gpus() if on_gpu else None
        slots = jobs or gpus or cores
        if slots > 1:
            wall, busy = run_seconds(plan, found, slots, gpus)
            cards = f" on {gpus} GPUs" if gpus else ""
            typer.echo(
                f"{slots} at a time{cards}: about {duration(wall)}, {busy * threads / 3600:.1f} core hours."
            )
        cache = plan.config["activation_cache"]["memory_gb"]
        typer.echo(
            f"Each fit of a compensation, and each calibration with refit: sequential, takes up to {cache:g} GB more "
            "(activation_cache.memory_gb)."
        )
