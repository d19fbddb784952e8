"""A base and a reward model of one family, whose control tokens differ, in the engine."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from tests import oracle
from tests.support.engine import PLUGIN, Engine, greedy, pad_config
from tests.support.models import make_model
from tests.unit.test_compatibility import CONTROL, KNOWN, save


def test_what_the_reward_model_does_not_know_is_no_candidate(tmp_path, models, compose, encode):
    """In the engine, whatever a bias says; the oracle's answer with these tokens masked."""
    wide = make_model(tmp_path / "wide", seed=0, vocab_size=520)
    base = save(tmp_path / "base", wide, CONTROL, renamed={"<|user|>": "<|reserved_3|>"})
    base_model = AutoModelForCausalLM.from_pretrained(wide)
    prompts = [encode("You are asked to be concise"), encode("why")]
    bias = {3: 100.0, KNOWN + 1: 100.0, 513: 100.0, 60: 2.0}
    engine = Engine("v1", base, logits_processors=PLUGIN, **pad_config(models.reward))
    try:
        params = greedy(16, preference="formal", beta=1.2) | {"logit_bias": bias}
        out = engine.generate([*prompts, prompts[0]], [params, params, greedy(4) | {"logit_bias": {3: 100.0}}])
    finally:
        engine.close()
    unknown = torch.tensor([3, KNOWN, KNOWN + 1, KNOWN + 2, *range(512, 520)])
    assert out == [
        *(
            oracle.generate(
                base_model,
                prompt,
                16,
                reward=PaddedReward(models.reward_model, 520),
                reward_prompt_ids=compose(prompt, "formal"),
                top_k=10,
                beta=1.2,
                mask=lambda y, output: y.index_fill(0, unknown, float("-inf")),
                logit_bias=bias,
            )
            for prompt in prompts
        ),
        [3] * 4,
    ]


class PaddedReward(torch.nn.Module):
    """A reward model whose logits are as wide as the base's."""

    def __init__(self, model: torch.nn.Module, vocab_size: int) -> None:
        super().__init__()
        self.model, self.vocab_size = model, vocab_size

    def forward(self, input_ids: torch.Tensor):
        output = self.model(input_ids)
        missing = self.vocab_size - output.logits.shape[-1]
        output.logits = torch.nn.functional.pad(output.logits, (0, missing), value=float("-inf"))
        return output
