"""Where tests compute: each that takes `device` runs on the CPU, and on a GPU that is pretended or there."""

from collections.abc import Iterator

import pytest
import tiny
import torch

DEVICES = ["cpu", pytest.param("pretended", marks=pytest.mark.slow)]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device to compute on; tiny detectors and their images are there, too."""
    with tiny.computing_on(request.param) as device:
        yield device


@pytest.fixture
def made_there(device: torch.device) -> Iterator[None]:
    """Tensors and modules are made on the device where nothing else is said."""
    with device:
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what takes long on the pretended GPU: it looks at every call of torch."""
    items[:] = [item for item in items if not _is_left_out(item)]


def _is_left_out(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    takes_long = item.get_closest_marker("slow_if_pretended") is not None
    return parameters.get("device") == "pretended" and takes_long


@pytest.fixture
def local_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads from the test server: short pauses, and no proxy before it."""
    monkeypatch.setattr("qwt_mmdet.data.download.FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
