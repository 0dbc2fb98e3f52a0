"""The server's addresses: /v1/completions, /v1/models, /health, /metrics, and a page at /."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .choices import Writer
from .errors import ApiError
from .page import CSP, page
from .task import Task, parse
from .worker import Call, Worker

log = logging.getLogger("hnet.serve")
BODY_SECONDS = 30.0  # for a client to send its request


def make_app(worker: Worker, *, name: str, token: str | None = None) -> FastAPI:
    """
    Args:
        worker: started and stopped with the app.
        name: what clients call the model.
        token: asked for at /v1 and /metrics, as "Authorization: Bearer TOKEN". Default: nothing is.
    """
    limits, metrics, born = worker.limits, worker.metrics, int(time.time())
    watching: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            worker.stop()

    # no pages of FastAPI's own: they load scripts from elsewhere
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    def check_token(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise ApiError(401, "the bearer token is missing or wrong", code="invalid_api_key")

    @app.exception_handler(ApiError)
    async def refused(_: Request, e: ApiError) -> Response:
        return JSONResponse(e.body(), e.status, headers=e.headers())

    @app.exception_handler(HTTPException)
    async def not_there(request: Request, e: HTTPException) -> Response:
        error = ApiError(e.status_code, f"{request.method} {request.url.path}: {e.detail}")
        return JSONResponse(error.body(), e.status_code, headers=e.headers)

    @app.exception_handler(Exception)
    async def bug(_: Request, e: Exception) -> Response:
        log.error("a request failed", exc_info=e)
        return JSONResponse(ApiError(500, "internal error; the server's log says more").body(), 500)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        try:
            check_token(request)
            answer = await complete(request)
        except ApiError as e:
            metrics.responses.labels(str(e.status)).inc()
            raise
        metrics.responses.labels("200").inc()
        return answer

    async def complete(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # which also keeps pages of other sites away: a browser asks before it sends them
            raise ApiError(415, "the Content-Type must be application/json")
        task = parse(await read_body(request, limits.body), limits, name)
        call = worker.submit(task)
        watcher = asyncio.create_task(close_when_gone(request, call))
        watching.add(watcher)
        watcher.add_done_callback(watching.discard)
        head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
                "model": name}  # fmt: skip
        if task.stream:
            return StreamingResponse(
                events(call, head), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        return JSONResponse(await whole(call, head))

    @app.get("/v1/models", response_model=None)
    async def models(request: Request) -> Response:
        check_token(request)
        return JSONResponse({"object": "list", "data": [about()]})

    @app.get("/v1/models/{model:path}", response_model=None)
    async def model(request: Request, model: str) -> Response:
        check_token(request)
        if model != name:
            raise ApiError(404, f"model must be {name!r}", param="model", code="model_not_found")
        return JSONResponse(about())

    def about() -> dict[str, Any]:
        return {"id": name, "object": "model", "created": born, "owned_by": "hnet",
                "max_prompt_bytes": limits.max_prompt_bytes, "max_tokens": limits.max_tokens}  # fmt: skip

    @app.get("/health", response_model=None)
    async def health() -> Response:
        return JSONResponse({"status": worker.state}, 200 if worker.state == "ok" else 503)

    @app.get("/metrics", response_model=None)
    async def numbers(request: Request) -> Response:
        check_token(request)
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/", response_model=None)
    async def built_in() -> Response:
        return HTMLResponse(page(name, token is not None), headers={"Content-Security-Policy": CSP})

    return app


async def read_body(request: Request, most: int) -> bytes:
    """
    Raises:
        ApiError: 413, it is longer than `most` bytes; 408, it does not come; 400, nor will it.
    """

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise ApiError(413, f"a request of more than {most} bytes", code="request_too_large")
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except ClientDisconnect:
        raise ApiError(400, "the client left") from None
    except asyncio.TimeoutError:
        raise ApiError(408, f"the request did not come within {BODY_SECONDS:g} s") from None


async def close_when_gone(request: Request, call: Call) -> None:
    """Whether the client left or has its answer: nobody reads the call any more."""
    try:
        while (await request.receive())["type"] != "http.disconnect":
            pass
    finally:
        call.close()


async def whole(call: Call, head: dict[str, Any]) -> dict[str, Any]:
    """
    Raises:
        ApiError: a text ended in an error; the others go with it.
    """
    writers, choices, written = writers_of(call.task), {}, 0
    while (piece := await call.next()) is not None:
        if piece.error is not None:
            call.close()
            raise piece.error
        written += len(piece.new)
        choices[piece.index] = writers[piece.index].choice(piece)
    return {**head, "choices": [choices[index] for index in sorted(choices)], "usage": usage(call.task, written)}


async def events(call: Call, head: dict[str, Any]) -> AsyncIterator[bytes]:
    """Server-sent events: one for each piece of a text, what was used if asked, [DONE]. An error is the last."""
    writers, written = writers_of(call.task), 0
    try:
        while (piece := await call.next()) is not None:
            if piece.error is not None:
                yield event(piece.error.body())
                return
            written += len(piece.new)
            choice = writers[piece.index].choice(piece)
            if choice is not None:
                yield event({**head, "choices": [choice]})
        if call.task.usage:
            yield event({**head, "choices": [], "usage": usage(call.task, written)})
        yield b"data: [DONE]\n\n"
    finally:
        call.close()


def writers_of(task: Task) -> list[Writer]:
    return [Writer(task, index) for index in range(task.texts)]


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def usage(task: Task, written: int) -> dict[str, int]:
    """In bytes, as everything here."""
    prompts = sum(map(len, task.prompts))
    return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}
