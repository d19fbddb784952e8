"""Serve the playground's page, and forward its requests to a vLLM server, so that the server needs no CORS.

Only ``/v1/`` is forwarded. The API key stays in this process, and the page never sees it. A request that names another
host, or comes from another origin, is refused, so that no other site in the same browser can use the key.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from aiohttp import ClientError, ClientResponse, ClientSession, ClientTimeout, TCPConnector, web
from yarl import URL

from pad_vllm.checks import shown
from pad_vllm.errors import one_line

PAGE_FOLDER = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/playground.css": ("playground.css", "text/css"),
    "/playground.js": ("playground.js", "text/javascript"),
}
HEADERS = {
    # The page needs nothing but itself, and nobody frames it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
MAX_BODY = 16 << 20
CONNECT_SECONDS = 10
STOP_SECONDS = 1
"""For answers that are still being streamed when the playground ends."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.contextmanager
def playground(server: str, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None) -> Iterator[str]:
    """Serve the page in a thread as long as the context is open, and return its URL.

    Args:
        server: URL of a vLLM server, with or without ``/v1`` at its end.
        port: port of the page; 0 takes a free one.
        api_key: API key of the server. It is sent to this server only.

    Raises:
        ValueError: ``server`` is not a URL.
        OSError: the page cannot be served on this host and port.
    """
    serving = Playground(server_url(server), host, api_key)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True, name="playground")
    try:
        bound = loop.run_until_complete(serving.start(port))
        thread.start()
        try:
            yield f"http://{_in_url(host)}:{bound}/"
        finally:
            asyncio.run_coroutine_threadsafe(serving.stop(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
    finally:
        loop.close()


def server_url(text: str) -> URL:
    """A server's URL without the ``/v1`` that OpenAI clients expect at its end."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"{shown(text)} is no server's URL; expected one as http://localhost:8000")
    return URL(text.rstrip("/").removesuffix("/v1").rstrip("/"))


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class Playground:
    """The page, and the way to one server.

    Args:
        server: as :func:`server_url` returns it.
        host: that the page is served at. On loopback, requests must name it so.
        api_key: the server's.
    """

    def __init__(self, server: URL, host: str, api_key: str | None) -> None:
        self._server, self._host, self._api_key = server, host, api_key
        self._files = {path: ((PAGE_FOLDER / name).read_bytes(), kind) for path, (name, kind) in FILES.items()}

    async def start(self, port: int) -> int:
        """The port: of the host's, where 0 was asked for a free one."""
        app = web.Application(middlewares=[self._refuse_strangers], client_max_size=MAX_BODY)
        for path in FILES:
            app.router.add_get(path, self._send_file)
        app.router.add_get("/server.json", self._describe_server)
        for add in (app.router.add_get, app.router.add_post):
            add("/v1/{path:.*}", self._pass_on)
        # A connection each: one that was kept may have been closed by the server, and a POST is not sent twice.
        connector = TCPConnector(limit=0, force_close=True)
        timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
        self._session = ClientSession(connector=connector, timeout=timeout)
        # A client that left ends its request, and so the server's.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=STOP_SECONDS)
        try:
            await self._runner.setup()
            await web.TCPSite(self._runner, self._host, port).start()
        except BaseException:
            await self.stop()
            raise
        return self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    @web.middleware
    async def _refuse_strangers(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        named = urlsplit(f"//{request.host}").hostname
        if is_loopback(self._host) and named not in (*LOOPBACK, self._host):
            return error_response(403, f"this playground is {self._host}'s; --host makes it another's")
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            return error_response(403, f"a page of {shown(origin)} may not use this playground")
        return await handler(request)

    async def _send_file(self, request: web.Request) -> web.Response:
        body, kind = self._files[request.path]
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=HEADERS)

    async def _describe_server(self, request: web.Request) -> web.Response:
        """For the page's copies of requests, which go to the server itself."""
        return web.json_response({"server": str(self._server), "has_key": self._api_key is not None}, headers=HEADERS)

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        path = request.rel_url.raw_path
        if any(unquote(part) in (".", "..") for part in path.split("/")):
            return error_response(404, f"{shown(path)}: no such path")
        query = f"?{request.rel_url.raw_query_string}" if request.rel_url.raw_query_string else ""
        headers = {name: request.headers[name] for name in ("Content-Type", "Accept") if name in request.headers}
        headers["Accept-Encoding"] = "identity"
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        try:
            answer = await self._session.request(
                request.method,
                URL(f"{self._server}{path}{query}", encoded=True),
                headers=headers,
                data=await request.read(),
                allow_redirects=False,
            )
        except (ClientError, OSError) as error:
            return error_response(502, f"the server at {self._server} cannot be reached: {why(error)}")
        async with answer:
            if 300 <= answer.status < 400:
                to = answer.headers.get("Location", "nowhere")
                return error_response(502, f"{self._server} sends its clients to {shown(to)}; give that server's URL")
            if answer.content_type == "text/event-stream":
                return await self._stream(request, answer)
            try:
                body = await answer.read()
            except (ClientError, OSError) as error:
                return error_response(502, self._left(error))
            headers = {"Content-Type": answer.headers.get("Content-Type", "application/octet-stream")}
            return web.Response(body=body, status=answer.status, headers=headers | {"Cache-Control": "no-store"})

    async def _stream(self, request: web.Request, answer: ClientResponse) -> web.StreamResponse:
        """The server's events, as they come."""
        headers = {"Content-Type": answer.headers["Content-Type"], "Cache-Control": "no-store"}
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(request)
        with contextlib.suppress(ConnectionResetError):  # of a client that left: so does this, and the server stops
            async for piece in self._pieces(answer):
                await response.write(piece)
        return response

    async def _pieces(self, answer: ClientResponse) -> AsyncIterator[bytes]:
        """Of a stream; where it breaks off, an event at its end says so, worded as vLLM's own are."""
        try:
            while piece := await answer.content.readany():
                yield piece
        except (ClientError, OSError) as error:
            yield f"\n\ndata: {json.dumps(error_body(502, self._left(error)))}\n\n".encode()

    def _left(self, error: BaseException) -> str:
        return f"the server at {self._server} left in the middle of its answer: {why(error)}"


def error_body(status: int, words: str) -> dict:
    """An error in the form of vLLM's own."""
    return {"error": {"message": words, "type": "PlaygroundError", "param": None, "code": status}}


def error_response(status: int, words: str) -> web.Response:
    return web.json_response(error_body(status, words), status=status)


def why(error: BaseException) -> str:
    """Why a connection failed, in words."""
    if isinstance(error, asyncio.TimeoutError):
        return f"no connection in {CONNECT_SECONDS} seconds"
    cause = getattr(error, "os_error", error)
    number = getattr(cause, "errno", None)
    return os.strerror(number) if isinstance(number, int) and number > 0 else one_line(error)
