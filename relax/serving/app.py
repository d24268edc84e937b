"""The ASGI application: routes, keys, limits, and clients that leave."""

import asyncio
import contextlib
import hmac
from collections.abc import Callable, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from relax.serving.endpoint import Answer, Endpoint, OwnSettings, Session
from relax.serving.errors import ApiError, broken
from relax.serving.replies import encoded

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def make_app(
    endpoint: Endpoint,
    *,
    api_key: str | None = None,
    max_body_bytes: int = 8 * 2**20,
    local_only: bool = False,
    sessions: Mapping[str, Session] | None = None,
) -> Starlette:
    """Makes the application.

    Args:
      endpoint: what answers.
      api_key: the key that every request but `/health` must bring; None: none.
      max_body_bytes: largest body of a request.
      local_only: refuse requests to other host names than this machine's own, which pages of a
        browser could send.
      sessions: sessions by secret names, which begin the path; None: one session for all, `/v1`.
    """
    routes = _Routes(endpoint, max_body_bytes, sessions)
    start = "/v1" if sessions is None else "/{session}/v1"
    guards = [Middleware(_Guard, api_key=api_key, local_only=local_only)]
    return Starlette(
        routes=[
            Route("/health", routes.health),
            Route(f"{start}/models", routes.models),
            Route(f"{start}/models/{{name:path}}", routes.model),
            Route(f"{start}/chat/completions", routes.chat, methods=["POST"]),
            Route(f"{start}/completions", routes.completions, methods=["POST"]),
        ],
        middleware=guards,
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            Exception: _any_error,
        },
    )


class _Guard:
    """Refuses requests without the key, or to foreign host names, before anything is read."""

    def __init__(self, app, api_key: str | None, local_only: bool):
        self.app, self.local_only = app, local_only
        self.key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "http" and (error := self._refused(scope)) is not None:
            await _response(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refused(self, scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self.local_only:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name not in LOCAL_NAMES:
                return ApiError(403, f"requests must be for this machine, got the host {host!r}.")
        given = headers.get(b"authorization", b"")
        is_open = self.key is None or scope["path"] == "/health"
        if is_open or (self.key is not None and hmac.compare_digest(given, self.key)):
            return None
        message = "the header Authorization must bring the server's key: Bearer KEY."
        return ApiError(401, message, code="invalid_api_key")


class _Routes:
    def __init__(self, endpoint: Endpoint, max_body_bytes: int, sessions):
        self.endpoint, self.max_body_bytes = endpoint, max_body_bytes
        self.sessions, self.own = sessions, OwnSettings()

    async def health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def models(self, request: Request) -> Response:
        self._session(request)
        return _json(self.endpoint.models())

    async def model(self, request: Request) -> Response:
        self._session(request)
        return _json(self.endpoint.model(request.path_params["name"]))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, self.endpoint.chat)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, self.endpoint.complete)

    async def _answer(self, request: Request, start: Callable) -> Response:
        session = self._session(request)
        answer: Answer = await start(await self._read(request), session)
        if answer.fields.stream:
            headers = {"cache-control": "no-cache"}
            return _Events(answer, media_type="text/event-stream", headers=headers)
        with contextlib.suppress(ClientDisconnect):
            async with _watched(request, answer):
                return _json(await answer.body())
        raise ApiError(499, "the client has gone.")

    def _session(self, request: Request) -> Session:
        if self.sessions is None:
            return self.own
        session = self.sessions.get(request.path_params["session"])
        if session is None:
            raise ApiError(404, "there is no such session, or it has ended.")
        return session

    async def _read(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind.lower() != "application/json":
            raise ApiError(415, f"the body must be application/json, got {kind!r}.")
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > self.max_body_bytes:
                    message = f"a body may have {self.max_body_bytes} bytes, and this has more."
                    raise ApiError(413, message)
        except ClientDisconnect:
            raise ApiError(499, "the client has gone.") from None
        return bytes(body)


class _Events(StreamingResponse):
    """Server-sent events, which end when the client leaves, before the first token too."""

    def __init__(self, answer: Answer, **options):
        super().__init__(answer.events(), **options)
        self.answer = answer

    async def __call__(self, scope, receive, send) -> None:
        try:
            async with _watched(Request(scope, receive), self.answer):
                await super().__call__(scope, receive, send)
        except (OSError, ClientDisconnect):
            pass  # the client has gone
        finally:
            self.answer.abandon()


@contextlib.asynccontextmanager
async def _watched(request: Request, answer: Answer):
    """Abandons an answer when its client leaves."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        answer.abandon()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        answer.abandon()


def _json(body: dict, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encoded(body), status, headers, "application/json")


def _response(error: ApiError) -> Response:
    headers = {"retry-after": "1"} if error.status == 429 else {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return _json(error.body(), error.status, headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error)


async def _any_error(request: Request, error: Exception) -> Response:
    return _response(broken(f"{type(error).__name__}: {error}"))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    message = {
        404: f"there is no {path} here.",
        405: f"{path} does not take {request.method}.",
    }.get(error.status_code, error.detail)
    return _response(ApiError(error.status_code, message))
