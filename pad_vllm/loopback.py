"""A server of our own on loopback: a port for it, and waiting until it answers."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until_healthy(is_running: Callable[[], bool], port: int, log: Path, timeout: float) -> None:
    """Wait until ``/health`` answers.

    Args:
        is_running: whether the server's process lives.
        log: the file that it writes to.
        timeout: seconds.

    Raises:
        ChildProcessError: the process ended, or took longer than ``timeout``; with the end of its log.
    """
    deadline = time.monotonic() + timeout
    while is_running() and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise ChildProcessError(f"the server did not come up:\n{log.read_text()[-4000:]}")
