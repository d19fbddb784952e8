"""The playground's own server: the page, and what it passes on, to a small server that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from pad_vllm.playground.server import PAGE_FOLDER, playground, server_url

KEY = "a key that nobody sees"
MAX_BYTES = 60_000


class Upstream:
    """A server in a thread: what it was asked, and what it does next."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict, bytes]] = []
        self.may_go_on, self.was_left = threading.Event(), threading.Event()
        self._loop = asyncio.new_event_loop()
        self._runner = web.AppRunner(self._app(), handler_cancellation=True, access_log=None)
        self._loop.run_until_complete(self._runner.setup())
        self._loop.run_until_complete(web.TCPSite(self._runner, "127.0.0.1", 0).start())
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_route("*", "/api/v1/{what:.*}", self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.raw_path, dict(request.headers), await request.read()))
        what = request.match_info["what"]
        if what == "moved":
            raise web.HTTPTemporaryRedirect("https://elsewhere.example/v1/moved")
        if what == "refused":
            return web.json_response({"error": {"message": "pad_beta=101: must be between 0 and 100"}}, status=400)
        if what not in ("stream", "flood", "dies", "dies-whole"):
            return web.json_response({"data": []})
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        if what != "dies-whole":
            response.content_type, response.charset = "text/event-stream", "utf-8"
        await response.prepare(request)
        try:
            await response.write(b'data: {"choices": "first"}\n\ndata: {"cho')
            while not self.may_go_on.is_set():
                if what == "flood":
                    await response.write(b": more\n\n")
                await asyncio.sleep(0 if what == "flood" else 0.01)
        except (asyncio.CancelledError, ConnectionResetError):
            self.was_left.set()
            return response
        if what.startswith("dies"):
            request.transport.abort()
            return response
        await response.write(b'ices": "second"}\n\ndata: [DONE]\n\n')
        return response

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    upstream = Upstream()
    yield upstream
    upstream.close()


@pytest.fixture
def page(upstream) -> Iterator[str]:
    with playground(f"{upstream.url}/api/v1/", api_key=KEY) as url:
        yield url


@contextlib.contextmanager
def request(page: str, method: str, path: str, body: bytes | None = None, **headers: str):
    connection = HTTPConnection(urlsplit(page).netloc, timeout=20)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        yield connection.getresponse()
    finally:
        connection.close()


def get(page: str, path: str, **headers: str) -> tuple[int, str]:
    with request(page, "GET", path, **headers) as answer:
        return answer.status, answer.read().decode()


def test_the_page_is_small_and_needs_nobody_else(page):
    total = 0
    for path, kind in (("/", "text/html"), ("/playground.js", "text/javascript"), ("/playground.css", "text/css")):
        with request(page, "GET", path) as answer:
            body = answer.read()
            assert (answer.status, answer.headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert not re.search(rb"""(src|href|url|import|from)[=(\s]*["']?\s*(https?:)?//""", body)
        total += len(body)
    assert 10_000 < total < MAX_BYTES
    assert {path.name for path in PAGE_FOLDER.iterdir()} == {"index.html", "playground.js", "playground.css"}


def test_requests_are_passed_on_with_the_key_which_the_page_does_not_see(page, upstream):
    told = get(page, "/server.json")
    assert told == (200, json.dumps({"server": f"{upstream.url}/api", "has_key": True}))
    sent = b'{"prompt": "\xc3\xa9"}'
    with request(
        page, "POST", "/v1/a%2Fb?c=%20d", sent, Content_Type="application/json", Authorization="Bearer x", Cookie="y"
    ) as answer:
        assert (answer.status, json.load(answer)) == (200, {"data": []})
    ((method, path, headers, body),) = upstream.asked
    assert (method, path, body) == ("POST", "/api/v1/a%2Fb?c=%20d", sent)
    assert (headers["Authorization"], headers["Content-Type"]) == (f"Bearer {KEY}", "application/json")
    assert "Cookie" not in headers
    assert upstream.asked[0][2]["Connection"] == "close"  # one that was kept may break as the next request is sent
    assert get(page, "/v1/refused") == (400, '{"error": {"message": "pad_beta=101: must be between 0 and 100"}}')


def test_a_stream_comes_as_it_is_written(page, upstream):
    with request(page, "POST", "/v1/stream", b"{}") as answer:
        first = answer.read1()
        assert first == b'data: {"choices": "first"}\n\ndata: {"cho'
        upstream.may_go_on.set()  # what is read now was not there before
        assert answer.read() == b'ices": "second"}\n\ndata: [DONE]\n\n'
        assert answer.headers["Content-Type"].startswith("text/event-stream")


@pytest.mark.parametrize(("path", "times"), [("/v1/stream", 1), ("/v1/flood", 100)])
def test_who_leaves_ends_the_servers_work(page, upstream, caplog, path, times):
    """And is no error that somebody had to read."""
    for _ in range(times):
        upstream.was_left.clear()
        with request(page, "POST", path, b"{}") as answer:
            answer.read1()
            answer.close()
        assert upstream.was_left.wait(20)
    assert caplog.text == ""


def test_a_server_that_dies_says_so_in_the_stream(page, upstream):
    with request(page, "POST", "/v1/dies", b"{}") as answer:
        answer.read1()
        upstream.may_go_on.set()
        last = answer.read().decode().split("\n\n")
    assert last[0] == ""  # the event that was cut off ends
    words = json.loads(last[1].removeprefix("data: "))["error"]["message"]
    assert words.startswith(f"the server at {upstream.url}/api left in the middle of its answer: ")


def test_a_server_that_dies_within_another_answer_is_502(page, upstream):
    upstream.may_go_on.set()
    status, body = get(page, "/v1/dies-whole")
    assert status == 502
    assert "left in the middle of its answer" in json.loads(body)["error"]["message"]


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with playground(url) as page:
            status, body = get(page, "/v1/models")
            assert (status, get(page, "/")[0]) == (502, 200)
    assert json.loads(body)["error"]["message"] == f"the server at {url} cannot be reached: Connection refused"


def test_a_redirect_is_not_followed_with_the_key(page):
    status, body = get(page, "/v1/moved")
    words = json.loads(body)["error"]["message"]
    assert status == 502
    assert words.endswith("sends its clients to 'https://elsewhere.example/v1/moved'; give that server's URL")


@pytest.mark.parametrize("path", ["/metrics", "/v1", "/v1/../metrics", "/v1/%2e%2e/metrics", "/v1/a/%2E./b", "/x.js"])
def test_nothing_else_of_the_server_is_reached(page, upstream, path):
    assert get(page, path)[0] == 404
    assert upstream.asked == []


def test_other_sites_of_the_browser_cannot_use_it(page, upstream):
    """By a name of theirs that resolves to this machine, or by a form of theirs."""
    own = urlsplit(page)
    for headers in (
        {"Host": f"evil.example:{own.port}"},
        {"Host": own.netloc, "Origin": "https://evil.example"},
        {"Host": own.netloc, "Origin": f"http://127.0.0.1:{own.port + 1}"},
        {"Host": own.netloc, "Origin": "null"},
    ):
        with request(page, "POST", "/v1/completions", b"{}", **headers) as answer:
            assert answer.status == 403, headers
    assert upstream.asked == []
    for host in (own.netloc, f"localhost:{own.port}"):
        with request(page, "POST", "/v1/completions", b"{}", Host=host, Origin=f"http://{host}") as answer:
            assert answer.status == 200


def test_the_servers_url_is_taken_as_people_have_it():
    for url in ("http://a:1", "http://a:1/", "http://a:1/v1", "http://a:1/v1/"):
        assert str(server_url(url)).rstrip("/") == "http://a:1"
    assert str(server_url("https://[::1]:8000/api/v1")) == "https://[::1]:8000/api"
    for url in ("localhost:8000", "a", "ftp://a", "http://", "http://a?b=c", ""):
        with pytest.raises(ValueError, match="is no server's URL; expected one as http://localhost:8000"):
            server_url(url)


def run_cli(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "pad_vllm.cli", "playground", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_the_command_serves_until_it_is_stopped(upstream):
    process = run_cli(f"{upstream.url}/api/v1", "--port", "0", VLLM_API_KEY=KEY)
    try:
        line = process.stdout.readline()
        page = re.fullmatch(r"The playground of \S+: (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", line)[1]
        assert get(page, "/v1/models")[0] == 200
        assert upstream.asked[0][2]["Authorization"] == f"Bearer {KEY}"
        taken = run_cli(upstream.url, "--port", str(urlsplit(page).port))
        words = taken.communicate(timeout=60)[1]
        assert taken.returncode == 1
        assert re.fullmatch(r"error: .*address already in use.*\n", words)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("", "")
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_the_command_needs_neither_vllm_nor_torch():
    """It is for a laptop too."""
    code = (
        "import sys; sys.modules |= {'vllm': None, 'torch': None}; from pad_vllm.cli import main\n"
        "main(['playground', 'not a URL'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "error: 'not a URL' is no server's URL; expected one as http://localhost:8000\n"


def test_a_key_at_an_open_address_is_warned_of(upstream):
    process = run_cli(upstream.url, "--host", "0.0.0.0", "--port", "0", "--api-key", KEY)
    try:
        assert process.stderr.readline() == "warning: whoever reaches 0.0.0.0 uses the server with your API key\n"
        assert process.stdout.readline().startswith("The playground of ")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
