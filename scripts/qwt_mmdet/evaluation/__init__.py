"""COCO metrics of detectors, with confidence intervals."""
