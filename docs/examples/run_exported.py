"""Run an exported detector with onnxruntime, numpy and OpenCV, by what its model.json says.

python run_exported.py model.onnx photo.jpg

It knows files of `qwt-mmdet export --nms`, YOLOX, heads with anchors or points that decode as mmdet's base class does (RetinaNet,
ATSS, FCOS, SSD, RTMDet), Faster R-CNN, and the boxes of Mask R-CNN.
"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime


def prepared(image, rule, taken):
    """The graph's input, how much wider and higher the photo became, and where boxes end: width and height."""
    photo = sides = np.array(image.shape[1::-1])  # width and height
    if resize := rule["resize"]:
        size = np.array([resize["width"], resize["height"]])
        scale = min(size.max() / photo.max(), size.min() / photo.min())
        sides = (photo * scale + 0.5).astype(int) if resize["keep_ratio"] else size
    multiple = max(rule["size_divisor"], (rule["pad"] or {}).get("divisor") or 1)
    padded = -(-sides // multiple) * multiple if taken["dynamic"] else taken["size"][::-1]
    if (sides > padded).any():
        sys.exit(f"The photo gets {sides} pixels, and the graph takes {padded} alone.")
    turn = -1 if rule["colors"] == "RGB" else 1  # OpenCV reads BGR
    around = rule["pad"]["value"] if rule["pad"] else rule["mean"][::turn]
    canvas = np.full((padded[1], padded[0], 3), around, np.float32)
    canvas[: sides[1], : sides[0]] = cv2.resize(image, sides.tolist())
    values = (canvas[:, :, ::turn] - rule["mean"]) / rule["std"]
    inside = padded if rule["pad"] else sides
    return values.transpose(2, 0, 1)[None].astype(np.float32), sides / photo, inside


def probabilities(logits, activation):
    """Scores [n, classes] of logits [n, classes], or [n, classes + background]."""
    if activation == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True))[:, :-1]


def moved(boxes, deltas, rule):
    """Anchors or proposals [n, 4], moved and scaled by deltas [n, 4]."""
    d = deltas * rule["stds"] + rule["means"]
    sides, limit = boxes[:, 2:] - boxes[:, :2], np.log(1000 / 16)
    centres = boxes[:, :2] + sides / 2 + d[:, :2] * sides
    halves = sides * np.exp(d[:, 2:].clip(-limit, limit)) / 2
    return np.hstack([centres - halves, centres + halves])


def kept(boxes, scores, groups, rule):
    """Indices of the boxes that are left when others of their group are suppressed, the best first."""
    if rule["nms"].get("type", "nms") != "nms":
        sys.exit(f"The file's model.json asks for {rule['nms']}, which this example does not know.")
    corners = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
    overlap = rule["nms"]["iou_threshold"]
    found = cv2.dnn.NMSBoxesBatched(corners, scores, groups, -1, overlap)
    return np.array(found, int)[: rule["boxes_per_image"]]


def yolox(outputs, rule, inside):
    """Boxes [n, 4] in pixels of the graph's input, scores [n] and labels [n]."""
    boxes, scores = [], []
    names = ("cls_scores", "bbox_preds", "objectnesses")
    for stride, *maps in zip(rule["strides"], *(outputs[name] for name in names), strict=True):
        classes, box, objects = (values[0] for values in maps)
        y, x = np.mgrid[: box.shape[1], : box.shape[2]]
        centre, half = (box[:2] + np.stack([x, y])) * stride, np.exp(box[2:]) * stride / 2
        boxes.append(np.concatenate([centre - half, centre + half]).reshape(4, -1).T)
        found = probabilities(classes, "sigmoid") * probabilities(objects, "sigmoid")
        scores.append(found.reshape(len(classes), -1).T)
    boxes, scores = np.concatenate(boxes), np.concatenate(scores)
    best, labels = scores.max(axis=1), scores.argmax(axis=1)
    sure = best >= rule["score_threshold"]
    boxes, best, labels = boxes[sure], best[sure], labels[sure]
    chosen = kept(boxes, best, labels * rule["nms"]["class_by_class"], rule)
    return boxes[chosen], best[chosen], labels[chosen]


def dense(outputs, rule, inside):
    """The same of a head with anchors or points; of a first stage: proposals, with the label 0."""
    found = []
    for level, stride in enumerate(rule["strides"]):
        logits, values = outputs["cls_scores"][level][0], outputs["bbox_preds"][level][0]
        y, x = np.mgrid[: values.shape[1], : values.shape[2]] * stride
        places = np.stack([x, y, x, y], -1).reshape(-1, 1, 4)
        anchors = np.array(rule["anchors"][level] if "anchors" in rule else [[0, 0, 0, 0]])
        values = values.reshape(len(anchors), 4, -1).transpose(2, 0, 1).reshape(-1, 4)
        logits = logits.reshape(len(anchors), -1, places.shape[0]).transpose(2, 0, 1)
        scores = probabilities(logits.reshape(len(values), -1), rule["activation"])
        index, labels = np.nonzero(scores > (rule["score_threshold"] or 0))
        best = scores[index, labels]
        first = np.argsort(-best, kind="stable")[: rule["candidates_per_level"]]
        index, labels, best = index[first], labels[first], best[first]
        starts = (places + anchors).reshape(-1, 4)[index]
        if "anchors" in rule:
            boxes = moved(starts, values[index], rule)
        else:
            boxes = starts + rule["offset"] * stride + values[index] * [-1, -1, 1, 1]
        if outputs.get("score_factors"):
            factors = outputs["score_factors"][level][0].reshape(len(anchors), -1).T.flatten()
            best = best * probabilities(factors[index], "sigmoid")
        found.append((boxes, best, labels, np.full(len(best), level)))
    boxes, scores, labels, levels = map(np.concatenate, zip(*found, strict=True))
    if rule["clipped"]:
        boxes = boxes.clip(0, np.tile(inside, 2))
    large = (boxes[:, 2:] - boxes[:, :2] > rule["least_side"]).all(axis=1)
    boxes, scores, labels, levels = boxes[large], scores[large], labels[large], levels[large]
    groups = levels if rule["nms"].get("level_by_level") else labels * rule["nms"]["class_by_class"]
    chosen = kept(boxes, scores, groups, rule)
    return boxes[chosen], scores[chosen], labels[chosen]


def mean_weights(start, end, bins, length, regions):
    """Weights [bins, length] of a map's rows or columns in the bins from start to end, in pixels of the map."""
    bin_side = (end - start) / bins
    points = regions["sampling_ratio"] or max(int(np.ceil(bin_side)), 1)
    places = start + bin_side * (np.arange(bins * points) + 0.5) / points
    found = np.zeros((len(places), length))
    inside = np.flatnonzero((places >= -1) & (places <= length))
    low = places.clip(0, length - 1).astype(int)
    high, share = (low + 1).clip(max=length - 1), places.clip(0, length - 1) - low
    np.add.at(found, (inside, low[inside]), 1 - share[inside])
    np.add.at(found, (inside, high[inside]), share[inside])
    return found.reshape(bins, points, length).mean(1)


def second_stage(run, maps, boxes, rule, inside):
    """Boxes, scores and labels of what a second stage sees in proposals [n, 4]; ``run``: its graph."""
    regions, cut = rule["regions"], []
    sides = (boxes[:, 2:] - boxes[:, :2]).clip(1e-9)
    levels = np.floor(np.log2(np.sqrt(sides.prod(axis=1)) / regions["finest_scale"] + 1e-6))
    for box, level in zip(
        boxes, levels.clip(0, len(regions["strides"]) - 1).astype(int), strict=True
    ):
        values = maps[level][0]
        x1, y1, x2, y2 = box / regions["strides"][level] - 0.5 * regions["aligned"]
        rows = mean_weights(y1, y2, regions["size"][0], values.shape[1], regions)
        columns = mean_weights(x1, x2, regions["size"][1], values.shape[2], regions)
        cut.append(rows @ values @ columns.T)
    outputs = run(np.stack(cut).astype(np.float32))
    scores = probabilities(outputs["cls_scores"], rule["activation"])
    index, labels = np.nonzero(scores > rule["score_threshold"])
    deltas = outputs["bbox_preds"].reshape(len(boxes), -1, 4)
    own = np.zeros_like(labels) if rule["class_agnostic"] else labels
    found, best = moved(boxes[index], deltas[index, own], rule), scores[index, labels]
    if rule["clipped"]:
        found = found.clip(0, np.tile(inside, 2))
    chosen = kept(found, best, labels * rule["nms"]["class_by_class"], rule)
    return found[chosen], best[chosen], labels[chosen]


def sums_overflow():
    """Whether ONNX Runtime's integer kernels add 8-bit products in 16 bits here: x86 without VNNI."""
    processor = Path("/proc/cpuinfo")
    flags = processor.read_text() if processor.exists() else ""
    return "avx2" in flags and "vnni" not in flags


def opened(path):
    """A function that runs a graph: inputs by name to outputs by name."""
    options = onnxruntime.SessionOptions()
    if sums_overflow():  # at this level, ONNX Runtime computes with floats
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(path, options)
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))


def filled(names, values):
    """The nested names of model.json, with the values of a run in their place."""
    if isinstance(names, dict):
        return {key: filled(name, values) for key, name in names.items()}
    if isinstance(names, list):
        return [filled(name, values) for name in names]
    return names and values[names]


def detect(path, photo):
    """Scores, boxes (x1, y1, x2, y2 in pixels of the photo) and class names, the best first."""
    about = json.loads(Path(path).with_suffix(".json").read_text())
    rule, heads = about["postprocessing"], about["region_heads"]
    known = rule["scores"] and (rule["second_stage"] or not heads)
    if not about["suppression"] and not known:
        sys.exit(
            f"{path} is of a {rule['head']}, whose boxes only mmdet's own code makes; use qwt_mmdet.load_exported, or "
            "try to export it with --nms."
        )
    image = cv2.imread(str(photo))
    if image is None:
        sys.exit(f"{photo} is no image that OpenCV can read.")
    image, scales, inside = prepared(image, about["preprocessing"], about["input"])
    values = opened(path)({"image": image})
    outputs = filled(about["outputs"], values)
    if about["suppression"]:
        boxes, scores, labels = (outputs[name] for name in ("boxes", "scores", "labels"))
    else:
        decode = yolox if rule["head"] == "YOLOXHead" else dense
        boxes, scores, labels = decode(outputs, rule, inside)
    if heads:
        head = heads["roi_head.bbox_head"]
        graph, (name,) = opened(Path(path).with_name(head["file"])), head["inputs"]

        def run(regions):
            return filled(head["outputs"], graph({name: regions}))

        maps = filled(about["features"], values)
        boxes, scores, labels = second_stage(run, maps, boxes, rule["second_stage"], inside)
    return scores, boxes / np.tile(scales, 2), [about["classes"][label] for label in labels]


if __name__ == "__main__":
    for score, box, name in zip(*detect(*sys.argv[1:3]), strict=True):
        print(f"{score:.3f} {name} {box.round(1)}")
