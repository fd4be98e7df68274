import copy
import platform

import psutil
import pytest
import tiny
import torch
from qwt_mmdet.compensation import block_fit
from qwt_mmdet.compensation.fit import fit_compensation
from qwt_mmdet.config import CompensationSettings
from qwt_mmdet.replay.cache import ActivationCache, release_free_memory


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def values():
    return {
        "maps": [
            torch.arange(12.0).view(3, 4).T.to(tiny.device),
            torch.ones(2, dtype=torch.int64, device=tiny.device),
        ],
        "size": (7, 5),
    }


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("device_gb", "memory_gb"), [(1, 1), (0, 1), (0, 0)])
def test_nested_values_come_back_as_they_were(device_gb, memory_gb, temporary):
    with ActivationCache(device_gb, memory_gb) as cache:
        cache["a"] = values()
        assert len(list(temporary.rglob("*.pt"))) == (0 if memory_gb else 2)
        for found in (cache["a"], cache.pop("a")):
            assert found["size"] == (7, 5)
            for tensor, expected in zip(found["maps"], values()["maps"], strict=True):
                assert torch.equal(tensor, expected)
                assert tensor.device == expected.device
                assert tensor.stride() == expected.stride()
        assert "a" not in cache
        assert list(temporary.rglob("*.pt")) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("memory_gb", [0, 1])
def test_what_is_read_may_be_changed(memory_gb):
    with ActivationCache(memory_gb=memory_gb) as cache:
        cache["a"] = torch.zeros(3)
        cache["a"].add_(1)
        assert not cache["a"].any()


def test_the_limit_counts_what_is_kept_now():
    with ActivationCache(memory_gb=800e-9) as cache:  # room for 200 float32 numbers
        for key in range(3):
            cache[key] = torch.zeros(100)
        assert cache._folder is not None
        del cache[0], cache[1]
        files = set(cache._folder.iterdir())
        cache[3] = torch.zeros(200)
        assert set(cache._folder.iterdir()) == files


def test_a_small_part_of_a_tensor_does_not_keep_all_of_it():
    with ActivationCache() as cache:
        cache["row"] = torch.zeros(1000, 1000)[3]
        assert cache.pop("row").untyped_storage().nbytes() == 4000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do as they like")
def test_freed_memory_between_kept_tensors_goes_back_to_the_system():
    tensors = [torch.ones(15_000) for _ in range(3000)]  # 60 kB each: too small for a mapping
    kept = tensors[::10]
    full = psutil.Process().memory_info().rss
    del tensors
    release_free_memory()
    released = full - psutil.Process().memory_info().rss
    assert released > 0.8 * 0.9 * 3000 * 60_000
    assert all(tensor.all() for tensor in kept)


@pytest.mark.usefixtures("device")
def test_files_are_removed_after_a_failure(temporary, monkeypatch):
    def fail(*_, **__):
        assert list(temporary.glob("qwt-mmdet-*/*.pt"))
        raise KeyboardInterrupt

    monkeypatch.setattr(block_fit, "_log", fail)
    full = tiny.detector("resnet")
    with pytest.raises(KeyboardInterrupt):
        fit_compensation(
            copy.deepcopy(full), full, tiny.batches(4), CompensationSettings(holdout_fraction=0.5),
            device_gb=0, memory_gb=0,
        )  # fmt: skip
    assert list(temporary.glob("qwt-mmdet-*")) == []
