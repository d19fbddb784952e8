"""Two engines behind one server, a reward model in each."""

from __future__ import annotations

import json
import os
import re

import pytest

from tests import oracle
from tests.support.engine import A_CORE_EACH
from tests.support.server import Server

PREFERENCE = "concise, formal"
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    pad = {"reward_model": str(models.named), "personas": {"terse": {"preference": PREFERENCE, "beta": 1.5}}}
    server = Server(
        models.base,
        tmp_path_factory.mktemp("server") / "log",
        *("--data-parallel-size", "2", "--max-model-len", "256", "--return-tokens-as-token-ids"),
        *("--logits-processors", "pad_vllm:PADLogitsProcessor", "--additional-config", json.dumps({"pad": pad})),
        timeout=300,
        VLLM_CPU_OMP_THREADS_BIND=A_CORE_EACH,
    )
    yield server
    server.close()


def complete(server: Server, prompt: list[int], rank: int, **body) -> list[int]:
    status, answer = server.post(
        "/v1/completions",
        {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 1} | body,
        X_data_parallel_rank=str(rank),
    )
    assert status == 200, answer
    return [int(token.removeprefix("token_id:")) for token in answer["choices"][0]["logprobs"]["tokens"]]


def test_each_engine_answers_as_the_oracle(models, encode, expect, server):
    for rank in (0, 1):
        for text in ("a", "say why " * 12):
            prompt = encode(text)
            for xargs, asked in (
                ({"pad_preference": "playful"}, {"preference": "playful"}),
                ({"pad_persona": "terse"}, {"preference": PREFERENCE, "beta": 1.5}),
            ):
                out = complete(server, prompt, rank, vllm_xargs=xargs)
                assert out == expect(prompt, max_tokens=MAX_TOKENS, **asked)
            assert complete(server, prompt, rank) == oracle.generate(models.base_model, prompt, MAX_TOKENS)
    log = server.log.read_text()
    assert log.count("PAD guidance by") == 2
    for rank in (0, 1):
        assert f"EngineCore_DP{rank}" in log


def test_both_engines_show_in_the_metrics_of_both_api_servers(encode, server):
    """Data parallelism has an API server for each engine, which collect what they count from files."""
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
    for rank in (0, 1):
        complete(server, encode("a"), rank, vllm_xargs={"pad_persona": "terse"})
    for _ in range(4):  # whichever answers
        text = server.get("/metrics")[1]
        shown = dict(re.findall(r'^pad_guided_requests_total\{engine="(\d)",model_name="base"\} (\S+)$', text, re.M))
        assert set(shown) == {"0", "1"}
        assert all(float(number) >= 1 for number in shown.values())
        assert len(re.findall(r"^pad_kv_cache_usage_perc\{", text, re.M)) == 2


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_beam_search_with_guidance_is_refused(server, path):
    """vLLM would drop the arguments, and answer unguided."""
    prompt = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    beams = prompt | {"use_beam_search": True, "n": 2, "max_tokens": 4}
    assert server.post(path, beams)[0] == 200
    status, answer = server.post(path, beams | {"vllm_xargs": {"pad_preference": "formal"}})
    assert status == 400
    assert "pad_preference: beam search cannot be guided" in answer["error"]["message"]
    status, answer = server.post(path, prompt | {"max_tokens": 4, "vllm_xargs": {"pad_prefrence": "formal"}})
    assert status == 400
    assert "did you mean 'pad_preference'" in answer["error"]["message"]
