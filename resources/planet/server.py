"""The planet's HTTP server: routes, options and the main function of its own process.

What is answered is in the API modules; how the pipeline starts and stops this process, in process.py.
"""

import argparse
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from graft_pipeline.errors import GraftError, InputError, ServiceError
from resources.planet.catalog import Catalog
from resources.planet.earth_engine_api import EarthEngineApi
from resources.planet.faults import DROP_CONNECTION, STALL_S, App, Gate, Stats
from resources.planet.flickr_api import FlickrApi
from resources.planet.truth_api import TruthApi
from resources.planet.world import NOW, World

#: Loopback only: the planet checks no credentials.
HOST = "127.0.0.1"


def create_app(
    seed: int,
    *,
    latency_ms: float = 0.0,
    quota: float | None = None,
    fault_rate: float = 0.0,
    mounts: dict[str, list[str]] | None = None,
    now: datetime = NOW,
    stall_s: float = STALL_S,
) -> App:
    """The planet as an ASGI application.

    Args:
        seed: decides everything on the planet.
        latency_ms: added to every answer of the APIs.
        quota: requests per second and service before the answer is 429; None: unlimited.
        fault_rate: share of requests answered with a fault.
        mounts: GeoTIFF paths by sensor name or collection id, served as scenes.
        now: the planet's present, UTC; what is uploaded or acquired later does not exist yet.
        stall_s: how late the answer to a request is that meets this fault.

    Returns:
        An ASGI application.

    Raises:
        InputError: if a mount is not usable, or a number is out of range.
    """
    if min(latency_ms, stall_s) < 0 or not 0 <= fault_rate <= 1 or (quota is not None and quota <= 0):
        raise InputError(
            "latency_ms and stall_s must not be negative, fault_rate must be 0 to 1, quota positive: "
            "correct them."
        )
    mounted = {}
    if mounts:
        from resources.planet.mounts import mounted_scenes

        mounted = mounted_scenes(mounts)
    world, stats = World(seed, now), Stats()
    earth_engine, flickr = EarthEngineApi(world, Catalog(seed, mounted, now)), FlickrApi(world)
    truth = TruthApi(world)

    def healthz(request: Request) -> Response:
        return JSONResponse({"status": "ok", "service": "graft-planet", "seed": seed})

    def counters(request: Request) -> Response:
        return JSONResponse(stats.as_dict())

    def reset(request: Request) -> Response:
        stats.reset()
        return JSONResponse(stats.as_dict())

    app = Starlette(
        routes=[
            Route("/healthz", healthz),
            Route("/stats", counters),
            Route("/stats/reset", reset, methods=["POST"]),
            Route("/services/rest", flickr.call, methods=["GET", "POST"]),
            Route("/services/rest/", flickr.call, methods=["GET", "POST"]),
            Route("/static/{server}/{name}", flickr.image),
            Route("/$discovery/rest", earth_engine.discovery),
            Route("/v1/{name:path}", earth_engine.call, methods=["GET", "POST"]),
            Route("/truth/classes", truth.classes),
            Route("/truth/land_cover", truth.land_cover),
            Route("/truth/photos", truth.photos, methods=["POST"]),
        ]
    )
    return Gate(
        app,
        stats,
        seed=seed,
        latency_ms=latency_ms,
        quota=quota,
        fault_rate=fault_rate,
        stall_s=stall_s,
    )


def _moment(text: str) -> datetime:
    """A date or time as ISO 8601 writes it; UTC if it names no zone."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class _Protocol(HttpToolsProtocol):
    """Lets the application cut its connection, which ASGI has no message for."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.app_state = {**self.app_state, DROP_CONNECTION: transport.abort}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the planet until its parent closes standard input or a signal comes.

    The first line of standard output is JSON: `{"url": ...}` once it listens, else `{"error":, "message":}`.
    """
    parser = argparse.ArgumentParser(prog="python -m resources.planet.server", description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--quota", type=float, help="requests per second and service")
    parser.add_argument("--fault-rate", type=float, default=0.0)
    parser.add_argument("--stall-s", type=float, default=STALL_S)
    parser.add_argument(
        "--now", type=_moment, default=NOW, help="the planet's present, such as 2023-06-01; UTC"
    )
    parser.add_argument("--mounts", type=json.loads, default={}, help='JSON such as {"naip": ["file.tif"]}')
    parser.add_argument(
        "--child", action="store_true", help="end when standard input closes or the parent is gone"
    )
    options = parser.parse_args(arguments)
    if options.child:
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        listener = _listen(options.port)
        app = create_app(
            options.seed,
            latency_ms=options.latency_ms,
            quota=options.quota,
            fault_rate=options.fault_rate,
            mounts=options.mounts,
            now=options.now,
            stall_s=options.stall_s,
        )
    except GraftError as error:
        _report({"error": type(error).__name__, "message": str(error)})
        return 2
    config = uvicorn.Config(
        app,
        http=_Protocol,
        loop="auto",
        lifespan="off",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        # Longer than any client keeps an idle connection: none is closed under its hands.
        timeout_keep_alive=600,
        timeout_graceful_shutdown=1,
    )
    # Injected faults end answers early on purpose; uvicorn would log each as an error.
    logging.getLogger("uvicorn.error").addFilter(
        lambda record: "without completing response" not in record.getMessage()
    )
    _report({"url": f"http://{HOST}:{listener.getsockname()[1]}"})
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def _listen(port: int) -> socket.socket:
    # asyncio switches off Nagle's delay, 40 ms a request, only where the protocol is named.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ServiceError(
            f"The planet cannot listen on {HOST}:{port} ({error}): choose another port, or 0."
        ) from error
    # Listen at once: who reads the first line of our output may connect before uvicorn accepts.
    listener.listen(1024)
    return listener


def _report(message: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _end_with_parent(parent: int) -> None:
    """End when standard input closes or, should another process hold its pipe open, the parent is gone."""
    import selectors

    selector = selectors.DefaultSelector()
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
    while os.getppid() == parent:
        if selector.select(timeout=1.0) and not os.read(sys.stdin.fileno(), 4096):
            break
        time.sleep(0.01)
    # Nothing to save, and requests may hang in threads: no ceremony.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
