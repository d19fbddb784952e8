"""Prefill and decode apart: the engine that answers never computed the prompt, and got its keys and values by a KV
connector; the reward model's contexts it computes itself."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.nodes import ASKED, MAX_TOKENS, Node, complete
from tests.support.server import Server

BLOCK_SIZE = 32
TEXTS = [f"{text} " * 36 for text in ("say why", "formal playful", "a", "concise, why", "say a")]


@pytest.fixture(scope="module", params=["v1", pytest.param("v2", marks=[pytest.mark.one_release, pytest.mark.weekly])])
def servers(request, models, tmp_path_factory):
    """One that computes prompts, and one that answers."""
    root = tmp_path_factory.mktemp("apart")

    def start(rank: int, role: str) -> Server:
        node = Node(root, rank)
        connector = {
            "kv_connector": "ExampleConnector",
            "kv_role": role,
            "kv_connector_extra_config": {"shared_storage_path": str(root / "kv")},
        }
        server = Server(
            *(models.base, node.log, "--max-model-len", "256", "--return-tokens-as-token-ids"),
            *("--block-size", str(BLOCK_SIZE), "--kv-transfer-config", json.dumps(connector)),
            *node.pad(models.named),
            runner=request.param,
            **node.environment,
        )
        server.node = node  # whose folders go with it
        return server

    with ThreadPoolExecutor(2) as pool:
        starting = [pool.submit(start, rank, role) for rank, role in enumerate(("kv_producer", "kv_consumer"))]
    try:
        yield [server.result() for server in starting]
    finally:
        for server in starting:
            if server.exception() is None:
                server.result().close()


def test_a_decode_only_engine_equals_the_oracle(models, encode, expect, servers):
    prefill, decode = servers
    for text, (xargs, asked) in zip(TEXTS, [*ASKED, ({}, None)], strict=True):
        prompt = encode(text)
        num_sent = (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert num_sent >= BLOCK_SIZE
        if asked is None:
            expected = models.ask(tuple(prompt), None, None, False, max_tokens=MAX_TOKENS)
        else:
            expected = expect(prompt, max_tokens=MAX_TOKENS, **asked)
        assert complete(prefill, prompt, 1, vllm_xargs=xargs) == expected[:1]
        before = decode.log.read_text().count(f"Inject KV cache of {num_sent} tokens")
        assert complete(decode, prompt, vllm_xargs=xargs) == expected, (text, xargs)
        assert decode.log.read_text().count(f"Inject KV cache of {num_sent} tokens") == before + 1
