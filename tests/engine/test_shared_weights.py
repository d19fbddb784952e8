"""One set of weights: the served model guides itself, and adapters over it do; against the oracle, on both runners."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import oracle
from tests.engine.test_engine import GREEDY, PROMPTS
from tests.support.engine import ONE_CONTEXT, PLUGIN, Engine, engine_stats, guided, metric, running_guidance
from tests.support.fixtures import MAX_TOKENS, Models
from tests.support.models import make_adapter, make_model

pytestmark = pytest.mark.every_release

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
                "targets": ["up_proj", "o_proj", "lm_head"],
                "use_rslora": True,
                "rank_pattern": {"o_proj": 12},
            },
        }
        self.paths = {name: str(root / name) for name in made}
        self.merged = {name: make_adapter(root / name, models.base, **how) for name, how in made.items()}
        self.merged[None] = models.base_model
        self._answers: dict[str, list[int]] = {}

    def expect(
        self, compose, prompt, preference=None, adapter=None, preference_weights=None, served=None, **settings
    ) -> list[int]:
        """What a request should generate, asked of the oracle once for both runners; ``served``: of an adapter of the
        base model's own."""
        asked = repr((prompt, preference, adapter, preference_weights, served, settings))
        if asked in self._answers:
            return self._answers[asked]
        num = next((len(one) for one in (preference, adapter) if isinstance(one, list)), 1)
        texts, names = (one if isinstance(one, list) else [one] * num for one in (preference, adapter))
        contexts = [prompt if text is None else compose(prompt, text) for text in texts]
        self._answers[asked] = oracle.generate(
            self.merged[served],
            prompt,
            settings.pop("max_tokens", MAX_TOKENS),
            reward=self.models.base_model,
            reward_prompt_ids=contexts,
            adapted=[self.merged[name] for name in names],
            weights=preference_weights,
            eos_token_id=None,
            **settings,
        )
        return self._answers[asked]


@pytest.fixture(scope="session")
def adapted(tmp_path_factory: pytest.TempPathFactory, models: Models) -> Adapted:
    return Adapted(tmp_path_factory.mktemp("adapters"), models)


@pytest.fixture(scope="module")
def engine(models: Models, adapted: Adapted, runner: str):
    """Which serves adapters of its own too, and chunks prompts."""
    personas = {"both": {"adapter": ["warm", "dry"], "preference_weights": [0.7, 0.5]}}
    pad = {"reward_model": "base", "adapters": adapted.paths, "personas": personas, "max_num_batched_tokens": 48}
    engine = Engine(
        runner,
        models.base,
        logits_processors=PLUGIN,
        max_num_batched_tokens=64,
        enable_lora=True,
        max_loras=4,  # on a CPU vLLM reads the last one for a request without any
        additional_config={"pad": pad},
    )
    yield engine
    engine.close()


def generate_with(llm, prompts: list[list[int]], params: list[dict], loras: list[str | None]) -> list[list[int]]:
    """One completion of each prompt, some through adapters that the base model serves."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    requests = [path and LoRARequest(path, 1 + sorted(filter(None, set(loras))).index(path), path) for path in loras]
    found = llm.generate(
        [{"prompt_token_ids": ids} for ids in prompts],
        [SamplingParams(**one) for one in params],
        lora_request=requests,
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in found]


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


def test_requests_of_the_bases_own_adapters_are_guided_by_the_reward_models(encode, compose, engine, adapted, models):
    """The base's logits are its adapter's; what guides is the served model's own weights, or another adapter."""
    cases = [
        ("dry", None),
        ("dry", {"preference": TEXTS[0], "reference": "neutral"}),
        ("dry", {"adapter": "warm", "reference": "base"}),
        ("warm", {"adapter": "warm", "reference": "neutral", "beta": 0.7}),
        (None, {"adapter": "odd", "reference": "neutral"}),
        (None, None),
    ]
    prompts, params, expected = [], [], []
    for i, (lora, asked) in enumerate(cases):
        prompt = encode(PROMPTS[i % len(PROMPTS)])
        rule = {"top_k": 10, "beta": 1.0} | (asked or {})
        prompts.append(prompt)
        params.append(GREEDY | {"max_tokens": 24} | (guided(**rule) if asked else {}))
        if asked:
            expected.append(adapted.expect(compose, prompt, max_tokens=24, served=lora, **rule))
        else:
            expected.append(oracle.generate(adapted.merged[lora], prompt, 24))
    loras = [lora and adapted.paths[lora] for lora, _ in cases]
    assert engine.call(generate_with, prompts, params, loras) == expected


SHORT = {"kv_cache_memory_bytes": ONE_CONTEXT * 5 // 4, "max_num_batched_tokens": 40}


@pytest.fixture(scope="module")
def short(models: Models, adapted: Adapted, runner: str):
    """Pools too small for what is asked of them: on Model Runner V2 the reward model drafts too."""
    pad = {"reward_model": "base", "adapters": adapted.paths, **SHORT}
    settings = {"num_gpu_blocks_override": 28, "block_size": 32, "max_num_batched_tokens": 64}
    if runner == "v2":
        settings["speculative_config"] = {
            "method": "draft_model",
            "model": str(models.base),
            "num_speculative_tokens": 3,
        }
    engine = Engine(
        runner,
        models.base,
        logits_processors=PLUGIN,
        disable_log_stats=False,
        additional_config={"pad": pad},
        **settings,
    )
    yield engine
    engine.close()


def test_short_pools_preemption_and_drafts(encode, compose, short, adapted, models, runner):
    prompts, params, expected = [], [], []
    for i, asked in enumerate([*ITSELF, *ADAPTERS]):
        prompt = encode(PROMPTS[i % len(PROMPTS)] + " more" * (26 + i))  # shared by nobody
        rule = {"top_k": 10, "beta": 1.0, "reference": ("base", "neutral", "none")[i % 3]} | asked
        prompts.append(prompt)
        params.append(GREEDY | guided(**rule))
        expected.append(adapted.expect(compose, prompt, **rule))
    assert short.generate(prompts, params) == expected
    stats = short.call(engine_stats)
    assert stats["evicted"] > 0
    assert short.call(metric, "vllm:num_preemptions") > 0


def test_weights_that_are_loaded_later_guide_from_then_on(encode, compose, short, models, tmp_path):
    """By vLLM's ``reload_weights``, or by a trainer that calls the model's own ``load_weights``. Nothing that the old
    weights computed is read again, not even a prompt's cached blocks."""
    other = make_model(tmp_path / "other", seed=77)
    prompts = [encode(text + " more" * 40) for text in PROMPTS[:2]]  # whole blocks of which are kept
    asked = {"preference": TEXTS[0], "top_k": 10, "beta": 1.0, "reference": "neutral"}

    def expect(model) -> list[list[int]]:
        rule = {"reward": model, "reference": "neutral", "top_k": 10, "beta": 1.0, "eos_token_id": None}
        return [
            oracle.generate(model, ids, MAX_TOKENS, reward_prompt_ids=[compose(ids, TEXTS[0])], **rule)
            for ids in prompts
        ]

    before, after = (AutoModelForCausalLM.from_pretrained(other) for _ in range(2))
    norm = after.model.norm.weight
    norm.data *= torch.linspace(0.5, 1.5, len(norm))
    of_base, of_other, of_trained = expect(models.base_model), expect(before), expect(after)
    assert of_base != of_other != of_trained
    load_norm = partial(load_into, [("model.norm.weight", norm.data)])
    for load, expected in (
        (lambda: None, of_base),
        (lambda: short.call(reload, str(other)), of_other),
        (lambda: short.call(apply, load_norm), of_trained),
        (lambda: short.call(reload, str(models.base)), of_base),
    ):
        load()
        assert short.generate(prompts, GREEDY | guided(**asked)) == expected


def reload(llm, path: str) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
    llm.reset_prefix_cache()


def apply(llm, load: Callable[[torch.nn.Module], None]) -> None:
    llm.apply_model(load)
    llm.reset_prefix_cache()


def load_into(weights: list[tuple[str, torch.Tensor]], served: torch.nn.Module) -> None:
    served.load_weights(weights)


def test_no_weight_is_there_twice(short, models):
    """Matrices of the vocabulary: the embedding and the output head, as without the plugin. And what is loaded into
    the served model later is the reward model's."""
    assert short.call(num_matrices) == 2
    assert short.call(is_shared)


def num_matrices(llm) -> int:
    """Distinct memories of the size of an embedding."""
    model_config = running_guidance(llm).model.vllm_config.model_config
    shape = model_config.get_vocab_size(), model_config.get_hidden_size()
    gc.unfreeze()
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor) and found.shape == shape]
    return len({pointer for tensor in tensors if (pointer := tensor.data_ptr())})  # some were emptied


def is_shared(llm) -> bool:
    """Whether a parameter that is set in the served model is that of the reward model."""

    def set_and_see(served: torch.nn.Module) -> bool:
        norm, ours = served.model.norm, running_guidance(llm).model.model.model.norm
        new = torch.nn.Parameter(norm.weight.detach() * 1.5, requires_grad=False)
        norm.weight, before = new, norm.weight
        same = ours.weight is new
        norm.weight = before
        return same and running_guidance(llm).model.model.model is not served.model

    return all(llm.apply_model(set_and_see))
