"""A PEFT folder as the reward model, over the served model and over another; adapters that are refused; and a quantized
model that guides itself."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pad_vllm.reward.adapters import read_folder
from pad_vllm.reward.merging import Merge
from tests import oracle
from tests.engine.test_engine import GREEDY, PROMPTS
from tests.engine.test_shared_weights import ATTENTION, MLP, TEXTS
from tests.support.engine import A_CORE_EACH, PLUGIN, Engine, guided, metric, running_guidance
from tests.support.fixtures import Models
from tests.support.models import make_adapter

CASES = [
    {"reference": "base"},
    {"reference": "neutral", "preference": TEXTS[0]},
    {"reference": "base", "preference": TEXTS, "preference_weights": [1.0, -0.5]},
    {"reference": "none", "preference": TEXTS[1], "beta": 0.7},
]


def start(models: Models, runner: str = "v1", model=None, **pad) -> Engine:
    return Engine(runner, model or models.base, logits_processors=PLUGIN, additional_config={"pad": pad})


def check_cases(engine: Engine, reward, models: Models, encode, compose, **asked) -> None:
    """Against the oracle with the adapter merged; ``asked`` of every request says which."""
    rules = [{"top_k": 10, "beta": 1.0} | case for case in CASES if not asked or case["reference"] != "neutral"]
    prompts = [encode(text) for text in PROMPTS[: len(rules)]]
    expected = []
    for prompt, rule in zip(prompts, rules, strict=True):
        settings = {key: value for key, value in rule.items() if not key.startswith("preference")}
        texts = rule.get("preference") or []
        expected.append(
            oracle.generate(
                models.base_model,
                prompt,
                32,
                reward=reward,
                reward_prompt_ids=[compose(prompt, t) for t in ([texts] if isinstance(texts, str) else texts)] or None,
                weights=rule.get("preference_weights"),
                **settings,
            )
        )
    assert (
        engine.generate(prompts, [GREEDY | {"max_tokens": 32} | guided(**rule, **asked) for rule in rules]) == expected
    )


@pytest.mark.every_release
def test_over_the_served_model_it_shares_the_weights(models, encode, compose, runner, tmp_path):
    """The neutral context is read through it too: it is the reward model. And the drafter, where there is one."""
    merged = make_adapter(tmp_path / "own", models.base, seed=21, rank=4, targets=[*ATTENTION, *MLP, "lm_head"])
    pad, drafts = {"reward_model": str(tmp_path / "own")}, {}
    if runner == "v2":
        drafts = {"method": "draft_model", "model": str(models.base), "num_speculative_tokens": 3}
        drafts = {"speculative_config": drafts, "disable_log_stats": False}
    engine = Engine(runner, models.base, logits_processors=PLUGIN, additional_config={"pad": pad}, **drafts)
    try:
        check_cases(engine, merged, models, encode, compose)
        assert engine.call(num_own_parameters) == 0
        if drafts:
            assert engine.call(metric, "vllm:spec_decode_num_accepted_tokens") > 10
    finally:
        engine.close()


@pytest.mark.parametrize("how", ["compiled", "two ranks"])
def test_compiled_and_tensor_parallel(how, models, encode, compose, monkeypatch, tmp_path):
    """(With an adapter vLLM compiles nothing on a CPU.)"""
    settings, adapters = {"enforce_eager": False}, {}
    if how == "two ranks":
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", A_CORE_EACH)
        merged = make_adapter(tmp_path / "own", models.base, seed=21, rank=4, targets=[*ATTENTION, *MLP, "lm_head"])
        settings, adapters = {"multiprocess": True, "tensor_parallel_size": 2}, {"mine": str(tmp_path / "own")}
    pad = {"reward_model": "base", "adapters": adapters}
    engine = Engine("v1", models.base, logits_processors=PLUGIN, additional_config={"pad": pad}, **settings)
    try:
        check_cases(engine, models.base_model, models, encode, compose)
        if adapters:
            check_cases(engine, merged, models, encode, compose, adapter="mine")
    finally:
        engine.close()


@pytest.mark.parametrize("brings_a_head", [False, True])
def test_over_another_model_it_is_merged(brings_a_head, models, encode, compose, tmp_path):
    """What its configuration names; or what the server's does."""
    full = {"modules_to_save": ["lm_head"]} if brings_a_head else {}
    merged = make_adapter(tmp_path / "own", models.reward, seed=22, rank=4, targets=[*ATTENTION, "up_proj"], **full)
    named = {}
    if brings_a_head:  # and was moved
        file = tmp_path / "own" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
        named = {"adapter_base": str(models.reward)}
        with pytest.raises(ValueError, match=r"does not say which model it was made for.*pad.adapter_base"):
            start(models, reward_model=str(tmp_path / "own"))
    engine = start(models, reward_model=str(tmp_path / "own"), **named)
    try:
        check_cases(engine, merged, models, encode, compose)
        assert engine.call(num_own_parameters) > 0
    finally:
        engine.close()


def num_own_parameters(llm) -> int:
    return len(running_guidance(llm).loaded.own_parameters())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"use_dora": True}, "vLLM does not yet support DoRA"),
        ({"r": 1024}, "LoRA rank 1024 is greater than max_lora_rank 512"),
        ({"peft_type": "IA3"}, "a PEFT adapter of the type IA3"),
        ({"bias": "all"}, "Adapter bias is not supported"),
        (
            {"targets": ["lm_head"], "vocab_size": 600},
            r"its change to lm_head has the shape \[600, 64\], but the layer has",
        ),
        ({"targets": ["embed_tokens"]}, "it changes embed_tokens: the embedding"),
        (
            {"hidden_size": 96},
            r"its change to model.layers.0.self_attn.q_proj has the shape \[96, 96\], but the layer has",
        ),
        ({"num_hidden_layers": 3}, "it has weights for model.layers.2.self_attn.q_proj, which is not a linear layer"),
        ({"targets": ["lm_head"], "value": math.nan}, "its change to lm_head is not finite in torch.float32"),
        ({"value": math.inf}, "its change to model.layers.0.self_attn.q_proj is not finite"),
        ({"lora_alpha": math.nan}, "its change to model.layers.0.self_attn.q_proj is not finite"),
        ({"remove": "adapter_model.safetensors"}, "no weights in it"),
        ({"remove": "adapter_config.json"}, "no adapter_config.json in it"),
    ],
)
def test_what_cannot_be_an_adapter_stops_the_start(how, message, models, tmp_path):
    from tests.support.models import make_model

    how = dict(how)
    base, targets, removed = models.base, how.pop("targets", ["q_proj"]), how.pop("remove", None)
    value = how.pop("value", None)
    if how.keys() & {"hidden_size", "num_hidden_layers", "vocab_size"}:
        base = make_model(tmp_path / "base", seed=5, **how)
        how = {}
    make_adapter(tmp_path / "adapter", base, seed=1, rank=2, targets=targets)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | how))
    if removed:
        (tmp_path / "adapter" / removed).unlink()
    if value is not None:
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        next(tensor for name, tensor in tensors.items() if "lora_B" in name)[-1, 0] = value
        save_file(tensors, file)
    with pytest.raises(ValueError, match=r"pad.adapters\['mine'\]=.*" + message):
        start(models, reward_model="base", adapters={"mine": str(tmp_path / "adapter")})


def test_a_mixture_of_experts_guides_itself(encode, compose, tmp_path):
    """But not beside adapters that it serves: vLLM's LoRA changes experts in place."""
    from tests.support.models import make_model

    path = make_model(tmp_path / "moe", 0, model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    model, prompt = AutoModelForCausalLM.from_pretrained(path), encode(PROMPTS[0])
    rule = {"top_k": 10, "beta": 1.0, "reference": "none"}
    pad = {"additional_config": {"pad": {"reward_model": "base"}}, "logits_processors": PLUGIN}
    engine = Engine("v1", path, **pad)
    try:
        found = engine.generate([prompt], GREEDY | {"max_tokens": 32} | guided(preference=TEXTS[0], **rule))
    finally:
        engine.close()
    read = compose(prompt, TEXTS[0])
    assert found == [oracle.generate(model, prompt, 32, reward=model, reward_prompt_ids=read, **rule)]
    with pytest.raises(ValueError, match=r"a mixture of experts in place.*start without --enable-lora"):
        Engine("v1", path, enable_lora=True, **pad)


def test_an_adapter_is_not_merged_into_a_quantized_matrix(models, tmp_path):
    make_adapter(tmp_path / "adapter", models.base, seed=1, rank=2, targets=["q_proj"])
    merge = Merge(read_folder("pad.reward_model", str(tmp_path / "adapter"), is_merged=True))
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(
        ValueError, match=r"has \[64, 64\] in uint8 there; set pad.adapter_base to the model.*, unquantized"
    ):
        list(merge.apply([(name, torch.zeros(64, 64, dtype=torch.uint8))]))
    with pytest.raises(ValueError, match="which are not plain matrices of the model that it is merged into"):
        list(merge.apply([("model.layers.0.self_attn.q_proj.qweight", torch.zeros(1))]))


def test_a_quantized_model_guides_itself(models, encode, compose, tmp_path):
    """In int8. At beta 1 and with the whole vocabulary for candidates its answer is what it says itself with the
    preference in its prompt."""
    engine = start(models, model=make_int8(tmp_path / "int8", models.base), reward_model="base", max_top_k=512)
    try:
        prompts = [encode(text) for text in PROMPTS[:4]]
        composed = [compose(prompt, TEXTS[0]) for prompt in prompts]
        asked = GREEDY | {"max_tokens": 32} | guided(preference=TEXTS[0], top_k=512, reference="neutral")
        expected = engine.generate(composed, GREEDY | {"max_tokens": 32})
        assert engine.generate(prompts, asked) == expected
        assert engine.generate(prompts, GREEDY | {"max_tokens": 32}) != expected
    finally:
        engine.close()


def make_int8(path, base):
    """The model with its linear layers in int8, by the format of compressed-tensors."""
    shutil.copytree(base, path)
    linear = {
        n for n, m in AutoModelForCausalLM.from_pretrained(base).named_modules() if isinstance(m, torch.nn.Linear)
    }
    tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if name.removesuffix(".weight") in linear - {"lm_head"}:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[name], tensors[f"{name}_scale"] = (tensor / scale).round().to(torch.int8), scale
        else:
            tensors[name] = tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    scheme = {"num_bits": 8, "type": "int"}
    group = {
        "targets": ["Linear"],
        "weights": scheme | {"strategy": "channel", "dynamic": False, "symmetric": True},
        # Not symmetric, since vLLM's kernel for symmetric ones on a CPU with AMX refuses float32.
        "input_activations": scheme | {"strategy": "token", "dynamic": True, "symmetric": False},
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return path
