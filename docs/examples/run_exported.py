"""Run an exported YOLOX with onnxruntime, numpy and OpenCV: run_exported.py model.onnx photo.jpg"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime


def detect(path, photo):
    """Scores, boxes (x1, y1, x2, y2 in pixels of the photo) and class names, the best first."""
    about = json.loads(Path(path).with_suffix(".json").read_text())
    rule, (height, width) = about["postprocessing"], about["input"]["size"]
    image = cv2.imread(str(photo))  # BGR, as the file wants it
    scale = min(height / image.shape[0], width / image.shape[1])
    sides = [int(side * scale + 0.5) for side in image.shape[1::-1]]
    square = np.full((height, width, 3), about["preprocessing"]["pad"]["value"], np.float32)
    square[: sides[1], : sides[0]] = cv2.resize(image, sides)
    outputs = onnxruntime.InferenceSession(path).run(None, {"image": cv2.dnn.blobFromImage(square)})
    scores, boxes = [], []
    for level, stride in enumerate(rule["strides"]):
        classes, box, objects = (values[0] for values in outputs[level :: len(rule["strides"])])
        y, x = np.mgrid[: box.shape[1], : box.shape[2]]
        centre, half = (box[:2] + np.stack([x, y])) * stride, np.exp(box[2:]) * stride / 2
        boxes += np.concatenate([centre - half, centre + half]).reshape(4, -1).T.tolist()
        probabilities = 1 / ((1 + np.exp(-classes)) * (1 + np.exp(-objects)))  # two sigmoids
        scores += probabilities.reshape(len(classes), -1).T.tolist()
    boxes = np.array(boxes) / np.tile(np.divide(sides, image.shape[1::-1]), 2)
    best, labels = np.max(scores, axis=1), np.argmax(scores, axis=1)
    corners = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
    least, overlap = rule["score_threshold"], rule["nms"]["iou_threshold"]
    kept = np.array(cv2.dnn.NMSBoxesBatched(corners, best, labels, least, overlap), int)
    return best[kept], boxes[kept], [about["classes"][label] for label in labels[kept]]


if __name__ == "__main__":
    for score, box, name in zip(*detect(*sys.argv[1:3]), strict=True):
        print(f"{score:.3f} {name} {box.round(1)}")
