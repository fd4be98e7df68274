"""Search for better settings of a quantization."""
