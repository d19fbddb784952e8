"""A real API server in a process of its own, on loopback."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from pad_vllm.loopback import free_port, wait_until_healthy
from tests.support.engine import KV_CACHE, OFFLINE, Preloaded, fork_processes, set_environment


def serve(
    arguments: list[str], log: Path, runner: str, preloaded: bool, environment: dict[str, str], folder: Path | None
) -> None:
    """``vllm serve``, in this process and those that it forks. (As it starts its own: test_docs.py.)"""
    os.setsid()
    if folder is not None:
        os.chdir(folder)
    os.environ.update(environment)
    set_environment(runner, multiprocess=True)
    del os.environ["VLLM_CPU_KVCACHE_SPACE"]
    os.environ["VLLM_LOGGING_LEVEL"] = "INFO"
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    fork_processes()
    if preloaded:
        tempfile.tempdir = None  # it was asked for before this environment was here
    from vllm.entrypoints.cli.main import main

    sys.argv = ["vllm", "serve", *arguments]
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing's own processes end without


class Process:
    """``vllm serve MODEL`` with ``args``, whatever it serves. ``environment`` is added to this process's. Not
    ``preloaded``: it imports vLLM in this environment (where Prometheus's client keeps counts, it decides when it is
    imported). ``folder``: from where it is started."""

    def __init__(
        self,
        model: Any,
        log: Path,
        *args: str,
        runner: str = "v1",
        preloaded: bool = True,
        folder: Path | None = None,
        **environment: str,
    ) -> None:
        arguments = [str(model), "--served-model-name", "base", "--dtype", "float32", "--enforce-eager", "--seed", "0"]
        arguments += ["--kv-cache-memory-bytes", str(KV_CACHE)]
        self.log = log
        context = Preloaded(runner) if preloaded else multiprocessing.get_context("spawn")
        environment = dict(os.environ) | OFFLINE | environment
        self._process = context.Process(
            target=serve, args=([*arguments, *args], log, runner, preloaded, environment, folder)
        )
        self._process.start()

    def close(self) -> None:
        self._process.terminate()
        self._process.join(30)
        if self._process.is_alive():
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.join()


class Server(Process):
    """One that answers HTTP, on a port of its own; made once it does."""

    def __init__(self, model: Any, log: Path, *args: str, timeout: float = 180, **settings: Any) -> None:
        self.port = free_port()
        super().__init__(model, log, "--host", "127.0.0.1", "--port", str(self.port), *args, **settings)
        try:
            wait_until_healthy(self._process.is_alive, self.port, log, timeout)
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
