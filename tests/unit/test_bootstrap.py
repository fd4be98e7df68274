"""The bootstrap is COCOeval on resampled images, paired, seeded, and honest about what it knows."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from qwt_mmdet.errors import QwtError
from qwt_mmdet.evaluation import coco
from qwt_mmdet.evaluation.bootstrap import Bootstrap, bootstrap, draw_weights, interval
from qwt_mmdet.evaluation.coco import AP_METRICS, Averaged, coco_metrics
from qwt_mmdet.evaluation.estimates import Difference, Estimate, Limit
from qwt_mmdet.evaluation.weighted_ap import ApTable
from qwt_mmdet.reporting.text import limit_sentence
from random_detections import detection, one_object, random_detections, write

BOX = [20.0, 30.0, 60.0, 50.0]


def repeated(content, predictions, weights):
    """The data set that holds each image as often as its weight says, under new ids."""
    images, annotations, records = [], [], []
    for copy in range(max(weights.values())):
        new = {image: 1_000_000 * copy + image for image, times in weights.items() if times > copy}
        images += [
            {**image, "id": new[image["id"]], "file_name": f"{new[image['id']]}.png"}
            for image in content["images"]
            if image["id"] in new
        ]
        for old, copies in ((content["annotations"], annotations), (predictions, records)):
            of_images = [entry for entry in old if entry["image_id"] in new]
            copies += [{**entry, "image_id": new[entry["image_id"]]} for entry in of_images]
    annotations = [{**entry, "id": number} for number, entry in enumerate(annotations, 1)]
    return {**content, "images": images, "annotations": annotations}, records


def table_of(annotations, predictions, iou_type):
    ground_truth = coco.load_ground_truth(annotations, masks=iou_type == "segm")
    return ApTable(ground_truth, predictions, iou_type)


# One distinct score makes all detections tie; then the order is that of the images alone.
@pytest.mark.parametrize("scores", [None, 6, 1])
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_weights_are_numbers_of_copies_of_an_image(tmp_path, iou_type, scores):
    sizes = {"images": 9, "detections": 25, "classes": 4}
    content, predictions = random_detections(**sizes, seed=7, scores=scores)
    table = table_of(write(tmp_path, content), predictions, iou_type)
    assert table.images == [image["id"] for image in content["images"]]
    weights = np.concatenate([np.ones((1, 9), dtype=int), draw_weights(9, 3, seed=1)])
    assert weights.max() > 2
    ap, classes = table.ap(weights)
    for index, row in enumerate(weights):
        copies = dict(zip(table.images, row.tolist(), strict=True))
        again, records = repeated(content, predictions, copies)
        path = write(tmp_path, again, "again.json")
        metrics = coco_metrics(path, records, masks=iou_type == "segm")
        expected = {name: metrics[iou_type][name] for name in AP_METRICS}
        for category in content["categories"]:
            expected[category["id"]] = metrics["per_class"][category["name"]].get(iou_type)
        for name, value in expected.items():
            found = {**ap, **classes}.get(name, np.full(len(weights), np.nan))[index]
            value = np.nan if value is None else value
            assert found == pytest.approx(value, abs=1e-9, nan_ok=True), name


def two_images():
    """Image 1 has its object found with score 0.9; image 2 has only a false positive, 0.95."""
    content = one_object(BOX)
    content["images"].append({**content["images"][0], "id": 2, "file_name": "2.png"})
    content["annotations"].append({**content["annotations"][0], "id": 2, "image_id": 2})
    predictions = [detection(BOX, 0.9), detection([200.0, 140.0, 50.0, 50.0], 0.95, image_id=2)]
    return content, predictions


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        # Precision 1/2 up to recall 1/2: 51 of the 101 recall thresholds.
        ([1, 1], 51 / 101 / 2),
        # Twice image 1: precision 2/3 up to recall 2/3, 67 thresholds.
        ([2, 1], 67 / 101 * 2 / 3),
        ([1, 2], 34 / 101 / 3),
        ([2, 0], 1),
        ([0, 2], 0),
        ([0, 0], np.nan),
    ],
)
def test_two_images_by_hand(tmp_path, weights, expected):
    content, predictions = two_images()
    table = table_of(write(tmp_path, content), predictions, "bbox")
    for name, (value,) in table.ap(np.array([weights]))[0].items():
        undefined = name in ("APs", "APl")
        assert value == pytest.approx(np.nan if undefined else expected, nan_ok=True), name


def test_a_class_without_objects_in_a_resample_leaves_the_mean(tmp_path):
    content, predictions = two_images()
    content["categories"].append({"id": 2, "name": "dog"})
    content["annotations"][1]["category_id"] = 2
    predictions[1]["category_id"] = 2
    table = table_of(write(tmp_path, content), predictions, "bbox")
    np.testing.assert_allclose(table.ap(np.array([[1, 1], [3, 0], [0, 1]]))[0]["AP"], [0.5, 1, 0])


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_what_is_computed_in_parts_is_as_all_at_once(tmp_path, monkeypatch, iou_type):
    content, predictions = random_detections(images=9, detections=25, classes=4, seed=7, scores=6)
    path = write(tmp_path, content)
    weights = draw_weights(9, 20, seed=1)
    whole = table_of(path, predictions, iou_type)
    expected = whole.ap(weights)
    monkeypatch.setattr("qwt_mmdet.evaluation.weighted_ap.CHUNK_ELEMENTS", 300)
    monkeypatch.setattr(coco, "IMAGES_AT_ONCE", 2)
    backwards = sorted(predictions, key=lambda record: -record["image_id"])
    parts = table_of(path, backwards, iou_type)
    assert parts.images == whole.images
    for table in (whole, parts):
        for one, other in zip(table.ap(weights), expected, strict=True):
            assert list(one) == list(other)
            np.testing.assert_array_equal(list(one.values()), list(other.values()))


def test_each_resample_draws_as_many_images_as_there_are():
    weights = draw_weights(40, 500, seed=3)
    assert weights.shape == (500, 40)
    assert (weights.sum(axis=1) == 40).all()
    # An image is missing with probability (1 - 1/40)^40 = 0.363.
    assert (weights == 0).mean() == pytest.approx(0.363, abs=0.01)


def displaced(predictions, share):
    """Predictions of which a share lies a third of its width beside where it was."""
    generator = np.random.default_rng(0)
    result = []
    for record in predictions:
        x, y, width, height = record["bbox"]
        if generator.random() < share:
            x += width / 3
        result.append({**record, **detection([x, y, width, height], record["score"])})
        result[-1].update(image_id=record["image_id"], category_id=record["category_id"])
    return result


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """A baseline and what a quantized and a compensated model might make of it."""
    content, predictions = random_detections(images=40, detections=20, classes=4, seed=11)
    return write(tmp_path_factory.mktemp("bootstrap"), content), {
        "baseline": predictions,
        "w4/quantized": displaced(predictions, 0.6),
        "w4/qwt": displaced(predictions, 0.3),
        "w8/quantized": list(predictions),
    }


@pytest.fixture(scope="module")
def result(variants):
    path, records = variants
    return bootstrap(path, records, masks=True, resamples=200, seed=5)


def test_the_seed_decides(variants, result):
    path, records = variants
    baseline = {"baseline": records["baseline"]}
    same = bootstrap(path, baseline, masks=False, resamples=200, seed=5)
    other = bootstrap(path, baseline, masks=False, resamples=200, seed=6)
    assert same.estimate("baseline", "bbox", "AP") == result.estimate("baseline", "bbox", "AP")
    assert other.estimate("baseline", "bbox", "AP") != result.estimate("baseline", "bbox", "AP")


def test_processes_and_files_change_nothing(variants, result, tmp_path):
    path, records = variants
    for name, content in records.items():
        (tmp_path / name.replace("/", "-")).write_text(json.dumps(content))
    files = {name: tmp_path / name.replace("/", "-") for name in records}
    shared = bootstrap(path, files, masks=True, resamples=200, seed=5, processes=2)
    for name, by_type in result.samples.items():
        for iou_type, by_metric in by_type.items():
            for metric, expected in by_metric.items():
                np.testing.assert_array_equal(shared.samples[name][iou_type][metric], expected)


def test_a_variant_does_not_differ_from_its_equal_and_so_has_no_loss_to_recover(result):
    difference = result.difference("w8/quantized", "baseline", "bbox", "AP")
    assert difference == Difference(0, 0, 0)
    assert not difference.significant
    recovered = result.recovered("baseline", "w8/quantized", "w4/qwt", "bbox", "AP")
    assert recovered == Estimate(None, None, None)


def test_pairing_narrows_a_difference(result):
    difference = result.difference("w4/quantized", "baseline", "bbox", "AP")
    assert difference.high < 0
    assert difference.significant
    a = result.samples["w4/qwt"]["bbox"]["AP"]
    b = result.samples["baseline"]["bbox"]["AP"]
    assert np.std(a - b) < 0.9 * np.hypot(np.std(a), np.std(b))


def test_recovered_fraction_has_its_fixed_points(result):
    for regained, share in (("baseline", 1), ("w4/quantized", 0)):
        recovered = result.recovered("baseline", "w4/quantized", regained, "segm", "AP")
        assert recovered == Estimate(share, share, share)
    part = result.recovered("baseline", "w4/quantized", "w4/qwt", "segm", "AP")
    assert 0 < part.low < part.value < part.high


def from_samples(**samples):
    """A Bootstrap with given samples; the first of each is the observed value."""
    nested = {name: {"bbox": {"AP": np.array(s, dtype=float)}} for name, s in samples.items()}
    values = {name: {"bbox": {"AP": by["bbox"]["AP"][0]}} for name, by in nested.items()}
    return Bootstrap(10, len(next(iter(samples.values()))), 0, values, nested)


def test_a_gain_by_quantization_is_no_loss_to_recover():
    result = from_samples(fp=[0.3] * 50, q=[0.4] * 50, c=[0.5] * 50)
    assert result.difference("q", "fp", "bbox", "AP").significant
    assert result.recovered("fp", "q", "c", "bbox", "AP").value is None


def test_a_resample_without_loss_widens_the_fraction_at_both_ends():
    # 1000 losses of 0.1, recovered by k/1000; then 20 of them turn into resamples without loss.
    gained = np.arange(1000) / 1000
    lost = np.full(1000, 0.1)
    plain = from_samples(fp=lost, q=0 * lost, c=gained * lost)
    recovered = plain.recovered("fp", "q", "c", "bbox", "AP")
    assert (recovered.low, recovered.high) == pytest.approx((0.025, 0.974), abs=1e-3)
    lost[490:510] = -0.1
    widened = from_samples(fp=lost, q=0 * lost, c=gained * lost)
    recovered = widened.recovered("fp", "q", "c", "bbox", "AP")
    assert (recovered.low, recovered.high) == pytest.approx((0.005, 0.994), abs=1e-3)


@pytest.mark.parametrize(
    ("drop", "max_drop", "met", "words"),
    [
        # 95 % of the resamples lie within 0.045 of the drop, on either side
        (0.037, 0.1, True, "loses 0.037 (interval -0.010 to +0.084) of 0.360 box AP"),
        (0.080, 0.01, False, "loses 0.080 (interval +0.033 to +0.127) of 0.360 box AP"),
        # 10 images, (0.045 / (0.037 - 0.01))² times as many would tell
        (0.037, 0.01, None, "with 10 images; about 28 would tell"),
        (-0.060, 0.01, True, "gains 0.060 (interval +0.013 to +0.107) on 0.360 box AP"),
        (-0.0004, 0.1, True, "loses 0.000 (interval -0.048 to +0.047) of 0.360 box AP"),
    ],
)
def test_a_drop_is_what_the_variant_has_less_than_the_baseline(drop, max_drop, met, words):
    drops = np.concatenate([[drop], drop + np.arange(-50, 51) / 1000])
    result = from_samples(fp=[0.36] * 102, q=0.36 - drops)
    assert from_samples(fp=[np.nan] * 5, q=[0.1] * 5).limit("fp", "q", "bbox", 0.01) is None
    limit = result.limit("fp", "q", "bbox", max_drop)
    assert limit.drop == pytest.approx(drop)
    assert limit.worst_drop == pytest.approx(drop + 0.045, abs=1e-4)
    assert limit.least_drop == pytest.approx(drop - 0.045, abs=1e-4)
    assert limit.met is met
    row = SimpleNamespace(
        quantization="mixed", weight_bits=4.6, quantized_bytes=1e6, metrics="bbox", limit=limit,
        ap={"AP": result.compare("fp", "q", None, "bbox", "AP")},
    )  # fmt: skip
    assert words in limit_sentence(row)


@pytest.mark.parametrize(
    ("drop", "worst", "least", "met", "images"),
    [
        (0.002, 0.008, -0.004, True, 57),
        (0.030, 0.050, 0.015, False, 57),
        (0.006, 0.014, -0.002, None, 400),  # (0.008 / 0.004)² times as many
        (0.010, 0.020, 0.000, None, None),  # on the limit no number tells
    ],
)
def test_a_limit_is_met_missed_or_not_known(drop, worst, least, met, images):
    limit = Limit(0.01, drop, worst, least, 100)
    assert limit.met is met
    assert limit.images_to_tell == images


def gain_of_repeats(deviations, images, samples=400):
    """The gain of `c` over `q`, each repeated, where c lies above q by a repeat's deviation and the images' luck."""
    alike = np.random.default_rng(5).normal(0.2, 0.1, (len(deviations), 1))  # cancels in the pair
    luck = np.concatenate([[0], np.random.default_rng(6).normal(0, images, samples - 1)])
    variants = {}
    for number, deviation in enumerate(deviations):
        variants[f"q{number}"] = alike[number] + 0 * luck
        variants[f"c{number}"] = alike[number] + deviation + luck
    names = {letter: [f"{letter}{n}" for n in range(len(deviations))] for letter in "qc"}
    repeats = {of[0]: of for of in names.values()}
    return from_samples(**variants).with_repeats(repeats).difference("c0", "q0", "bbox", "AP")


def test_a_gain_over_repeats_is_a_mean_with_their_spread():
    gain = gain_of_repeats([0.01, 0.02, 0.06], images=0)
    assert gain.value == pytest.approx(0.03)
    assert gain.spread == pytest.approx(np.std([0.01, 0.02, 0.06], ddof=1))
    assert gain.low < 0 < gain.high
    assert not gain.significant  # one calibration alone would have been called a gain


def test_repeats_that_agree_leave_the_interval_of_the_images():
    many, one = (gain_of_repeats([0.01] * count, images=0.002) for count in (5, 1))
    assert (many.low, many.high) == pytest.approx((one.low, one.high))
    assert many.spread == pytest.approx(0)
    assert one.spread is None


def test_an_interval_over_repeats_covers_what_further_calibrations_would_give_on_average():
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        gain = gain_of_repeats(generator.normal(0.01, 0.004, 5), images=0)
        covered += gain.low <= 0.01 <= gain.high
    assert 0.92 < covered / 300 < 0.99


def test_a_repeat_that_is_missing_leaves_the_spread_unknown():
    samples = {name: [0.1 + 0.01 * i] * 50 for i, name in enumerate(("q", "q2", "q3", "c", "c2"))}
    result = from_samples(**samples).with_repeats({"q": ["q", "q2", "q3"], "c": ["c", "c2"]})
    gain = result.difference("c", "q", "bbox", "AP")
    assert gain.value == pytest.approx(0.135 - 0.11)
    assert gain.spread is None


def test_an_interval_leaves_out_two_and_a_half_percent_at_each_end():
    assert interval(np.arange(1001.0)) == pytest.approx((25, 975))
    with_undefined = np.concatenate([[np.nan] * 50, np.arange(1001.0)])
    assert interval(with_undefined) == pytest.approx((25, 975))
    assert interval(np.full(5, np.nan)) == (None, None)
    assert interval(np.arange(100.0), beyond=5) == (None, None)


def test_undefined_resamples_are_dropped(tmp_path):
    content, predictions = two_images()
    content["annotations"].pop()
    result = bootstrap(write(tmp_path, content), {"a": predictions}, masks=False, resamples=400)
    # Image 1, the only one with an object, is missing in a quarter of the draws.
    estimate = result.estimate("a", "bbox", "AP")
    dropped = np.isnan(result.samples["a"]["bbox"]["AP"])
    assert dropped.sum() == pytest.approx(100, abs=35)
    assert estimate.low is not None
    assert result.estimate("a", "bbox", "APs") == Estimate(None, None, None)
    assert not result.difference("a", "a", "bbox", "APs").significant
    assert result.recovered("a", "a", "a", "bbox", "APs") == Estimate(None, None, None)


def test_one_image_has_no_interval(tmp_path):
    path = write(tmp_path, one_object(BOX))
    result = bootstrap(path, {"a": [detection(BOX, 0.5)]}, masks=False)
    estimate = result.estimate("a", "bbox", "AP")
    assert estimate.value == pytest.approx(1)
    assert estimate.low is estimate.high is None


@pytest.mark.parametrize(
    ("low", "high", "significant"),
    [
        (0.1, 0.3, True),
        (-0.3, -0.1, True),
        (-0.1, 0.3, False),
        (0.0, 0.3, False),
        (None, None, False),
    ],
)
def test_a_difference_is_significant_where_its_interval_excludes_0(low, high, significant):
    assert Difference(0.2, low, high).significant == significant


def test_a_comparison_leaves_out_what_was_not_evaluated(result):
    whole = result.compare("baseline", "w4/quantized", "w4/qwt", "bbox", "AP")
    assert whole.baseline == result.estimate("baseline", "bbox", "AP")
    gain = result.difference("w4/qwt", "w4/quantized", "bbox", "AP")
    assert whole.compensated_minus_quantized == gain
    assert whole.recovered == result.recovered("baseline", "w4/quantized", "w4/qwt", "bbox", "AP")
    part = result.compare(None, "w4/quantized", "w4/qwt", "bbox", "AP")
    missing = ("baseline", "quantized_minus_baseline", "compensated_minus_baseline", "recovered")
    assert part == dataclasses.replace(whole, **dict.fromkeys(missing))


def test_bad_predictions_name_their_variant(tmp_path):
    path = write(tmp_path, one_object(BOX))
    records = {"baseline": [detection(BOX, 0.5)], "w4/quantized": [detection(BOX, float("nan"))]}
    with pytest.raises(QwtError, match=r"Variant w4/quantized: .*score nan"):
        bootstrap(path, records, masks=False)


def test_intervals_cover_the_expected_ap(tmp_path):
    # 400 images are the world; each trial sees 50 of them. Weights serve for both kinds of drawing.
    content, predictions = random_detections(images=400, detections=6, classes=3, seed=4)
    table = table_of(write(tmp_path, content), predictions, "bbox")
    generator = np.random.default_rng(8)
    trials, resamples = 60, 80
    rows = []
    for _ in range(trials):
        sample = np.zeros(400, dtype=int)
        sample[generator.choice(400, 50, replace=False)] = 1
        rows += [sample[None], generator.multinomial(50, sample / 50, size=resamples)]
    ap = table.ap(np.concatenate(rows))[0]["AP"].reshape(trials, 1 + resamples)
    expected = ap[:, 0].mean()
    ends = np.array([interval(samples) for samples in ap[:, 1:]])
    covered = ((ends[:, 0] <= expected) & (expected <= ends[:, 1])).mean()
    assert covered >= 0.85
    # An interval that always covers would be worthless: it is as wide as the AP of samples varies.
    width = (ends[:, 1] - ends[:, 0]).mean() / (2 * 1.96)
    assert width == pytest.approx(ap[:, 0].std(), rel=0.35)


@pytest.mark.parametrize("masks", [False, True])
def test_a_detector_that_finds_nothing_has_the_interval_0_to_0(tmp_path, masks):
    content, predictions = random_detections(images=9, detections=25, classes=4, seed=7)
    variants = {"baseline": predictions, "nothing": [], "again": []}
    found = bootstrap(write(tmp_path, content), variants, masks=masks, resamples=50)
    for kind in ("bbox", "segm")[: 1 + masks]:
        for metric in ("AP", "AP50", 1):
            assert found.estimate("nothing", kind, metric) == Estimate(0, 0, 0)
        loss = found.difference("nothing", "baseline", kind, "AP")
        assert loss.value == -found.values["baseline"][kind]["AP"]
        assert loss.significant
        assert not found.difference("again", "nothing", kind, "AP").significant
        for regained, share in (("again", 0), ("baseline", 1)):
            recovered = found.recovered("baseline", "nothing", regained, kind, "AP")
            assert recovered == Estimate(share, share, share)


def test_a_metric_more_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(AP_METRICS, "AP60", Averaged(iou=0.6))
    content, predictions = random_detections(images=8, detections=20, classes=3, seed=4, scores=5)
    path = write(tmp_path, content)
    once = np.ones((1, 8), dtype=int)
    found = table_of(path, predictions, "bbox").ap(once)[0]["AP60"]
    evaluated = coco_metrics(path, predictions, masks=False)["bbox"]
    assert found == pytest.approx(evaluated["AP60"])
    assert evaluated["AP75"] < evaluated["AP60"] < evaluated["AP50"]
