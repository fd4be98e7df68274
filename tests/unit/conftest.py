"""Where tests compute: each that takes `device` runs on the CPU, and on a GPU that is pretended or there."""

from collections.abc import Iterator

import pytest
import tiny
import torch

DEVICES = ["cpu", pytest.param("pretended", marks=pytest.mark.slow)]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))

PRETENDED = {
    "test_activation_cache",
    "test_attention",
    "test_compensation_resume",
    "test_walk",
}
"""Files whose tests run on the pretended GPU. It looks at every call of torch, which takes time."""


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device to compute on; tiny detectors and their images are there, too."""
    with tiny.computing_on(request.param) as device:
        yield device


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what takes long on the pretended GPU, and files that it was not tried with."""
    items[:] = [item for item in items if not _is_left_out(item)]


def _is_left_out(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    wanted = item.path.stem in PRETENDED and not item.get_closest_marker("slow_if_pretended")
    return parameters.get("device") == "pretended" and not wanted
