"""One typed settings object for a whole deployment, read from the environment and an optional env file.

Secrets are SecretStr and come from nowhere else. What single assets may be asked in a run is in assets/.
"""

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dotenv import dotenv_values
from pydantic import BaseModel, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pydantic_settings import SettingsError as SourceError

from graft_pipeline.errors import InputError, SettingsError
from graft_pipeline.imagery import SENSORS, Sensor, Source


class SensorSettings(BaseModel, extra="forbid"):
    """A sensor of a deployment's own, spelled as JSON; fields as in `graft_pipeline.imagery.Sensor`.

    A standard sensor's name takes its record and changes the fields that are given:
    `[{"name": "naip"}, {"name": "sentinel2", "cloud_rule": "chip"}]`.
    """

    name: str
    collection: str | None = None
    bands: tuple[str, str, str] | None = None
    gsd_m: float | None = None
    chip_px: int = Sensor.chip_px
    crop_px: int = Sensor.crop_px
    display_range: tuple[float, float] | None = Sensor.display_range
    scene_choice: Literal["newest", "closest"] = Sensor.scene_choice
    cloud_property: str | None = Sensor.cloud_property
    max_cloud_pct: float | None = Sensor.max_cloud_pct
    cloud_rule: Literal["scene", "chip"] = Sensor.cloud_rule
    mask_band: str | None = Sensor.mask_band
    cloud_classes: tuple[int, ...] = Sensor.cloud_classes
    max_scene_cloud_pct: float | None = Sensor.max_scene_cloud_pct
    raw_bands: tuple[str, ...] = Sensor.raw_bands
    listed_from: str = Sensor.listed_from
    token_url: str | None = Sensor.token_url
    offset: int = Sensor.offset

    def record(self, standard: dict[str, Sensor]) -> Sensor:
        """The sensor's record.

        Args:
            standard: records by name that a sensor of that name starts from.

        Raises:
            InputError: if no chip could be cut with it.
        """
        given = self.model_dump(exclude_unset=True)
        if self.name in standard:
            return replace(standard[self.name], **given)
        missing = [name for name in ("collection", "bands", "gsd_m") if given.get(name) is None]
        if missing:
            raise InputError(f"Sensor {self.name!r} in GRAFT_SENSORS: give {', '.join(missing)}.")
        return Sensor(**given)


class PlanetSettings(BaseModel, extra="forbid"):
    """The embedded world that answers when no key is set."""

    #: Which planet: two seeds are two different worlds.
    seed: int = 0
    #: A planet that runs already (`graft planet serve`); unset, each run starts its own on a free port.
    url: str | None = None
    #: Added to each of its answers.
    latency_ms: float = Field(0.0, ge=0)
    #: Requests per second before the planet answers 429; unset: unlimited.
    quota: float | None = Field(None, gt=0)
    #: Share of requests answered with a fault.
    fault_rate: float = Field(0.0, ge=0, le=1)
    #: The planet's present, such as 2023-06-01; UTC unless it says otherwise. What is uploaded or acquired later
    #: does not exist yet. Unset: its last day, the end of 2023.
    now: datetime | None = None
    #: Real GeoTIFFs served as scenes: `{"naip": ["file.tif"]}`, keyed by a sensor's name.
    mounts: dict[str, list[str]] = Field(default_factory=dict)


class KubernetesSettings(BaseModel, extra="forbid"):
    """The pod that a training runs in, with `training_launcher` kubernetes."""

    #: Image in which this project is installed.
    image: str | None = None
    #: Unset: the namespace of the process that starts it, or `default`.
    namespace: str | None = None
    #: Requests and limits as Kubernetes spells them: `{"limits": {"nvidia.com/gpu": "4"}}`.
    resources: dict[str, dict[str, str]] = Field(default_factory=dict)
    #: Service account of the pod; unset: the namespace's default.
    service_account: str | None = None
    #: Secrets of the namespace that become environment variables: credentials of the object store.
    env_secrets: tuple[str, ...] = ()
    #: How often the pod's state is asked for.
    poll_interval_s: float = Field(10.0, gt=0)
    #: Anything else of a PodSpec: `{"nodeSelector": {"pool": "gpu"}}`.
    pod_spec: dict[str, Any] = Field(default_factory=dict)


class Settings(BaseSettings):
    """Settings of a deployment. Environment variables start with `GRAFT_`; nested ones join with `__`.

    `GRAFT_ENV_FILE` names the env file to read (default `.env` in the current folder).
    """

    model_config = SettingsConfigDict(env_prefix="GRAFT_", env_nested_delimiter="__", extra="ignore")

    #: Storage root: a folder, or any URL that fsspec opens (`s3://bucket/prefix`).
    root: str = "data"
    #: Side of a region in degrees.
    grid_deg: float = 1.0
    #: Seed of every random choice: the same seed, the same data.
    seed: int = Field(0, ge=0, lt=2**63)

    # --- Flickr ---
    #: API key of Flickr.
    flickr_key: SecretStr | None = None
    #: Secret of that key.
    flickr_secret: SecretStr | None = None
    #: Address of Flickr's API.
    flickr_url: str = "https://api.flickr.com/services/rest/"
    #: Where image URLs of Flickr's static hosts are fetched from; unset: from the URL as given.
    flickr_static_url: str | None = None
    #: Quota of the key; calls are spread evenly.
    flickr_calls_per_hour: int = Field(3600, gt=0)
    #: SQLite file, on a local disk, in which all runs share the pace of the key and keep it over restarts. Unset:
    #: one for each key in DAGSTER_HOME, or else in the user's state folder; on the planet, no pace is shared.
    flickr_pacing_file: Path | None = None
    #: Licences that are asked for, by Flickr's ids: `4,5,9,10`; empty: all. Kept as given in `license_id`.
    flickr_licenses: str = Field("", pattern=r"^(\d+(,\d+)*)?$")
    #: The least safe photos that are asked for. Flickr shows only safe ones to a key that no user has authorised.
    flickr_safe_search: Literal["safe", "moderate", "restricted"] = "safe"
    #: Longest wait for an answer; for a whole one, three times it.
    flickr_timeout_s: float = Field(30.0, gt=0)
    #: Searches of a region of the grid, at places sampled uniformly.
    search_locations_per_region: int = Field(100, gt=0)
    #: Radius of each search.
    search_radius_km: float = Field(2.0, gt=0, lt=32)
    #: First upload date that is asked for, YYYY-MM-DD.
    uploaded_from: str = "2004-02-10"
    #: Days after which a region is searched whole again, not only for what is new: photos are geotagged, moved and
    #: relicensed long after their upload. 0: never.
    whole_search_every_days: int = Field(180, ge=0)

    # --- images ---
    #: Hosts that ground images are fetched from, with their subdomains; at public addresses, except on the planet.
    image_hosts: tuple[str, ...] = ("staticflickr.com",)
    #: Images that are fetched at a time.
    image_concurrency: int = Field(16, gt=0)
    #: Requests a second to one image host.
    image_requests_per_second: int = Field(50, gt=0)
    #: Longest wait for bytes of an image.
    image_timeout_s: float = Field(30.0, gt=0)
    #: Materialisations that try a photo or chip again before it is left alone.
    max_attempts: int = Field(5, gt=0)

    # --- Earth Engine ---
    #: Cloud project that is registered for Earth Engine.
    ee_project: str | None = None
    #: Key file of a service account; its content is never logged.
    ee_key_file: Path | None = None
    #: Address of Earth Engine's API.
    ee_url: str = "https://earthengine-highvolume.googleapis.com"
    #: Requests at a time; Earth Engine allows a project 40.
    ee_concurrency: int = Field(40, gt=0)
    #: Requests a second; Earth Engine allows a project 100.
    ee_requests_per_second: int = Field(100, gt=0)
    #: Longest wait for bytes of an answer.
    ee_timeout_s: float = Field(60.0, gt=0)

    # --- imagery ---
    #: Where scenes and chips come from: Earth Engine, a STAC API, or a folder of GeoTIFFs.
    imagery: Source = "earth_engine"
    #: Landing page of the STAC API.
    stac_url: str = "https://planetarycomputer.microsoft.com/api/stac/v1"
    #: Requests at a time.
    stac_concurrency: int = Field(16, gt=0)
    #: Requests a second.
    stac_requests_per_second: int = Field(100, gt=0)
    #: Longest wait for bytes of an answer.
    stac_timeout_s: float = Field(60.0, gt=0)
    #: Holds the sensors' collections as folders.
    imagery_folder: Path | None = None

    # --- models ---
    #: Architecture of open_clip, or `local-dir:/folder` for a model in a folder.
    foundation_architecture: str = "ViT-B-16"
    #: Its pretrained tag or checkpoint file.
    foundation_pretrained: str | None = "openai"
    #: `zero_shot` on the cached foundation embeddings, or `checkpoint`: ResNet-18 weights in scene_checkpoint, on the
    #: planet by default those of its asset torchvision/scene_classifier.
    scene_classifier: Literal["zero_shot", "checkpoint"] = "zero_shot"
    #: Weights of the ResNet-18, for `checkpoint`.
    scene_checkpoint: Path | None = None
    #: Score from which on a photo counts as taken outdoors.
    outdoor_threshold: float = Field(0.5, ge=0, le=1)

    #: Training recipe; unset: the paper's in production, the small one on the planet. `smoke` only tests machinery.
    recipe: Literal["paper", "planet", "smoke"] | None = None
    #: Where encoders are trained: a process on this machine, or a pod (extra `k8s`).
    training_launcher: Literal["subprocess", "kubernetes"] = "subprocess"
    #: Processes of one training, under torchrun if more than one: as a rule one per GPU.
    training_processes: int = Field(1, gt=0)
    kubernetes: KubernetesSettings = KubernetesSettings()
    #: West, south, east, north of ground that is only evaluated on; on the planet.
    benchmark_bounds: tuple[float, float, float, float] = (-71.0, 43.0, -70.0, 43.75)

    # --- evaluation ---
    #: OpenStreetMap extract (.osm.pbf, .osm, or JSON of Overpass) that tiles are labelled from, for NAIP-OSM.
    osm_file: Path | None = None
    #: Where published datasets lie, by name: `{"eurosat": "/data/EuroSAT"}`; each becomes an asset of `evaluation`.
    evaluation_data: dict[str, Path] = Field(default_factory=dict)

    # --- concept maps ---
    #: What is mapped as assets, in words: `["farmland", "a solar farm"]`; unset: nothing, on the planet its classes.
    concepts: tuple[str, ...] = ()
    #: H3 resolution of the maps' hexagons; 7 is 5 km2 a cell.
    concept_resolution: int = Field(7, ge=3, le=10)

    # --- questions ---
    #: Any OpenAI-compatible endpoint whose model writes programs for questions, such as http://localhost:11434/v1;
    #: unset: questions of the embedded grammar only.
    answer_url: str | None = None
    #: Name of the model there; needed with answer_url.
    answer_model: str | None = None
    #: Sent as bearer token, where the endpoint asks for one.
    answer_key: SecretStr | None = None
    #: Longest program that the model may write.
    answer_max_tokens: int = Field(400, gt=0)
    #: Limit of a whole answer of the model.
    answer_timeout_s: float = Field(60.0, gt=0)

    # --- pairs ---
    #: Sensors of the deployment, as JSON; unset: `naip` and `sentinel2`.
    sensors: tuple[SensorSettings, ...] = ()
    #: Photos that a tile keeps at most, drawn by a hash of their ids.
    photos_per_tile: int = Field(25, gt=0)
    #: How tiles are chosen; `random` and `per_quarter` are for comparison.
    sampling: Literal["non_overlapping", "random", "per_quarter"] = "non_overlapping"
    #: Share of the ground's blocks that training leaves out.
    validation_fraction: float = Field(0.1, gt=0, lt=1)

    # --- grid ---
    #: By sensor, distance of grid tiles in metres, such as `{"naip": 448}`: chips and embeddings over all of the areas,
    #: for search and maps, not only where photos are. Unset: none. Each tile costs a request for imagery.
    grid_stride_m: dict[str, float] = Field(default_factory=dict)

    # --- incremental collection ---
    #: Hours between two ticks of the schedule `collect_stale_regions`; divides a day.
    schedule_every_hours: int = Field(1, ge=1, le=24)
    #: Share of Flickr's quota that its ticks give out; the rest is left to people.
    schedule_quota_share: float = Field(0.9, gt=0, le=1)
    #: Regions that it lets wait or run at a time.
    schedule_max_regions: int = Field(50, gt=0)
    #: How long a search is good for: the schedule leaves the region alone meanwhile.
    schedule_fresh_days: float = Field(7.0, gt=0)
    #: The least time between two training sets, and between two trainings of an encoder, by `train_on_change`.
    training_min_interval_hours: float = Field(24.0, gt=0)

    # --- search page ---
    #: What `graft serve` draws its map on: an XYZ URL such as `https://maps.example.org/{z}/{x}/{y}.png`, whose terms
    #: allow it. Unset: the planet's own ground, in production a plain background with the regions' borders.
    basemap_url: str | None = Field(None, pattern=r"^https?://[^/\s'\";,?#]+/[^\s'\";,]*$")
    #: Whom the base map's terms want named, in plain text.
    basemap_attribution: str = ""

    #: None: production if keys are set, the planet if none is.
    world: Literal["production", "planet"] | None = None
    planet: PlanetSettings = PlanetSettings()

    @field_validator("image_hosts")
    @classmethod
    def _hosts_are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if bad := [host for host in value if not re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", host)]:
            raise ValueError(f"{', '.join(bad)} is no host name such as staticflickr.com")
        return value

    @field_validator("grid_deg")
    @classmethod
    def _grid_divides_a_degree(cls, value: float) -> float:
        if value not in (1.0, 0.5, 0.25):
            raise ValueError("grid_deg must be 1, 0.5 or 0.25")
        return value

    @field_validator("schedule_every_hours")
    @classmethod
    def _ticks_divide_a_day(cls, value: int) -> int:
        if 24 % value:
            raise ValueError("schedule_every_hours must divide 24: 1, 2, 3, 4, 6, 8, 12 or 24")
        return value

    @model_validator(mode="after")
    def _keys_fit_the_world(self) -> "Settings":
        keys: dict[str, SecretStr | str | None] = {
            "GRAFT_FLICKR_KEY": self.flickr_key,
            "GRAFT_FLICKR_SECRET": self.flickr_secret,
        }
        if self.imagery == "earth_engine":
            keys["GRAFT_EE_PROJECT"] = self.ee_project
        missing = [name for name, value in keys.items() if value is None]
        wants_production = self.world == "production" or (self.world is None and len(missing) < len(keys))
        if wants_production and missing:
            raise ValueError(
                f"{', '.join(missing)} not set: set all of {', '.join(keys)} for the real services, "
                "or none of them (or GRAFT_WORLD=planet) for the embedded planet"
            )
        return self

    @field_validator("basemap_url")
    @classmethod
    def _a_base_map_has_tiles(cls, value: str | None) -> str | None:
        if value is not None and not all(part in value for part in ("{z}", "{x}", "{y}")):
            raise ValueError("basemap_url must hold {z}, {x} and {y}")
        return value

    @model_validator(mode="after")
    def _a_pod_has_an_image(self) -> "Settings":
        if self.training_launcher == "kubernetes" and not self.kubernetes.image:
            raise ValueError(
                "GRAFT_TRAINING_LAUNCHER=kubernetes needs GRAFT_KUBERNETES__IMAGE, an image with this project"
            )
        return self

    @model_validator(mode="after")
    def _an_endpoint_has_a_model(self) -> "Settings":
        if self.answer_url and not self.answer_model:
            raise ValueError("GRAFT_ANSWER_URL needs GRAFT_ANSWER_MODEL, a model of that endpoint")
        return self

    @model_validator(mode="after")
    def _a_grid_has_a_sensor(self) -> "Settings":
        unknown = sorted(set(self.grid_stride_m) - set(self.sensor_records)) if self.grid_stride_m else []
        if unknown:
            raise ValueError(
                f"GRAFT_GRID_STRIDE_M names {', '.join(unknown)}: use sensors of {', '.join(self.sensor_records)}"
            )
        return self

    @property
    def is_planet(self) -> bool:
        """Whether this deployment talks to the embedded planet."""
        return self.world == "planet" or (self.world is None and self.flickr_key is None)

    @property
    def training_recipe(self) -> str:
        """Name of the recipe that training assets use (training/recipes.py)."""
        return self.recipe or ("planet" if self.is_planet else "paper")

    @property
    def uses_planet_scenes(self) -> bool:
        """Whether photos are scored by the ResNet-18 that the planet trains as an asset."""
        return self.is_planet and self.scene_classifier == "checkpoint" and self.scene_checkpoint is None

    @cached_property
    def sensor_records(self) -> dict[str, Sensor]:
        """The deployment's sensors by name: NAIP and Sentinel-2, unless `sensors` lists others."""
        standard = {sensor.name: sensor for sensor in SENSORS[self.imagery]}
        own = [sensor.record(standard) for sensor in self.sensors]
        return {sensor.name: sensor for sensor in own} or standard


def load_settings() -> Settings:
    """Read the settings.

    Returns:
        The validated settings of this process's environment.

    Raises:
        SettingsError: if a variable does not obey the rules above, or is nearly one of them, or the file that
            GRAFT_ENV_FILE names is not there; no value of a secret is repeated.
    """
    env_file = os.environ.get("GRAFT_ENV_FILE", ".env")
    # Without it a deployment would talk to another world, and write elsewhere.
    if env_file not in ("", ".env", os.devnull) and not Path(env_file).is_file():
        raise SettingsError(f"There is no file {env_file} to read settings from: correct GRAFT_ENV_FILE.")
    try:
        _refuse_misspelt([*os.environ, *dotenv_values(env_file or os.devnull)])
        return Settings(_env_file=env_file)  # type: ignore[call-arg]
    except (SourceError, UnicodeDecodeError, OSError) as error:
        # Neither the error nor its cause repeats the value.
        if field := re.search(r'for field "(\w+)"', str(error)):
            what = f"GRAFT_{field[1].upper()} is no JSON such as [1, 2] ({error.__cause__})"
        else:
            what = f"{env_file} is no env file ({error})"
        raise SettingsError(
            f"Settings are not usable: {what}. Correct the environment or {env_file}."
        ) from None
    except ValidationError as error:
        problems = "; ".join(
            f"GRAFT_{'__'.join(str(part) for part in item['loc']).upper()}: {item['msg']}"
            if item["loc"]
            else item["msg"]
            for item in error.errors(include_input=False, include_url=False)
        )
        raise SettingsError(
            f"Settings are not usable: {problems}. Correct the environment or {env_file}."
        ) from None


def _refuse_misspelt(names: Iterable[str]) -> None:
    """Refuse variables that are nearly a setting; others that begin alike may be anybody's.

    Kubernetes makes some in every pod: `GRAFT_DAGSTER_WEBSERVER_PORT`.
    """
    known = ["GRAFT_ENV_FILE", *(f"GRAFT_{name.upper()}" for name in Settings.model_fields)]
    for name in names:
        top = name.upper().partition("__")[0]
        near = difflib.get_close_matches(top, known, n=1, cutoff=0.85)
        if top.startswith("GRAFT_") and top not in known and near:
            raise SettingsError(f"{name} is no setting, and would do nothing: did you mean {near[0]}?")
