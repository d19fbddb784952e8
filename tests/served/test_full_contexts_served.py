"""A server whose reward model has fewer positions than its requests: how their answers end."""

from __future__ import annotations

import json

import pytest

from tests.engine.test_full_contexts import FULL, LONG, POSITIONS, room, short
from tests.support.server import Server

__all__ = ["short"]  # a fixture
pytestmark = pytest.mark.every_release


@pytest.fixture(scope="module")
def server(models, short, tmp_path_factory):
    pad = {"reward_model": str(short), "reference": "base"}
    pad |= {"default_persona": "house", "personas": {"house": {"preference": "say why"}}}
    server = Server(
        models.base,
        tmp_path_factory.mktemp("server") / "log",
        *("--max-model-len", "256", "--return-tokens-as-token-ids"),
        *("--logits-processors", "pad_vllm:PADLogitsProcessor", "--additional-config", json.dumps({"pad": pad})),
    )
    yield server
    server.close()


def xargs(asked: dict) -> dict:
    return {"vllm_xargs": {f"pad_{key}": value for key, value in asked.items()}}


def test_a_full_context_ends_an_answer_as_the_longest_of_the_model_does(server, encode, expect, compose):
    """By its length, which its client is told, whether it said how long or not; and so it does under a grammar, which
    allows no end there."""
    prompt = encode("You are asked to be")
    for asked in (*FULL, {}):
        read = asked or {"preference": "say why"}
        n = room(compose, prompt, **({"preference": "say why"} | read))
        body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "logprobs": 1} | xargs(asked)
        expected = expect(prompt, max_tokens=n, **({"preference": "say why"} | read))
        for more in ({"max_tokens": LONG}, {"max_tokens": 200, "min_tokens": 180}):
            status, answer = server.post("/v1/completions", body | more)
            assert status == 200, answer
            (choice,) = answer["choices"]
            tokens = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
            assert (tokens, choice["finish_reason"]) == (expected, "length")
    grammar = {"prompt": prompt, "temperature": 0, "max_tokens": LONG, "structured_outputs": {"regex": "[a-z ]{200,}"}}
    status, answer = server.post("/v1/completions", grammar | xargs(FULL[0]))
    assert (status, answer["choices"][0]["finish_reason"]) == (200, "length"), answer
    assert answer["usage"]["completion_tokens"] == room(compose, prompt, **FULL[0])
    status, answer = server.post("/v1/completions", {"prompt": [7] * POSITIONS, "max_tokens": 4})
    assert (status, "more than the reward model's" in answer["error"]["message"]) == (400, True)
