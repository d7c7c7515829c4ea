"""What the weights file of a scene classifier says about itself: its classes, its preprocessing, how good it is.

Weights are written in training/scenes.py and loaded in resources/scene_classifier.py; neither knows the other.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graft_pipeline.errors import InputError

#: The one metadata entry of our files: safetensors writes several entries in any order, and same input is same bytes.
ENTRY = "scene_classifier"
#: The entry that makes a file of others usable: a JSON list of class numbers.
OUTDOOR_ENTRY = "outdoor_classes"

#: Mean and standard deviation of ImageNet's pixels (RGB, 0 to 1): what torchvision's weights are trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class SceneHeader:
    """The metadata of a safetensors file of torchvision's resnet18.

    A file of others may lack it: two classes are indoor and outdoor, more need the entry `outdoor_classes`, and
    pixels are ImageNet's.

    Attributes:
        classes: names of the classes, in the order of the outputs.
        outdoor_classes: numbers of the classes that show the outdoors.
        resize_px: the shorter side is made so long.
        crop_px: side of the central square that the network sees.
        mean: RGB, of pixels from 0 to 1.
        std: RGB, of pixels from 0 to 1.
        accuracy: share of validation images whose side (indoor, outdoor) it finds; None if not known.
        balanced_accuracy: mean of both sides' shares; None if not known.
        facts: whatever else its reader may want to know, as JSON: data, counts, configuration.
    """

    classes: tuple[str, ...]
    outdoor_classes: tuple[int, ...]
    resize_px: int = 256
    crop_px: int = 224
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    accuracy: float | None = None
    balanced_accuracy: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no classifier can mean."""
        count = len(self.classes)
        if not self.outdoor_classes:
            raise InputError(
                f"The file has {count} classes and does not say which are outdoors: add the metadata entry "
                "`outdoor_classes`, a JSON list of class numbers."
            )
        if not all(isinstance(n, int) and 0 <= n < count for n in self.outdoor_classes):
            raise InputError(f"outdoor_classes {list(self.outdoor_classes)} must be numbers below {count}.")
        if not 0 < self.crop_px <= self.resize_px:
            raise InputError(
                f"crop_px {self.crop_px} must be positive and at most resize_px {self.resize_px}."
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError("mean and std must have three numbers each, those of std positive.")

    @property
    def preprocessing(self) -> tuple[Any, ...]:
        """What an image goes through, for fingerprints."""
        return (self.resize_px, self.crop_px, self.mean, self.std)

    def to_metadata(self) -> dict[str, str]:
        """The file's metadata; safetensors keeps strings only."""
        return {ENTRY: json.dumps(asdict(self), sort_keys=True)}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], class_count: int) -> "SceneHeader":
        """Read the entries of a file.

        Args:
            metadata: the file's metadata; entries of other names are ignored.
            class_count: outputs of its network.

        Returns:
            The header, with defaults for what the file does not say.

        Raises:
            InputError: if an entry is no JSON, does not fit, or many classes lack `outdoor_classes`.
        """
        outdoor = "[1]" if class_count == 2 else "[]"
        names = ["indoor", "outdoor"] if class_count == 2 else [f"class {n}" for n in range(class_count)]
        try:
            fields: dict[str, Any] = {
                "classes": names,
                "outdoor_classes": json.loads(metadata.get(OUTDOOR_ENTRY, outdoor)),
                **json.loads(metadata.get(ENTRY, "{}")),
            }
            fields = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
            header = cls(**fields)
        except (json.JSONDecodeError, TypeError) as error:
            raise InputError(f"Its metadata cannot be read ({error}): write it again.") from error
        if len(header.classes) != class_count:
            raise InputError(
                f"It names {len(header.classes)} classes and has {class_count} outputs: write it again."
            )
        return header
