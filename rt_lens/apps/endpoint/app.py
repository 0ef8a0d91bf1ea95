"""The endpoint: routes, refusals, and who may ask."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware

from rt_lens.apps.endpoint.requests import (
    ChatRequest,
    CompletionRequest,
    Kind,
    Reply,
    error_body,
    said_plainly,
)
from rt_lens.apps.endpoint.worker import Busy, Worker
from rt_lens.arms.intervention import Intervention
from rt_lens.models.generation import NewToken, as_chat
from rt_lens.models.protocol import Model
from rt_lens.models.tokens.batches import encode

_LOOK = 0.2
"""Seconds between two looks whether a client that waits is still there."""
LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")


class _Refused(Exception):
    """A refusal with its status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def make_endpoint(
    model: Model, arms: Mapping[str, Intervention], *, api_key: str | None = None, most_waiting: int = 16
) -> FastAPI:
    """The app; each arm is a model's name.

    Args:
        model: HookedTransformer or TransformerBridge.
        arms: name -> intervention; None is the model as it is.
        api_key: that requests have to send; None asks for none.
        most_waiting: requests that may wait for their turn; more get status 429.
    """
    app, worker = (
        FastAPI(title="rt_lens", docs_url=None, redoc_url=None, openapi_url=None),
        Worker(model, arms, most_waiting),
    )
    app.state.worker = worker
    # DNS rebinding: a foreign page whose name resolves to this machine sends its own name as host.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOCAL))

    app.add_middleware(_KeepToThisMachine, api_key=api_key)

    @app.exception_handler(_Refused)
    async def refused(_: Request, error: _Refused) -> JSONResponse:
        return _refusal(error.status, str(error), error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _refusal(400, said_plainly(error.errors()))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return _refusal(500, f"{type(error).__name__}: {str(error)[:200]}")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        named = [{"id": name, "object": "model", "created": 0, "owned_by": "rt_lens"} for name in worker.arms]
        return {"object": "list", "data": named}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await _answered(worker, body, "chat.completion", request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answered(worker, body, "text_completion", request)

    return app


class _KeepToThisMachine:
    """Refuses foreign pages, and requests without the key. (Starlette's own kind of it hides clients that leave.)"""

    def __init__(self, app: Any, api_key: str | None) -> None:
        self.app, self.key = app, api_key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refusal = self._refused(Headers(scope=scope)) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def _refused(self, headers: Headers) -> JSONResponse | None:
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).hostname not in LOCAL:
            return _refusal(403, f"origin must be of this machine, got {origin[:80]!r}.")
        sent = headers.get("authorization", "").removeprefix("Bearer ")
        if self.key is not None and not secrets.compare_digest(sent.encode(), self.key.encode()):
            return _refusal(401, "api_key must be the endpoint's, got another or none.")
        return None


def _refusal(status: int, message: str, code: str | None = None) -> JSONResponse:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
    return JSONResponse(error_body(message, kinds.get(status, "invalid_request_error"), code), status)


async def _answered(worker: Worker, body: ChatRequest | CompletionRequest, kind: Kind, request: Request) -> Response:
    """A whole reply, or a stream of its parts."""
    prompts, settings, reply = _checked(worker, body, kind)
    tokens = worker.tokens(body.model, prompts, {**settings, "chat": kind == "chat.completion"})
    try:
        first = await _first(tokens, request)  # so that refusals have a status of their own
    except Busy:
        raise _Refused(429, f"{worker.most} requests wait already. Try again later.") from None
    except ValueError as error:
        raise _Refused(400, str(error)) from None
    if body.stream:
        usage = bool((body.stream_options or {}).get("include_usage"))
        return StreamingResponse(_streamed(tokens, first, reply, usage), media_type="text/event-stream")
    async with aclosing(tokens):
        async for new in _from(first, tokens):
            if await request.is_disconnected():
                break
            reply.add(new.row, new.text)
    return JSONResponse({**reply.whole(), "object": kind})


async def _first(tokens: AsyncGenerator[NewToken, None], request: Request) -> NewToken | None:
    """The first token, for which the request may wait its turn; a client that goes away gives its place up."""
    coming = asyncio.ensure_future(anext(tokens, None))
    while not (await asyncio.wait({coming}, timeout=_LOOK))[0]:
        if await request.is_disconnected():
            coming.cancel()
            with suppress(asyncio.CancelledError):
                await coming
            raise _Refused(499, "the client has gone.")
    return coming.result()


def _checked(worker: Worker, body: ChatRequest | CompletionRequest, kind: Kind) -> tuple[list[str], Any, Reply]:
    """Prompts, keywords of `generate`, and the reply that begins.

    Raises:
        _Refused: an unknown model, an argument that this endpoint does not have, messages that are none.
    """
    if body.model not in worker.arms:
        raise _Refused(404, f"model must be one of {', '.join(worker.arms)}, got {body.model!r}.", "model_not_found")
    if name := body.refused():
        raise _Refused(400, f"{name} must be left out, since this endpoint has no such thing. Remove it.")
    settings = body.generation()
    try:
        prompts = body.prompts()
        texts = as_chat(worker.model, prompts) if kind == "chat.completion" else prompts
        sizes = [len(encode(worker.model, text)) for text in texts]
    except ValueError as error:
        raise _Refused(400, str(error)) from None
    n = len(prompts) * settings["num_return_sequences"]
    return prompts, settings, Reply(kind, body.model, n, settings["max_new_tokens"], sum(sizes))


async def _from(first: NewToken | None, tokens: AsyncGenerator[NewToken, None]) -> AsyncGenerator[NewToken, None]:
    """The tokens with the one that was read before."""
    if first is not None:
        yield first
    async for new in tokens:
        yield new


async def _streamed(
    tokens: AsyncGenerator[NewToken, None], first: NewToken | None, reply: Reply, usage: bool
) -> AsyncGenerator[str, None]:
    """Server-sent events; closing it, as for a client that went away, ends the generation."""
    async with aclosing(tokens):
        async for new in _from(first, tokens):
            reply.add(new.row, new.text)
            if new.text:
                yield _event(reply.piece(new.row, new.text))
    for index in range(reply.n):
        yield _event(reply.last(index))
    if usage:
        yield _event(reply.spent())
    yield "data: [DONE]\n\n"


def _event(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
