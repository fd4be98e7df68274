"""Where tests compute: each that takes `device` runs on the CPU, and on a GPU where there is one."""

import pytest
import tiny
import torch

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device to compute on; tiny detectors and their images are there, too."""
    monkeypatch.setattr(tiny, "device", torch.device(request.param))
    return tiny.device
