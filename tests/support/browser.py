"""A headless Chromium of the system's, driven by its DevTools protocol through a pair of pipes.

No package is needed for it: what a test does to a page is a few of the protocol's commands, with real events of keys
and of the mouse.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MISSING = "no Chromium: install the system's (`apt-get install chromium`), and this runs"
TIMEOUT = 60
KEYS = {  # name -> code, number, what it types
    "Enter": ("Enter", 13, "\r"),
    "Escape": ("Escape", 27, ""),
    "Backspace": ("Backspace", 8, ""),
    "Tab": ("Tab", 9, ""),
    "ArrowUp": ("ArrowUp", 38, ""),
    "ArrowDown": ("ArrowDown", 40, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""),
    "ArrowRight": ("ArrowRight", 39, ""),
    "Home": ("Home", 36, ""),
    "a": ("KeyA", 65, ""),
}
CONTROL, SHIFT = 2, 8


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser, with one page."""

    def __init__(self, executable: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        theirs, self._write = os.pipe()
        self._read, answers = os.pipe()
        options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"]
        options += ["--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
        # It reads from 3, and writes to 4.
        command = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{answers}', "bash", executable, *options, "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(theirs, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs)
        os.close(answers)
        self._buffer, self._next_id, self._session = b"", 0, None
        self.events: list[tuple[str, dict[str, Any]]] = []
        """What the page's domains reported: method, and parameters."""
        (target,) = [t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def send(self, method: str, timeout: float = TIMEOUT, **params: Any) -> dict[str, Any]:
        """A command's result; RuntimeError where the browser refuses it, or does not answer."""
        self._next_id += 1
        message = {"id": self._next_id, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + timeout
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._next_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            if "method" in answer:
                self.events.append((answer["method"], answer["params"]))

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise RuntimeError("Chromium does not answer")
            piece = os.read(self._read, 1 << 20)
            if not piece:
                raise RuntimeError(f"Chromium ended, with status {self._process.wait()}")
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is there."""
        self.send("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def evaluate(self, expression: str, timeout: float = TIMEOUT) -> Any:
        """The value of JavaScript on the page, awaited; AssertionError where it throws."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        found = self.send("Runtime.evaluate", timeout, **asked)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, condition: str, timeout: float = TIMEOUT) -> Any:
        """The first true value of an expression; AssertionError with the page's text if there is none in time."""
        deadline = time.monotonic() + timeout
        while not (value := self.evaluate(condition)):
            assert time.monotonic() < deadline, f"{condition}\n{self.evaluate('document.body.innerText')}"
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")

    def hover(self, selector: str, nth: int = 0) -> tuple[float, float]:
        """Move the mouse into the middle of an element's first box; returns where that is."""
        x, y = self.evaluate(
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{nth}];"
            "e.scrollIntoView({block: 'center'}); const b = e.getClientRects()[0];"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def click(self, selector: str, nth: int = 0) -> None:
        x, y = self.hover(selector, nth)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, modifiers: int = 0, times: int = 1) -> None:
        code, number, text = KEYS[key]
        pressed = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        for _ in range(times):
            typed = {"text": text} if text and not modifiers else {}
            self.send("Input.dispatchKeyEvent", type="keyDown" if typed else "rawKeyDown", **pressed, **typed)
            self.send("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def type(self, selector: str, text: str, nth: int = 0) -> None:
        """Replace a field's text, as a person would: click, select all, type."""
        self.click(selector, nth)
        self.press("a", CONTROL)
        self.send("Input.insertText", text=text)

    def select(self, selector: str, value: str) -> None:
        """Choose an option by the arrow keys: a list that is open is drawn by the system, and not on the page."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{field}.scrollIntoView({{block: 'center'}}), {field}.focus()")
        there, wanted = self.evaluate(
            f"[{field}.selectedIndex, [...{field}.options].findIndex(o => o.value === {json.dumps(value)})]"
        )
        assert wanted >= 0, f"{selector} has no option {value!r}"
        self.press("ArrowDown" if wanted > there else "ArrowUp", times=abs(wanted - there))
        assert self.evaluate(f"{field}.value") == value

    def resize(self, width: int, height: int, is_phone: bool = False, scale: float = 1) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": is_phone}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme: str) -> None:
        """``light`` or ``dark``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> None:
        """Of what is seen of the page, as PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def requested(self) -> set[str]:
        """URLs of all that was requested since the start."""
        self.evaluate("1")
        return {params["request"]["url"] for method, params in self.events if method == "Network.requestWillBeSent"}

    def complaints(self) -> list[str]:
        """What the page's console and its exceptions say."""
        self.evaluate("1")
        wrong: dict[str, Callable[[dict[str, Any]], str]] = {
            "Runtime.exceptionThrown": lambda p: p["exceptionDetails"]["text"],
            "Log.entryAdded": lambda p: f"{p['entry']['text']} {p['entry'].get('url', '')}",
            "Runtime.consoleAPICalled": lambda p: str(p["args"]),
        }
        return [wrong[method](params) for method, params in self.events if method in wrong]
