"""What a job asks a cluster for."""

import json

import pytest
from qwt_mmdet.errors import QwtError
from qwt_mmdet.resources import (
    UNMEASURED_MB,
    MeasuredStep,
    memory_mb,
    minutes,
    read_estimate,
    save_estimate,
)

STEP = MeasuredStep(30, 0.3, 2, model="m", step="evaluate_baseline", images=100)


def test_time_grows_with_the_images_and_doubles_with_each_attempt():
    assert minutes(STEP, None, 1) == 2  # (30 s + 100 x 0.3 s) x 2
    assert minutes(STEP, 1000, 1) == 11
    assert minutes(STEP, 1000, 2) == 22
    assert minutes(None, 1000, 1) is None, "the cluster's own limit"


def test_memory_doubles_with_each_attempt_and_has_room_for_the_cache():
    assert memory_mb(STEP, 1) == 2500
    assert memory_mb(STEP, 3) == 10_000
    assert memory_mb(STEP, 1, cache_gb=4) == 6500
    assert memory_mb(None, 2) == 2 * UNMEASURED_MB


def test_what_estimate_saves_is_what_the_rules_read(tmp_path):
    path = tmp_path / "results" / "estimate.json"
    assert read_estimate(path) == {}
    save_estimate([STEP], path)
    assert read_estimate(path) == {("m", "evaluate_baseline"): STEP}


@pytest.mark.parametrize("content", [[], {}, {"steps": [{"model": "m"}]}, {"steps": 3}])
def test_a_file_that_is_no_estimate_is_refused(tmp_path, content):
    path = tmp_path / "estimate.json"
    path.write_text(json.dumps(content))
    with pytest.raises(QwtError, match="is no estimate of this version; delete it"):
        read_estimate(path)
