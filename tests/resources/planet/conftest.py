"""Fixtures of the planet's tests: the real Earth Engine and Flickr clients, pointed at a running planet."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def connect_ee() -> Iterator[Callable[..., Any]]:
    """Points the real client library at a planet and returns it; undone after the test."""
    import ee
    from google.auth.credentials import AnonymousCredentials

    from resources import earth_engine

    def connect(url: str, project: str = "local-planet") -> Any:
        ee.Reset()
        # Else Initialize fetches a list of deprecated assets from another host.
        ee.deprecation.deprecated_assets = {"-": None}
        ee.Initialize(AnonymousCredentials(), url=url, project=project)
        ee.data.setMaxRetries(0)
        return ee

    yield connect
    ee.Reset()
    # The library's state is one per process: our own client must not believe that it is still its own.
    earth_engine._SESSION._target = None


@pytest.fixture
def connect_flickr() -> Callable[..., Any]:
    """Makes real flickrapi clients of a planet."""
    import flickrapi

    def connect(url: str, key: str = "local-key") -> Any:
        client = flickrapi.FlickrAPI(key, "local-secret", format="parsed-json", store_token=False, timeout=30)
        client.REST_URL = f"{url}/services/rest/"
        return client

    return connect
