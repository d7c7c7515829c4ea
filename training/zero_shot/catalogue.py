"""Which published datasets encoders are scored on, and which of our encoders each one is for.

Loads without PyTorch, as Dagster's definitions read it; what is done with a dataset is in benchmarks.py.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class BenchmarkDataset:
    """A dataset that encoders are scored on.

    Attributes:
        sensor: whose encoder it is for.
        level: of the encoder.
        prompts: prompt set that goes with it; of questions, what their images show besides what is asked about.
    """

    sensor: str
    level: Literal["image", "pixel"]
    prompts: str


DATASETS = {
    "eurosat": BenchmarkDataset("sentinel2", "image", "eurosat"),
    "bigearthnet": BenchmarkDataset("sentinel2", "image", "bigearthnet"),
    "bigearthnet43": BenchmarkDataset("sentinel2", "image", "bigearthnet43"),
    "sat4": BenchmarkDataset("naip", "image", "sat4"),
    "sat6": BenchmarkDataset("naip", "image", "sat6"),
    "naip_osm": BenchmarkDataset("naip", "image", "naip_osm"),
    "naip_osm_single": BenchmarkDataset("naip", "image", "naip_osm"),
    "satlas_naip": BenchmarkDataset("naip", "pixel", "satlas"),
    "satlas_sentinel2": BenchmarkDataset("sentinel2", "pixel", "satlas"),
    "rsvqa_lr": BenchmarkDataset("sentinel2", "pixel", "naip_osm"),
    "rsvqa_hr": BenchmarkDataset("naip", "pixel", "naip_osm"),
    "rsvqa_hr_phili": BenchmarkDataset("naip", "pixel", "naip_osm"),
}
