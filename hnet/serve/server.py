"""Listening, and stopping without losing what clients wait for."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from hnet.errors import UserError

from .worker import Worker

KEEP_ALIVE = 75  # seconds: longer than clients keep idle connections, or they would ask on one that just closed
MARGIN = 5  # seconds for the last bytes to leave after texts were cut


class Server(uvicorn.Server):
    """Stops at SIGTERM or SIGINT: no new requests, `grace` seconds for those there are; a second signal cuts them."""

    should_exit: bool  # uvicorn's

    def __init__(self, app: FastAPI, worker: Worker, grace: float, ready: Callable[[], None]) -> None:
        super().__init__(uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="on", server_header=False,
            timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=int(grace) + MARGIN,
        ))  # fmt: skip
        self.worker, self.grace, self.ready = worker, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.worker.drain(0 if self.should_exit else self.grace)
        self.should_exit = True


def serve(
    app: FastAPI, worker: Worker, listening: socket.socket, *, grace: float = 30.0,
    ready: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Until a signal. ready: called when requests are taken."""
    Server(app, worker, grace, ready).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """
    Raises:
        UserError: the address is taken, not ours, or not one.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as e:
        raise UserError(f"cannot listen at {host} port {port}: {e.strerror or e}") from None


def is_local(host: str) -> bool:
    """Nobody on another machine can reach it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
