"""One set of weights: the served model guides itself, and adapters over it do; against the oracle, on both runners."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import oracle
from tests.engine.test_engine import GREEDY, PROMPTS
from tests.support.engine import PLUGIN, Engine, guided, running_guidance
from tests.support.fixtures import MAX_TOKENS, Models
from tests.support.models import make_adapter

TEXTS = ["concise, formal", "Please be playful."]
PATTERN = {"rank_pattern": {"o_proj": 12}}
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


class Adapted:
    """The base model with adapters: as PEFT folders, and merged for the oracle."""

    def __init__(self, root: Path, models: Models) -> None:
        self.models = models
        made = {
            "warm": {"seed": 11, "rank": 4, "targets": ["q_proj", "v_proj"]},  # of what vLLM packs, a part
            "dry": {"seed": 12, "rank": 8, "targets": ATTENTION + MLP},
            "odd": {
                "seed": 13,
                "rank": 3,
                "targets": ["up_proj", "o_proj"],
                "use_rslora": True,
                "rank_pattern": {"o_proj": 12},
            },
        }
        self.paths = {name: str(root / name) for name in made}
        self.merged = {name: make_adapter(root / name, models.base, **how) for name, how in made.items()}
        self.merged[None] = models.base_model

    def expect(self, compose, prompt, preference=None, adapter=None, preference_weights=None, **settings) -> list[int]:
        """What a request should generate."""
        num = next((len(one) for one in (preference, adapter) if isinstance(one, list)), 1)
        texts, names = (one if isinstance(one, list) else [one] * num for one in (preference, adapter))
        contexts = [prompt if text is None else compose(prompt, text) for text in texts]
        return oracle.generate(
            self.models.base_model,
            prompt,
            settings.pop("max_tokens", MAX_TOKENS),
            reward=self.models.base_model,
            reward_prompt_ids=contexts,
            adapted=[self.merged[name] for name in names],
            weights=preference_weights,
            eos_token_id=None,
            **settings,
        )


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Adapted:
    return Adapted(tmp_path_factory.mktemp("adapters"), models)


@pytest.fixture(scope="module")
def engine(models: Models, adapted: Adapted, runner: str):
    personas = {"both": {"adapter": ["warm", "dry"], "preference_weights": [0.7, 0.5]}}
    pad = {"reward_model": "base", "adapters": adapted.paths, "personas": personas, "max_num_batched_tokens": 48}
    engine = Engine(
        runner, models.base, logits_processors=PLUGIN, max_num_batched_tokens=64, additional_config={"pad": pad}
    )
    yield engine
    engine.close()


ITSELF = [
    {"preference": TEXTS[0]},
    {"preference": TEXTS[0], "beta": 1.5},
    {"preference": TEXTS, "preference_weights": [1.0, -0.5]},
    {"preference": TEXTS[1], "preference_weights": [-1.0], "beta": 0.5},
]
ADAPTERS = [
    {"adapter": "warm"},
    {"adapter": "dry", "beta": 0.7},
    {"adapter": "odd", "beta": 1.5},
    {"adapter": ["warm", "dry"], "preference_weights": [0.7, 0.5]},
    {"adapter": ["warm", "odd", "dry"], "preference_weights": [1.0, -0.5, 0.3]},
    {"adapter": "dry", "preference": TEXTS[0]},
    {"adapter": ["dry", "odd"], "preference": TEXTS[0]},
    {"adapter": "warm", "preference": TEXTS},
    {"adapter": ["odd", "warm"], "preference": TEXTS, "preference_weights": [1.0, -0.5]},
]


def test_the_served_model_and_its_adapters_equal_the_oracle_in_one_batch(
    encode, compose, engine, adapted, models, runner
):
    """Every reference, among unguided requests and one that asks by a persona."""
    max_tokens = 32
    prompts, params, expected = [], [], []
    for i, (asked, reference) in enumerate(itertools.product(ITSELF + ADAPTERS, ["base", "neutral", "none"])):
        prompt = encode(PROMPTS[i % len(PROMPTS)])
        rule = {"top_k": 10, "beta": 1.0, "reference": reference} | asked
        prompts.append(prompt)
        params.append(GREEDY | {"max_tokens": max_tokens} | guided(**rule))
        expected.append(adapted.expect(compose, prompt, max_tokens=max_tokens, **rule))
        if i % 9 == 0:
            prompts.append(prompt)
            params.append(GREEDY | {"max_tokens": max_tokens})
            expected.append(oracle.generate(models.base_model, prompt, max_tokens))
    both = {"adapter": ["warm", "dry"], "preference_weights": [0.7, 0.5], "reference": "base"}
    prompts.append(prompts[0])
    params.append(GREEDY | {"max_tokens": max_tokens} | guided(persona="both"))
    expected.append(adapted.expect(compose, prompts[0], max_tokens=max_tokens, **both))
    found = engine.generate(prompts, params)
    wrong = [(p.get("extra_args"), f, e) for p, f, e in zip(params, found, expected, strict=True) if f != e]
    assert not wrong, f"{len(wrong)} of {len(found)}: {wrong[:3]}"


def matrices(llm) -> dict[str, int]:
    """Of the process: distinct memories of the size of an embedding; and whether modules are shared."""
    guidance = running_guidance(llm)
    size = guidance.loaded.vocab_size * guidance.model.vllm_config.model_config.get_hidden_size()
    found = {
        t.untyped_storage().data_ptr() for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.numel() == size
    }
    return {
        "matrices": len(found),
        "modules": len({id(m) for m in guidance.model.model.modules() if isinstance(m, nn.Module)}),
    }
