"""Reads the planet's truth over HTTP, for evaluation only.

No asset of the training path may import this; what the truth is, is decided by the planet (truth_api.py).
"""

import io
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import requests

from graft_pipeline.errors import ServiceError
from graft_pipeline.geometry import Grid

TIMEOUT_S = 120.0


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

    def _get(self, path: str, parameters: dict[str, int | float]) -> requests.Response:
        try:
            answer = requests.get(self._url + path, params=parameters, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            raise ServiceError(
                f"No planet answers at {self._url} ({type(error).__name__}): start it."
            ) from error
        if answer.status_code != requests.codes.ok:
            raise ServiceError(f"{self._url}{path} answered {answer.status_code}: {answer.text[:200]}")
        return answer
