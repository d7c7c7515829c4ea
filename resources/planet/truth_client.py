"""Reads the planet's truth over HTTP, for evaluation only.

No asset of the training path may import this; what the truth is, is decided by the planet (truth_api.py).
"""

import io
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import requests

from graft_pipeline.errors import InputError, ServiceError
from graft_pipeline.geometry import Grid

TIMEOUT_S = 120.0
PHOTOS_PER_CALL = 5000


class PlanetTruth:
    """The truth of a running planet.

    Args:
        url: where the planet answers.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    @cached_property
    def classes(self) -> list[str]:
        """Names of the land-cover classes; a class's id is its place in the list.

        Raises:
            ServiceError: if the planet does not answer.
        """
        return list(self._classes["names"])

    @cached_property
    def palette(self) -> np.ndarray:
        """Colours of the classes on maps, (C, 3) uint8 RGB.

        Raises:
            ServiceError: if the planet does not answer.
        """
        return np.array(self._classes["palette"], np.uint8)

    @cached_property
    def _classes(self) -> dict[str, Any]:
        return dict(self._get("/truth/classes", {}).json())

    def land_cover(self, grid: Grid) -> np.ndarray:
        """The land-cover map.

        Args:
            grid: a grid in any UTM zone.

        Returns:
            (height, width) uint8 class ids.

        Raises:
            ServiceError: if the planet does not answer, or refuses the grid.
        """
        answer = self._get("/truth/land_cover", asdict(grid))
        return np.load(io.BytesIO(answer.content), allow_pickle=False)

    def photos(self, photo_ids: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """What photos show.

        Args:
            photo_ids: Flickr's ids of photos of this planet.

        Returns:
            Kinds (a land-cover class or a thing such as `kitchen`), and (N,) bool: whether they show the outdoors.

        Raises:
            ServiceError: if the planet does not answer.
            InputError: if an id is none of this planet's.
        """
        kinds: list[str] = []
        is_outdoor: list[bool] = []
        for start in range(0, len(photo_ids), PHOTOS_PER_CALL):
            answer = self._ask("POST", "/truth/photos", json=list(photo_ids[start : start + PHOTOS_PER_CALL]))
            found = answer.json()
            kinds += found["kinds"]
            is_outdoor += found["is_outdoor"]
        strangers = [photo_id for photo_id, kind in zip(photo_ids, kinds, strict=True) if kind is None]
        if strangers:
            raise InputError(
                f"{len(strangers)} photos such as {strangers[0]} are not of the planet at {self._url}: collect the "
                "regions from this planet."
            )
        return kinds, np.array(is_outdoor, bool)

    def _get(self, path: str, parameters: dict[str, int | float]) -> requests.Response:
        return self._ask("GET", path, params=parameters)

    def _ask(self, method: str, path: str, **options: Any) -> requests.Response:
        try:
            answer = requests.request(method, self._url + path, timeout=TIMEOUT_S, **options)
        except requests.RequestException as error:
            raise ServiceError(
                f"No planet answers at {self._url} ({type(error).__name__}): start it."
            ) from error
        if answer.status_code != requests.codes.ok:
            raise ServiceError(f"{self._url}{path} answered {answer.status_code}: {answer.text[:200]}")
        return answer
