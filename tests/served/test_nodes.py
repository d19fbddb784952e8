"""A server whose engines, or the ranks of whose engine, are on other machines than its API server."""

from __future__ import annotations

import pytest

from pad_vllm.loopback import free_port
from tests.support.nodes import (
    Node,
    another_server,
    check_answers,
    check_own_alone,
    complete,
    guided_requests,
    own_address,
)
from tests.support.server import Process, Server

FLAGS = ("--max-model-len", "256", "--return-tokens-as-token-ids")


@pytest.fixture(scope="module")
def two_nodes(models, tmp_path_factory):
    """Tensor parallelism over two nodes, the second of which has no API server."""
    root = tmp_path_factory.mktemp("nodes")
    shared = root / "shared" / "pad"
    nodes = [Node(root, rank, shared) for rank in (0, 1)]
    flags = (*FLAGS, "--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1")
    flags += ("--master-port", str(free_port()))
    second, first = None, None
    try:
        second = Process(
            *(models.base, nodes[1].log, *flags, "--node-rank", "1", "--headless", *nodes[1].pad(models.named)),
            **nodes[1].environment,
        )
        first = Server(
            *(models.base, nodes[0].log, *flags, "--node-rank", "0", *nodes[0].pad(models.named)),
            **nodes[0].environment,
        )
        first.nodes, first.shared = nodes, shared
        yield first
    finally:
        for process in (first, second):
            if process is not None:
                process.close()


def test_tensor_parallel_over_two_nodes_equals_the_oracle(models, encode, expect, two_nodes):
    check_answers(two_nodes, models, encode, expect)
    logs = [node.log.read_text() for node in two_nodes.nodes]
    assert [log.count("PAD guidance by") for log in logs] == [1, 1]
    assert guided_requests(two_nodes) == {"0": 4.0}
    assert [len(node.announcements()) for node in two_nodes.nodes] == [0, 0]
    assert len(list(two_nodes.shared.glob("*.json"))) == 2
    with another_server(two_nodes.shared):
        check_own_alone(two_nodes)


@pytest.fixture(scope="module")
def engines_apart(models, tmp_path_factory):
    """Two engines on a machine without an API server, two API servers on a machine without an engine."""
    root = tmp_path_factory.mktemp("apart")
    shared = root / "shared" / "pad"
    frontend, engines = (Node(root, rank, shared) for rank in (0, 1))
    flags = (*FLAGS, "--data-parallel-size", "2", "--data-parallel-address", own_address())
    flags += ("--data-parallel-rpc-port", str(free_port()))
    del engines.environment["VLLM_CPU_OMP_THREADS_BIND"]
    there, here = None, None
    try:
        there = Process(
            *(models.base, engines.log, *flags, "--data-parallel-size-local", "2", "--headless"),
            *engines.pad(models.named),
            **engines.environment | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        )
        here = Server(
            *(models.base, frontend.log, *flags, "--data-parallel-size-local", "0", *frontend.pad(models.named)),
            **frontend.environment,
        )
        here.engines, here.shared = engines, shared
        yield here
    finally:
        for process in (here, there):
            if process is not None:
                process.close()


def test_engines_of_another_machine_equal_the_oracle(models, encode, expect, engines_apart):
    for rank in (0, 1):
        check_answers(engines_apart, models, encode, expect, rank=rank)
    assert "PAD guidance by" not in (engines_apart.log).read_text()
    assert engines_apart.engines.log.read_text().count("PAD guidance by") == 2
    with another_server(engines_apart.shared):
        check_own_alone(engines_apart)


def test_their_numbers_are_in_the_metrics_of_every_api_server(encode, engines_apart):
    for rank in (0, 1):
        complete(engines_apart, encode("a"), 4, rank=rank, vllm_xargs={"pad_persona": "terse"})
    shown = [guided_requests(engines_apart) for _ in range(8)]  # whichever answers
    assert shown == [{"0": 5.0, "1": 5.0}] * 8
