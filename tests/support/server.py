"""A real API server in a process of its own, on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.support.engine import OFFLINE

FORK = {"VLLM_WORKER_MULTIPROCESSING_METHOD": "fork"}
"""An engine's process need not import vLLM again."""


def wait_until_healthy(process: subprocess.Popen, port: int, log: Path, timeout: float) -> None:
    """Wait for a server's answer; RuntimeError with the end of its log if it ends, or takes longer than ``timeout``."""
    deadline = time.monotonic() + timeout
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"the server did not come up:\n{log.read_text()[-4000:]}")


class Server:
    """``vllm serve`` with ``args``. ``environment`` is added to this process's."""

    def __init__(self, model: Any, log: Path, *args: str, timeout: float = 180, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "base"]
        command += ["--dtype", "float32", "--enforce-eager", "--seed", "0", *args]
        self.log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ
                | OFFLINE
                | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
                | FORK
                | environment,
            )
        try:
            wait_until_healthy(self._process, self.port, log, timeout)
        except BaseException:
            self.close()
            raise

    def get(self, path: str) -> tuple[int, str]:
        """HTTP status and body."""
        return self._send(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}"))

    def post(self, path: str, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
        """HTTP status and the JSON of the answer."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps({"model": "base"} | body).encode(),
            {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()},
        )
        status, text = self._send(request)
        return status, json.loads(text)

    @staticmethod
    def _send(request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
