"""Run an exported YOLOX, or any file of `qwt-mmdet export --nms`, with onnxruntime, numpy and OpenCV.

python run_exported.py model.onnx photo.jpg
"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime


def prepared(image, rule, taken):
    """The graph's input, and how much wider and higher the photo became."""
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
    return values.transpose(2, 0, 1)[None].astype(np.float32), sides / photo


def yolox(outputs, strides):
    """Boxes [n, 4] in pixels of the graph's input, and scores [n, classes]."""
    scores, boxes = [], []
    for level, stride in enumerate(strides):
        classes, box, objects = (values[0] for values in outputs[level :: len(strides)])
        y, x = np.mgrid[: box.shape[1], : box.shape[2]]
        centre, half = (box[:2] + np.stack([x, y])) * stride, np.exp(box[2:]) * stride / 2
        boxes += np.concatenate([centre - half, centre + half]).reshape(4, -1).T.tolist()
        probabilities = 1 / ((1 + np.exp(-classes)) * (1 + np.exp(-objects)))  # two sigmoids
        scores += probabilities.reshape(len(classes), -1).T.tolist()
    return np.array(boxes), np.array(scores)


def detect(path, photo):
    """Scores, boxes (x1, y1, x2, y2 in pixels of the photo) and class names, the best first."""
    about = json.loads(Path(path).with_suffix(".json").read_text())
    rule = about["postprocessing"]
    if not about["suppression"] and rule["head"] != "YOLOXHead":
        sys.exit(f"{path} returns what a {rule['head']} does; export it with --nms to get boxes.")
    image = cv2.imread(str(photo))
    if image is None:
        sys.exit(f"{photo} is no image that OpenCV can read.")
    image, scales = prepared(image, about["preprocessing"], about["input"])
    options = onnxruntime.SessionOptions()
    # Without VNNI, sums of 8-bit products overflow in ONNX Runtime's fast kernels.
    options.add_session_config_entry("session.x64quantprecision", "1")
    outputs = onnxruntime.InferenceSession(path, options).run(None, {"image": image})
    if about["suppression"]:
        boxes, best, labels = outputs
    else:
        boxes, scores = yolox(outputs, rule["strides"])
        best, labels = scores.max(axis=1), scores.argmax(axis=1)
        corners = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
        least, overlap = rule["score_threshold"], rule["nms"]["iou_threshold"]
        groups = labels * rule["nms"]["class_by_class"]
        kept = np.array(cv2.dnn.NMSBoxesBatched(corners, best, groups, least, overlap), int)
        boxes, best, labels = boxes[kept], best[kept], labels[kept]
    return best, boxes / np.tile(scales, 2), [about["classes"][label] for label in labels]


if __name__ == "__main__":
    for score, box, name in zip(*detect(*sys.argv[1:3]), strict=True):
        print(f"{score:.3f} {name} {box.round(1)}")
