"""Which world a deployment talks to: the real services, or the embedded planet, started here when needed.

Settings are graft_pipeline/settings.py; the planet itself, resources/planet.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import SecretStr

from graft_pipeline.errors import ServiceError, SettingsError
from graft_pipeline.settings import Settings

logger = logging.getLogger(__name__)

#: The planet accepts any key and project; these say in its log, and in ours, where a request belongs.
PLANET_KEY = "planet"
PLANET_PROJECT = "local-planet"


@contextmanager
def open_world(settings: Settings) -> Iterator[Settings]:
    """Make sure that the services a deployment calls are there.

    In production nothing is done. On the planet a `PlanetServer` runs inside the context, unless `planet.url`
    names one that runs already.

    Args:
        settings: the deployment's settings; not changed.

    Yields:
        The settings, or on the planet a copy in which `flickr_*`, `ee_*` and `planet.url` point at it.

    Raises:
        InputError: if a mounted file is not usable.
        SettingsError: if the planet at `planet.url` is another one than `planet.seed` says.
        ServiceError: if no planet answers at `planet.url`, or a new one does not start.
    """
    if not settings.is_planet:
        yield settings
        return

    from resources.planet.process import PlanetServer, seed_at

    planet = settings.planet
    if planet.url is not None:
        found = seed_at(planet.url)
        if found is None:
            raise ServiceError(
                f"No planet answers at {planet.url} (GRAFT_PLANET__URL): start it with `graft planet serve`, "
                "or unset the variable so that each run starts its own."
            )
        if found != planet.seed:
            # The storage keeps worlds apart by the seed in the settings.
            raise SettingsError(
                f"The planet at {planet.url} (GRAFT_PLANET__URL) has seed {found}, and this deployment's data is of "
                f"seed {planet.seed}: unset the variable, or set GRAFT_PLANET__SEED={found} and another GRAFT_ROOT."
            )
        yield _pointed_at(settings, planet.url)
        return
    # Sensors of the deployment's own are mounted on their collections.
    sensors = settings.sensor_records
    mounts = {
        sensors[name].collection if name in sensors else name: paths for name, paths in planet.mounts.items()
    }
    with PlanetServer(
        seed=planet.seed,
        latency_ms=planet.latency_ms,
        quota=planet.quota,
        fault_rate=planet.fault_rate,
        mounts=mounts,
        now=planet.now,
    ) as server:
        yield _pointed_at(settings, server.url)


def _pointed_at(settings: Settings, url: str) -> Settings:
    url = url.rstrip("/")
    # The planet has no quota of Flickr's or Google's, unless a pace was asked for.
    pace = {
        "flickr_calls_per_hour": 10_000_000,
        "image_requests_per_second": 10_000,
        "ee_requests_per_second": 10_000,
    }
    return settings.model_copy(
        update={
            **{name: value for name, value in pace.items() if name not in settings.model_fields_set},
            # Said outright: with a key set, settings alone would mean production.
            "world": "planet",
            "flickr_key": SecretStr(PLANET_KEY),
            "flickr_secret": SecretStr(PLANET_KEY),
            "flickr_url": f"{url}/services/rest/",
            "flickr_static_url": f"{url}/static",
            "ee_project": PLANET_PROJECT,
            "ee_key_file": None,
            "ee_url": url,
            "planet": settings.planet.model_copy(update={"url": url}),
        }
    )
