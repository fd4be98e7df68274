"""Detectors as files that runtimes with integer kernels run: ONNX graph, description, runtimes."""
