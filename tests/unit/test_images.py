"""Images are checked and drawn as MMDetection's own loader reads them."""

import io

import mmcv
import numpy as np
import pytest
from PIL import Image
from qwt_mmdet.data.images import check_image, read_image
from qwt_mmdet.errors import QwtError

WIDTH, HEIGHT = 24, 16
FLAGS = {"apply": "color", "ignore": "color_ignore_orientation"}


def picture(mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(0)
    if mode == "F":
        return Image.fromarray(generator.random((HEIGHT, WIDTH)).astype(np.float32))
    if mode in ("I", "I;16"):
        kind = np.int32 if mode == "I" else np.uint16
        return Image.fromarray(generator.integers(0, 60000, (HEIGHT, WIDTH)).astype(kind))
    pixels = generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def stored(kind: str, image: Image.Image | None = None, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = io.BytesIO()
    (image or picture()).save(content, kind, **({"exif": exif} if orientation != 1 else {}))
    return content.getvalue()


either = pytest.mark.parametrize("exif", ["apply", "ignore"])


@either
@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
        *(("TIFF", mode) for mode in ("L", "RGB", "CMYK", "I;16", "I", "F")),
        *(("GIF", "P"), ("WEBP", "RGB"), ("BMP", "RGB"), ("PPM", "RGB"), ("JPEG2000", "RGB")),
        *(("AVIF", "RGB"), ("TGA", "RGB"), ("PCX", "RGB"), ("ICO", "RGB"), ("SGI", "RGB")),
    ],
)
def test_what_the_loader_cannot_read_is_refused_and_all_else_is_as_it_reads_it(
    tmp_path, kind, mode, exif
):
    content = stored(kind, picture(mode))
    path = tmp_path / "image"
    path.write_bytes(content)
    expected = mmcv.imfrombytes(content, flag=FLAGS[exif], backend="cv2")
    if expected is None:
        with pytest.raises(QwtError, match="image cannot be read by OpenCV, with which"):
            check_image(path, WIDTH, HEIGHT, exif=exif)
        return
    assert np.array_equal(read_image(path, exif=exif), expected)
    assert check_image(path, WIDTH, HEIGHT, exif=exif) == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(2, 9))
@either
def test_an_orientation_is_applied_or_ignored_or_the_file_is_refused(
    tmp_path, kind, orientation, exif
):
    path = tmp_path / "image"
    path.write_bytes(stored(kind, orientation=orientation))
    sideways = orientation >= 5
    if (kind, exif) in (("TIFF", "ignore"), ("AVIF", "apply")):
        with pytest.raises(QwtError, match=rf"orientation {orientation}, which OpenCV .* {kind}"):
            check_image(path, WIDTH, HEIGHT, exif=exif)
        return
    size = (HEIGHT, WIDTH) if sideways and exif == "apply" else (WIDTH, HEIGHT)
    assert check_image(path, *size, exif=exif) == orientation
    pixels = mmcv.imfrombytes(stored(kind))
    assert np.array_equal(read_image(path, exif=exif), pixels) == (exif == "ignore")
    with pytest.raises(QwtError, match="pixels, but its annotation says") as caught:
        check_image(path, *size[::-1], exif=exif)
    can_choose = kind not in ("TIFF", "AVIF")
    assert ("it fits with exif" in str(caught.value)) == (sideways and can_choose)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_a_file_that_is_cut_is_found(tmp_path, kind):
    path = tmp_path / "image"
    path.write_bytes(stored(kind)[:-300])
    with pytest.raises(QwtError, match="image cannot be"):
        check_image(path, WIDTH, HEIGHT)


def test_size_of_an_image(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(stored("JPEG"))
    with pytest.raises(QwtError, match=r"a\.jpg is 24x16 pixels, but its annotation says 16x24"):
        check_image(path, HEIGHT, WIDTH)
    with pytest.raises(QwtError, match=r"absent\.jpg cannot be read"):
        read_image(tmp_path / "absent.jpg")
