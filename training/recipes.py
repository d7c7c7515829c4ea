"""Recipes that are known to work: the paper's, the planet's small models, and one that only tests machinery.

What the fields mean is said in loop.py and foundation.py; `dataclasses.replace` changes single ones.
"""

from dataclasses import dataclass, replace
from typing import Literal

from graft_pipeline.imagery import Sensor
from training.foundation import FoundationConfig
from training.loop import TrainConfig
from training.scenes import SceneConfig

#: ViT-B/16 from OpenAI's CLIP, at most 25 photos a tile (paper, sections 3.2 and 3.4); ten epochs of AdamW with
#: weight decay 0.01, linear warm-up and cosine, which are the defaults of TrainConfig.
PAPER_IMAGE = TrainConfig(level="image", learning_rate=1e-5, precision="bf16")
PAPER_PIXEL = TrainConfig(level="pixel", learning_rate=5e-5, precision="bf16")

#: The small CLIP that stands in for OpenAI's on the planet.
PLANET_FOUNDATION = FoundationConfig()

#: The small encoders learn at a hundred times the paper's rate; small shifts keep the few photos in their crops.
PLANET_IMAGE = TrainConfig(
    level="image",
    steps=200,
    batch_tiles=64,
    photos_per_tile=5,
    learning_rate=2e-3,
    warmup_steps=20,
    weight_decay=0.05,
    max_shift=0.15,
    validate_every=50,
    # Some fifty tiles of Sentinel-2 validate: their least loss once chose weights from the schedule's peak.
    keep="last",
)
PLANET_PIXEL = replace(PLANET_IMAGE, level="pixel")

#: ResNet-18 at the size that ImageNet's is trained at.
PAPER_SCENES = SceneConfig()

#: The planet's scenes are simple: a fifth of a minute of two cores finds their side in 99 of 100.
PLANET_SCENES = SceneConfig(crop_px=32, resize_px=32, epochs=4, learning_rate=2e-3, weights="scratch")

#: Seconds; the models it gives know nothing.
SMOKE_FOUNDATION = FoundationConfig(
    width=32, head_width=16, vision_layers=1, text_layers=1, steps=4, batch_size=16
)
SMOKE_IMAGE = replace(PLANET_IMAGE, steps=4, batch_tiles=8, warmup_steps=1, validate_every=2)
SMOKE_PIXEL = replace(SMOKE_IMAGE, level="pixel")
SMOKE_SCENES = replace(PLANET_SCENES, epochs=1)


@dataclass(frozen=True)
class Recipe:
    """All configurations of a deployment.

    Attributes:
        image: of image-level encoders.
        pixel: of pixel-level encoders.
        foundation: of the planet's foundation model.
        captioned_photos: how many photos the planet's foundation model learns from.
        scenes: of the scene classifier.
        scene_photos: how many photos the planet's scene classifier learns from and is measured on.
    """

    image: TrainConfig
    pixel: TrainConfig
    foundation: FoundationConfig = PLANET_FOUNDATION
    captioned_photos: int = 12_000
    scenes: SceneConfig = PAPER_SCENES
    scene_photos: int = 2500

    def encoder(
        self,
        level: Literal["image", "pixel"],
        sensor: Sensor,
        architecture: str,
        pretrained: str | None,
        seed: int = 0,
    ) -> TrainConfig:
        """The configuration of one encoder.

        Args:
            level: `image` or `pixel`.
            sensor: whose chips it sees.
            architecture: foundation model that it starts from, as in `encoders.load_clip`.
            pretrained: its weights.
            seed: seed of the training.

        Returns:
            The configuration.
        """
        config = self.image if level == "image" else self.pixel
        return replace(config, sensor=sensor, architecture=architecture, pretrained=pretrained, seed=seed)


RECIPES = {
    "paper": Recipe(PAPER_IMAGE, PAPER_PIXEL),
    "planet": Recipe(PLANET_IMAGE, PLANET_PIXEL, scenes=PLANET_SCENES),
    "smoke": Recipe(
        SMOKE_IMAGE,
        SMOKE_PIXEL,
        SMOKE_FOUNDATION,
        captioned_photos=64,
        scenes=SMOKE_SCENES,
        scene_photos=100,
    ),
}
