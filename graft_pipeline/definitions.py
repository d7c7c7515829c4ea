"""The composition root: which assets, jobs and resources a deployment has. Dagster loads `defs`.

Nothing is opened here: resources open when a run starts, and torch, earthengine-api and flickrapi load with them.
"""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.ablations import build_ablations
from assets.answering import build_answering_assets
from assets.areas import regions
from assets.concepts import build_concept_assets
from assets.evaluation import build_evaluation_assets
from assets.external import build_external_assets
from assets.grid import build_grid_assets
from assets.ground import (
    flickr_photos,
    ground_embeddings,
    ground_images_asset,
    outdoor_photos,
    search_locations,
)
from assets.learning import build_learning_assets
from assets.outdoor import outdoor_scores, planet_scene_classifier, scored_by_planet_scenes
from assets.planet import build_planet_assets, planet_foundation
from assets.search import build_search_assets
from assets.sensors import build_sensor_assets
from graft_pipeline.automation import build_jobs, build_schedules, build_sensors
from graft_pipeline.conditions import with_conditions, with_freshness
from graft_pipeline.errors import SettingsError
from graft_pipeline.imagery import ImagerySource
from graft_pipeline.progress import LogProgress
from graft_pipeline.settings import Settings, load_settings
from resources.flickr import FlickrClient
from resources.foundation import FoundationModel
from resources.imagery import open_imagery
from resources.images import ImageFetcher
from resources.scene_classifier import SceneClassifier, planet_checkpoint
from resources.storage import Storage
from resources.world import open_world


@dg.resource(
    description="Settings of the world this run talks to: GRAFT_ variables; starts the planet if no key is set."
)
def world(_context: dg.InitResourceContext) -> Iterator[Settings]:
    """Settings of a run; with no keys, of a planet that lives as long as the run."""
    with open_world(load_settings()) as settings:
        yield settings


@dg.resource(required_resource_keys={"world"}, description="Storage root, from GRAFT_ROOT.")
def storage(context: dg.InitResourceContext) -> Storage:
    """Files and tables of the deployment; says so at once when the root cannot be written, or is another world's."""
    opened = Storage(context.resources.world.root)
    opened.check()
    opened.claim(context.resources.world)
    return opened


@dg.resource(
    required_resource_keys={"world"},
    description="Flickr; keys from GRAFT_FLICKR_KEY and GRAFT_FLICKR_SECRET.",
)
def flickr(context: dg.InitResourceContext) -> FlickrClient:
    """Photo search."""
    return FlickrClient.from_settings(context.resources.world)


@dg.resource(required_resource_keys={"world"}, description="Downloads of ground images.")
def images(context: dg.InitResourceContext) -> ImageFetcher:
    """Image downloads."""
    return ImageFetcher.from_settings(context.resources.world)


@dg.resource(
    required_resource_keys={"world"},
    description="Scenes and chips, from where GRAFT_IMAGERY says; Earth Engine: GRAFT_EE_PROJECT, GRAFT_EE_KEY_FILE.",
)
def imagery(context: dg.InitResourceContext) -> ImagerySource:
    """Scenes and chips."""
    return open_imagery(context.resources.world)


@dg.resource(required_resource_keys={"world", "storage"}, description="The frozen CLIP (f_G, f_T).")
def foundation(context: dg.InitResourceContext) -> FoundationModel:
    """The foundation model of the settings, or the planet's own."""
    return FoundationModel.of_deployment(context.resources.world, context.resources.storage.models_folder)


@dg.resource(required_resource_keys={"world", "storage", "foundation"}, description="Indoor or outdoor.")
def scene_classifier(context: dg.InitResourceContext) -> SceneClassifier:
    """The scene classifier in the form that the settings choose; the planet has a checkpoint of its own."""
    settings = context.resources.world
    if settings.uses_planet_scenes:
        return SceneClassifier.checkpoint(planet_checkpoint(context.resources.storage.models_folder))
    if settings.scene_classifier == "checkpoint":
        return SceneClassifier.checkpoint(settings.scene_checkpoint)
    return SceneClassifier.zero_shot(context.resources.foundation)


@dg.resource(description="Progress of long steps, as log lines.")
def progress(context: dg.InitResourceContext) -> LogProgress:
    """Progress in the run's log."""
    assert context.log is not None
    return LogProgress(context.log)


def build_defs(settings: Settings | None = None, **overrides: Any) -> dg.Definitions:
    """Put a deployment together.

    Args:
        settings: which sensors and world the graph is drawn for; default: read from the environment.
        **overrides: resources by name that replace the standard ones, such as `progress` in the demo.

    Returns:
        The definitions.

    Raises:
        SettingsError: if an override names no resource.
    """
    settings = settings or load_settings()
    sensors = list(settings.sensor_records.values())
    # The planet knows what its own pixels show; whatever else is looked at, it does not.
    has_truth = settings.is_planet and settings.imagery == "earth_engine"
    assets: list[Any] = [
        regions,
        search_locations,
        flickr_photos,
        ground_images_asset,
        ground_embeddings,
        scored_by_planet_scenes(outdoor_photos) if settings.uses_planet_scenes else outdoor_photos,
        *build_external_assets(settings),
    ]
    for sensor in sensors:
        assets += [*build_sensor_assets(sensor, settings.imagery), *build_learning_assets(sensor, settings)]
        assets += [
            *build_grid_assets(sensor, settings),
            *build_search_assets(sensor, settings),
            *build_concept_assets(sensor, settings, has_truth=has_truth),
        ]
        if has_truth:
            assets += [
                *build_planet_assets(sensor),
                *build_answering_assets(sensor),
                build_ablations(sensor, settings),
            ]
    assets += build_evaluation_assets(settings)
    if settings.is_planet:
        assets += [planet_foundation, planet_scene_classifier, outdoor_scores]
    resources = {
        "world": world,
        "storage": storage,
        "flickr": flickr,
        "images": images,
        "imagery": imagery,
        "foundation": foundation,
        "scene_classifier": scene_classifier,
        "progress": progress,
    }
    if unknown := set(overrides) - set(resources):
        raise SettingsError(f"No resource {', '.join(sorted(unknown))}: override {', '.join(resources)}.")
    jobs = build_jobs(
        [sensor.name for sensor in sensors],
        has_scores=has_truth,
        has_maps=has_truth or bool(settings.concepts),
        gridded=settings.grid_stride_m,
    )
    jobs_by_name = {job.name: job for job in jobs}
    return dg.Definitions(
        assets=with_freshness(with_conditions(assets), settings),
        jobs=jobs,
        schedules=build_schedules(settings, jobs_by_name),
        sensors=build_sensors(settings, jobs_by_name),
        resources={**resources, **overrides},
        # One process a run: a region is minutes of work in threads, and its world opens once.
        executor=dg.in_process_executor,
    )


defs = build_defs()
