"""Runs the search page's application on an address until it is interrupted.

What it answers is in app.py.
"""

import contextlib
import errno
import socket
from collections.abc import Callable

import uvicorn

from graft_pipeline.errors import InputError, ServiceError
from graft_pipeline.web.app import App


def run(app: App, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve an application until the process is interrupted.

    Args:
        app: the application.
        host: address or name to listen on.
        port: port; 0 takes a free one.
        on_ready: called with the URL once it listens.

    Raises:
        InputError: if the host is none of this machine's.
        ServiceError: if the port is taken.
    """
    with _listen(host, port) as listener:
        bound = listener.getsockname()
        name = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
        on_ready(f"http://{name}:{bound[1]}")
        config = uvicorn.Config(
            app,
            lifespan="off",
            access_log=False,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
        )
        # uvicorn passes the interrupt on once it has answered what was asked.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(
            f"--host {host} is no address ({error}): use 127.0.0.1 or one of this machine."
        ) from None
    # asyncio switches off Nagle's delay, 40 ms a request, only where the protocol is named.
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ServiceError(
                f"The page cannot listen on {host}:{port} ({error.strerror}): choose another --port, or 0."
            ) from None
        raise InputError(
            f"The page cannot listen on {host} ({error.strerror}): use 127.0.0.1 or an address of this machine."
        ) from None
    listener.listen(256)
    return listener
