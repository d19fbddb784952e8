"""Model Runner V2's decode path reads nothing back from the device.

On a CPU nothing would wait, so what is watched is the reads themselves: every way in which our own code could look at a
tensor's values on the host.
"""

from __future__ import annotations

import pytest

from tests import oracle
from tests.support.engine import PLUGIN, Engine, engine_stats, guided, pad_config, running_guidance
from tests.support.reads import Watch

pytestmark = pytest.mark.every_release


def watch_steps(llm, prompts: list[list[int]], params: list[dict]) -> tuple[list[str], list[str], list[str]]:
    """Reads in the first step, in ten steps of decoding, and in one after the reward KV cache was lost."""
    from vllm import SamplingParams

    rule = running_guidance(llm).rule

    def as_on_a_device(logits, hidden_states, head, rows, *args, _guide=rule.guide_, **kwargs):
        _guide(logits, hidden_states, head, rows._replace(may_read=False), *args, **kwargs)

    rule.guide_ = as_on_a_device
    for i, (prompt, asked) in enumerate(zip(prompts, params, strict=True)):
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, SamplingParams(**asked))
    reads = []
    for num_steps, lose in ((1, False), (3, False), (10, False), (1, True)):
        if lose:
            running_guidance(llm).engine.blocks.reset()
        with Watch() as watch:
            for _ in range(num_steps):
                llm.llm_engine.step()
        reads.append(watch.reads)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return reads[0], reads[2], reads[3]


@pytest.mark.one_release
def test_decoding_reads_nothing_back(models, encode, expect):
    """With drafts and without; and what is generated so, by kernels that may not look, is what it should be."""
    params = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
    prompts = [encode(f"answer {i}") for i in range(4)]
    several = {"preference": ["formal", "kind"], "preference_weights": [1, -0.5], "reference": "neutral"}
    expected = [
        oracle.generate(models.base_model, prompts[0], 24),
        expect(prompts[1], max_tokens=24, **several),
        expect(prompts[3], max_tokens=24, beta=0.5),
    ]
    for drafts in (0, 2):
        controls = {"repetition_penalty": 1.2, "frequency_penalty": 0.5}
        controls |= {} if drafts else {"logit_bias": {7: 2.0}}  # vLLM refuses it beside drafts
        asked = [
            params,
            params | guided(**several),
            params | guided(preference="formal", weights=[1.0, 0.0, 0.5]) | controls,
            params | guided(beta=0.5),
        ]
        speculative = {"method": "draft_model", "model": str(models.base), "num_speculative_tokens": drafts}
        engine = Engine(
            "v2",
            models.base,
            logits_processors=PLUGIN,
            max_model_len=128,
            **({"speculative_config": speculative} if drafts else {}),
            **pad_config(models.named),
        )
        try:
            first, decoding, lost = engine.call(watch_steps, prompts, asked)
            out = engine.generate(prompts, asked)
            evicted = engine.call(engine_stats)["evicted"]
        finally:
            engine.close()
        assert decoding == []
        assert [out[0], out[1], out[3]] == expected
        assert evicted == 0
        assert first, "a new request's tokens are read once, or nothing was watched"
        assert any("_output_ids" in read for read in lost)
