"""Reading of image files as MMDetection's loader does, and their EXIF orientations.

The loader's default is ``mmcv.imfrombytes(content, flag="color", backend="cv2")``, which is OpenCV's
``imdecode``. It is called without mmcv, whose import takes longer than checking many images.
"""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ..config.datasets import Exif
from ..errors import QwtError

UPRIGHT = 1
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ORIENTATION = 0x0112  # EXIF tag
FLAGS = {
    "apply": cv2.IMREAD_COLOR,
    "ignore": cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION,
}
# Choices of ``exif`` that OpenCV supports, by format. It ignores orientations in other formats (AVIF, JPEG 2000).
CHOICES = {
    **dict.fromkeys(("JPEG", "MPO", "PNG", "WEBP"), ("apply", "ignore")),
    "TIFF": ("apply",),
}


def read_image(path: str | Path, *, exif: Exif = "apply") -> np.ndarray:
    """Read an image as the detector sees it.

    Args:
        exif: turn the image as its EXIF orientation says (``apply``), or leave it as stored.

    Returns:
        Pixels [height, width, 3], blue first, uint8.

    Raises:
        QwtError: the file is not there, or OpenCV cannot read it.
    """
    try:
        pixels = cv2.imdecode(np.frombuffer(Path(path).read_bytes(), np.uint8), FLAGS[exif])
    except (OSError, cv2.error) as error:
        raise QwtError(f"{path} cannot be read as an image ({str(error).strip()}).") from error
    if pixels is None:
        raise QwtError(
            f"{path} cannot be read by OpenCV, with which MMDetection loads images; convert it to "
            "JPEG or to PNG of 8 bits."
        )
    return pixels


def check_image(path: str | Path, width: int, height: int, *, exif: Exif = "apply") -> int:
    """Read a whole image file and compare its size with the annotation's.

    Args:
        width, height: size in pixels according to the annotation.
        exif: whether the model sees the image turned by its EXIF orientation.

    Returns:
        The EXIF orientation, 1 (upright) to 8.

    Raises:
        QwtError: Pillow or MMDetection's loader cannot decode the file, or it has another size.
    """
    try:
        with Image.open(path) as image:
            file_format = image.format
            orientation = image.getexif().get(ORIENTATION, UPRIGHT)
            image.load()  # OpenCV accepts truncated files
    except Exception as error:  # every decoder has errors of its own
        raise QwtError(f"{path} cannot be decoded as an image ({error}).") from error
    if orientation not in range(1, 9):  # invalid, which OpenCV treats as upright
        orientation = UPRIGHT
    pixels = read_image(path, exif=exif)
    found = pixels.shape[1::-1]
    choices = CHOICES.get(file_format or "", ("ignore",))
    other: Exif = "ignore" if exif == "apply" else "apply"
    turns = orientation != UPRIGHT and len(choices) == 2
    if turns and np.array_equal(pixels, read_image(path, exif=other)):
        orientation = UPRIGHT  # XMP, which only Pillow reads, or a symmetric image
    if orientation != UPRIGHT and exif not in choices:
        does = "always" if file_format == "TIFF" else "never"
        raise QwtError(
            f"{path} has the EXIF orientation {orientation}, which OpenCV {does} applies to {file_format} "
            f"files, so exif: {exif} cannot hold; store it upright, without an orientation."
        )
    if found != (width, height):
        turned = orientation in SIDEWAYS and found == (height, width) and len(choices) == 2
        how = "" if orientation == UPRIGHT else f" (EXIF orientation {orientation}, {exif})"
        fits = f"; it fits with exif: {other} of its data set" if turned else ""
        raise QwtError(
            f"{path}{how} is {found[0]}x{found[1]} pixels, but its annotation says {width}x{height}{fits}."
        )
    return orientation
