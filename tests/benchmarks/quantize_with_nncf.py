# /// script
# dependencies = ["nncf==3.4.0", "openvino==2026.4.1", "numpy"]
# ///
"""Quantize an ONNX file with NNCF's defaults for OpenVINO; run by bench_exports.py with a Python that has both.

python quantize_with_nncf.py model.onnx images.npy output.xml
"""

import sys

import nncf
import numpy as np
import openvino

source, images, output = sys.argv[1:]
inputs = [{"image": image[None]} for image in np.load(images, mmap_mode="r")]
model = openvino.Core().read_model(source)
quantized = nncf.quantize(model, nncf.Dataset(inputs), subset_size=len(inputs))
openvino.save_model(quantized, output, compress_to_fp16=False)
