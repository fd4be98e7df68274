"""Data sets: sources of images, and the choice of images for calibration and evaluation."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Strict,
    Tag,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from .names import Name
from .section import OWN, Flag, Foreign, Nested, Seed, Text, raise_problems, section, sentences


def check_address(text: str) -> str:
    """Check an http(s) address and return it.

    Raises:
        ValueError: it is not valid.
    """
    if not text.startswith(("http://", "https://")):
        raise ValueError("it should be an address that starts with http:// or https://")
    try:
        parts = urlsplit(text)
        sound = bool(parts.hostname) and parts.port != 0  # port raises for one that is no number
    except ValueError:
        sound = False
    if not sound or re.search(r"\s", text):
        raise ValueError("it should be a valid address")
    return text


Address = Annotated[Text, AfterValidator(check_address)]
Exif = Literal["apply", "ignore"]
Part = Literal["calibration", "evaluation"]
PARTS: tuple[Part, ...] = get_args(Part)
Images = Annotated[int, Strict(), Field(ge=1, le=10_000_000)]
Count = Images | Literal["all"]

# Types of keys that several sections share include the key's description, since docstrings are not inherited.
DrawnSplit = Annotated[Name, Field(description="Name of the split.")]
Drawn = Annotated[Images, Field(description="How many images.")]
CocoSplit = Annotated[
    Name,
    Field(
        description="Name of the split. It also gives the default names of the annotation file and the image "
        "folder."
    ),
]
Chosen = Annotated[Count, Field(description="How many images, or `all`.")]
Draw = Annotated[
    int,
    Strict(),
    Field(
        ge=1,
        le=10_000,
        description="Number of the draw: different draws give different images, as long as there are enough. "
        "Further `repeats` use the next numbers.",
    ),
]
AnnotationFile = Annotated[
    Text | None,
    Field(
        description="Annotation file under the root. Default: `annotations/instances_{split}.json`."
    ),
]
ImageFolder = Annotated[
    Text | None, Field(description="Image folder under the root. Default: `{split}`.")
]


@section
class ShapesCalibration:
    """Images for ranges and compensation."""

    split: DrawnSplit = "calibration"
    images: Drawn = 128
    draw: Draw = 1


@section
class ShapesEvaluation:
    """Images for AP."""

    split: DrawnSplit = "val"
    images: Drawn = 300


@section
class Shapes:
    """Generated images, which need no download."""

    type: Literal["shapes"]
    """`shapes` is generated and needs no download; `coco` is any data set in COCO's format."""
    seed: Seed = 0
    """Seed of the choice of images and of their generation."""
    calibration: Annotated[ShapesCalibration, Nested] = Field(default_factory=ShapesCalibration)
    """Images for ranges and compensation."""
    evaluation: Annotated[ShapesEvaluation, Nested] = Field(default_factory=ShapesEvaluation)
    """Images for AP."""


@section
class CocoPart:
    """Images of a split."""

    split: CocoSplit
    images: Chosen
    annotations: AnnotationFile = None
    image_folder: ImageFolder = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        """Fill in default names from the split's name."""
        if self.annotations is None:
            object.__setattr__(self, "annotations", f"annotations/instances_{self.split}.json")
        if self.image_folder is None:
            object.__setattr__(self, "image_folder", self.split)
        return self


@section
class CocoCalibration(CocoPart):
    """Images for ranges and compensation."""

    split: CocoSplit = "train2017"
    images: Chosen = 512
    draw: Draw = 1


@section
class CocoEvaluation(CocoPart):
    """Images for AP."""

    split: CocoSplit = "val2017"
    images: Chosen = "all"


@section
class Coco:
    """A data set in COCO's format: a local folder, or one that is downloaded."""

    type: Literal["coco"]
    """`shapes` is generated and needs no download; `coco` is any data set in COCO's format."""
    seed: Seed = 0
    """Seed of the choice of images."""
    root: Text | None = None
    """Local folder with the annotation files and image folders."""
    url: Address | None = None
    """Address to download from, in place of a root. Annotations come from
    `{url}/annotations/annotations_trainval2017.zip`, chosen images from `{url}/{split}/`."""
    exif: Exif = "apply"
    """How images with an EXIF rotation are read in calibration, evaluation and pictures. `apply`: rotated, as
    MMDetection does. `ignore`: as stored, if sizes and boxes refer to the stored pixels."""
    allow_outside_root: Flag = False
    """Allow images outside of the root, by `../`, an absolute name or a link."""
    calibration: Annotated[CocoCalibration, Nested] = Field(default_factory=CocoCalibration)
    """Images for ranges and compensation."""
    evaluation: Annotated[CocoEvaluation, Nested] = Field(default_factory=CocoEvaluation)
    """Images for AP."""

    @model_validator(mode="after")
    def _one_place(self) -> "Coco":
        if (self.root is None) == (self.url is None):
            has = "neither root nor url" if self.root is None else "both root and url"
            raise ValueError(
                f"there is {has}; give either root (a local folder) or url (to download from)."
            )
        return self


@section
class OwnSource:
    """A data set that comes from a source in the user's own module."""

    type: Annotated[Foreign, WithJsonSchema({"type": "string", "pattern": r".\..*"})]
    """Name of the registered source, which starts with its module: `mylab.voc` is registered by the module
    `mylab`, which must be importable."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the source, unchecked."""
    seed: Seed = 0
    """Seed of the choice of images."""
    exif: Exif = "apply"
    """As for `coco`."""
    calibration: Annotated[CocoCalibration, Nested] = Field(default_factory=CocoCalibration)
    """Images for ranges and compensation."""
    evaluation: Annotated[CocoEvaluation, Nested] = Field(default_factory=CocoEvaluation)
    """Images for AP."""


def _kind(value: Any) -> Any:
    """The section of a data set: its type, or ``OWN``."""
    type_ = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return OWN if isinstance(type_, str) and "." in type_ else type_


Dataset = Annotated[
    Annotated[
        Annotated[Shapes, Tag("shapes")]
        | Annotated[Coco, Tag("coco")]
        | Annotated[OwnSource, Tag(OWN)],
        Discriminator(_kind),
    ],
    Nested,
]


def of_repeat(settings: Mapping[str, Any], name: str) -> tuple[dict[str, Any], Part]:
    """The settings and the part that a name of a part, perhaps with the number of a repeat, refers to.

    Args:
        settings: resolved, of a data set.
        name: ``calibration``, ``evaluation``, or ``calibration@2`` for the images of the second repeat.

    Returns:
        The data set's settings with the draw of that repeat, and the part.
    """
    part, _, number = name.partition("@")
    calibration = settings["calibration"]
    draw = calibration["draw"] + int(number or 1) - 1
    return (
        {**settings, "calibration": {**calibration, "draw": draw}},
        "evaluation" if part == "evaluation" else "calibration",
    )


_DATASET: TypeAdapter[Shapes | Coco | OwnSource] = TypeAdapter(Dataset)


def parse_dataset(settings: Mapping[str, Any]) -> Shapes | Coco | OwnSource:
    """Return the section of a data set's entry, with all defaults filled in.

    Raises:
        QwtError: a key or a value is not allowed.
    """
    try:
        return _DATASET.validate_python(settings)
    except ValidationError as error:
        raise_problems(sentences(error, Dataset))
        raise  # not reached: there is at least one problem
