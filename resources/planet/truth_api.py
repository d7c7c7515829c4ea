"""The planet's truth, for evaluation only: land cover behind the pixels, its classes, and what photos show.

No real service has this; no asset of the training path reads it (truth_client.py is its only reader).
"""

import io
import json

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from graft_pipeline.errors import InputError
from graft_pipeline.geometry import Grid
from resources.planet.ground import is_outdoor
from resources.planet.world import World

MAX_PIXELS = 50_331_648
#: All that lies on the ground is looked at, however few the pixels.
MAX_SIDE_M = 500_000.0
MAX_PHOTOS = 10_000


class TruthApi:
    """Handlers of the truth routes; they may run in any number of threads.

    Args:
        world: the planet.
    """

    def __init__(self, world: World) -> None:
        self._world = world

    def classes(self, request: Request) -> Response:
        """`GET /truth/classes`: `{"names": [...], "palette": [[r, g, b], ...]}`; a class's id is its place."""
        return JSONResponse({"names": list(self._world.classes), "palette": self._world.palette.tolist()})

    def land_cover(self, request: Request) -> Response:
        """`GET /truth/land_cover` of a grid, given by the fields of `Grid`: (height, width) uint8 as .npy."""
        query = request.query_params
        try:
            grid = Grid(
                epsg=int(query["epsg"]),
                x0_m=float(query["x0_m"]),
                y0_m=float(query["y0_m"]),
                gsd_m=float(query["gsd_m"]),
                width_px=int(query["width_px"]),
                height_px=int(query["height_px"]),
            )
            if not grid.gsd_m > 0 or min(grid.width_px, grid.height_px) < 1:
                raise ValueError("sizes must be positive")
            if grid.width_px * grid.height_px > MAX_PIXELS:
                raise ValueError(f"more than {MAX_PIXELS} pixels")
            if grid.gsd_m * max(grid.width_px, grid.height_px) > MAX_SIDE_M:
                raise ValueError(f"a side of more than {MAX_SIDE_M / 1000:.0f} km")
            cover = self._world.land_cover(grid)
        except (KeyError, ValueError, InputError) as error:
            return PlainTextResponse(
                f"Not a grid: {error}. Give a UTM grid as graft_pipeline.geometry.Grid.", 400
            )
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(cover, np.uint8))
        return Response(buffer.getvalue(), media_type="application/octet-stream")

    def photos(self, request: Request) -> Response:
        """`POST /truth/photos` of a JSON list of ids: `{"kinds": [...], "is_outdoor": [...]}`, null if unknown."""
        try:
            ids = json.loads(request.state.body)
            if not isinstance(ids, list) or not all(isinstance(photo_id, str) for photo_id in ids):
                raise ValueError("ids must be strings")
            if len(ids) > MAX_PHOTOS:
                raise ValueError(f"more than {MAX_PHOTOS}")
        except (ValueError, RecursionError) as error:
            return PlainTextResponse(f"Not a list of photo ids: {error}. Send a JSON list of strings.", 400)
        photos = [self._world.photo(photo_id) for photo_id in ids]
        kinds = [None if photo is None else str(photo["kind"]) for photo in photos]
        outdoor = [None if kind is None else is_outdoor(kind) for kind in kinds]
        return JSONResponse({"kinds": kinds, "is_outdoor": outdoor})
