"""Tensor parallelism over two nodes of Ray. Ray is no dependency of ours or of vLLM's CPU build: where it is installed,
this runs."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec

import psutil
import pytest

from pad_vllm.channel import ANNOUNCE_DIR
from pad_vllm.loopback import free_port, wait_until_healthy
from tests.support.engine import OFFLINE
from tests.support.nodes import Node, another_server, check_answers, check_own_alone, guided_requests
from tests.support.ray_platform import install
from tests.support.server import Server

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="pip install ray, to test its executor")

RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--num-gpus=1", "--block"]
RAY += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000", "--disable-usage-stats"]


class TypedServer(Server):
    """``vllm serve`` in a process that imports all by itself, as Ray's workers do."""

    def __init__(self, model, node: Node, *args: str, environment: dict[str, str]) -> None:
        self.port, self.log = free_port(), node.log
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(self.port)]
        command += ["--host", "127.0.0.1", "--served-model-name", "base", "--dtype", "float32", "--enforce-eager"]
        self.started = Started([*command, *args], node, environment)
        try:
            wait_until_healthy(self.started.is_running, self.port, self.log, 300)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.started.close()


class Started:
    """A command that runs on a node, until it is closed."""

    def __init__(self, command: list[str], node: Node, environment: dict[str, str]) -> None:
        self.log = node.log.open("a")
        self._process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, env=environment)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def num_ranks(self) -> int:
        """Of vLLM's ranks that this node of Ray's runs."""
        processes = psutil.Process(self._process.pid).children(recursive=True)
        return sum("RayWorkerProc" in " ".join(process.cmdline()) for process in processes)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self.log.close()


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    """The announcements' folder is told to the server alone: its environment reaches Ray's workers."""
    root = tmp_path_factory.mktemp("ray")
    shared = root / "shared" / "pad"
    nodes = [Node(root, rank) for rank in (0, 1)]
    port = free_port()
    address = f"127.0.0.1:{port}"
    common = os.environ | OFFLINE | {"PYTHONPATH": install(root / "plugin"), "VLLM_CPU_KVCACHE_SPACE": "1"}
    common |= {"RAY_ADDRESS": address, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    common |= {"PYTHONDONTWRITEBYTECODE": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    common.pop(ANNOUNCE_DIR, None)
    sessions = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # a socket's path must be short
    head = [f"--port={port}", "--head", "--include-dashboard=false", f"--temp-dir={sessions.name}"]
    started: list = []
    try:
        for node, arguments in zip(nodes, (head, [f"--address={address}"]), strict=True):
            started.append(Started([*RAY, *arguments], node, common | node.environment))
            wait_for_port(port)
        server = TypedServer(
            *(models.base, nodes[0], "--max-model-len", "256", "--return-tokens-as-token-ids", "--seed", "0"),
            *("--tensor-parallel-size", "2", "--distributed-executor-backend", "ray", *nodes[0].pad(models.named)),
            environment=common | nodes[0].environment | {ANNOUNCE_DIR: str(shared)},
        )
        started.append(server)
        server.shared, server.nodes = shared, started[:2]
        yield server
    finally:
        for each in reversed(started):
            each.close()
        sessions.cleanup()


def wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return
        time.sleep(0.3)
    raise RuntimeError("Ray's head did not come up")


def test_tensor_parallel_over_two_ray_nodes_equals_the_oracle(models, encode, expect, server):
    check_answers(server, models, encode, expect)
    assert guided_requests(server) == {"0": 4.0}
    assert len(list(server.shared.glob("*.json"))) == 2
    assert [node.num_ranks() for node in server.nodes] == [1, 1]
    with another_server(server.shared):
        check_own_alone(server)
