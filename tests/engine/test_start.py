"""A configuration in which guidance could not work stops the start, in one paragraph that says what to change."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.support.engine import A_CORE_EACH, PLUGIN, Engine, Worker, set_environment
from tests.support.models import make_heads, make_model
from tests.unit.test_kind import classifier


def start_and_fail(cases: list[dict], base: str, runner: str) -> list[str]:
    """Try to start an engine for each configuration, in this process; returns the errors."""
    set_environment(runner)
    from vllm import LLM

    errors = []
    for pad in cases:
        try:
            LLM(
                model=base,
                dtype="float32",
                enforce_eager=True,
                distributed_executor_backend="uni",
                logits_processors=PLUGIN,
                max_model_len=256,
                additional_config={"pad": pad},
            )
            errors.append("started")
        except ValueError as error:
            errors.append(str(error))
    return errors


@pytest.fixture(scope="module")
def broken(tmp_path_factory, models) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("broken")
    other_tokens = make_model(root / "tokens", seed=2)
    tokenizer = json.loads((other_tokens / "tokenizer.json").read_text())
    tokenizer["decoder"] = tokenizer["pre_tokenizer"] = None
    tokenizer["model"] = {
        "type": "WordPiece",
        "unk_token": "<pad>",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": tokenizer["model"]["vocab"] | {"only": 511},
    }
    (other_tokens / "tokenizer.json").write_text(json.dumps(tokenizer))
    big_head = make_heads(root / "big.safetensors", ["a"], hidden_size=32)
    empty = root / "empty"
    empty.mkdir()
    return {
        "tokens": other_tokens,
        "vocabulary": make_model(root / "vocabulary", seed=3, vocab_size=256),
        "short": make_model(root / "short", seed=4, max_position_embeddings=32),
        "nan": make_nan(root / "nan"),
        "big_head": big_head,
        "empty": empty,
        "classifier": classifier(models, root / "classifier"),
    }


def make_nan(path: Path) -> Path:
    """A model that says NaN of everything, as one trained in bfloat16 may in float16."""
    make_model(path, seed=6)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def test_bad_configuration_stops_the_start(models, broken):
    reward = str(models.reward)
    cases = {
        "unknown key": ({"reward_model": reward, "topk": 3}, ["pad.topk: no such key", "did you mean 'top_k'"]),
        "missing model": ({"reward_model": "/no/such/model"}, ["pad.reward_model='/no/such/model' cannot be loaded"]),
        "not a model": ({"reward_model": str(broken["empty"])}, ["cannot be loaded"]),
        "tokenizer": (
            {"reward_model": str(broken["tokens"])},
            ["its tokenizer is not that of the base model", "no tokens for single bytes"],
        ),
        "vocabulary": ({"reward_model": str(broken["vocabulary"])}, ["its output head has 256 rows"]),
        "positions": (
            {"reward_model": str(broken["short"])},
            ["its 32 positions leave no room for a prompt beside", "of a preference; shorten"],
        ),
        "nan": (
            {"reward_model": str(broken["nan"])},
            ["hidden states are not finite numbers in float32; set pad.dtype"],
        ),
        "heads": (
            {"reward_model": reward, "heads": str(broken["big_head"])},
            ["head 'a' has weight [32, 32]", "hidden size is 64"],
        ),
        "persona": (
            {"reward_model": reward, "personas": {"x": {"weights": [1.0]}}},
            ["pad.personas['x']: pad_weights: the reward model has no value heads"],
        ),
        "classifier": (
            {"reward_model": str(broken["classifier"])},
            ["is a classifier (LlamaForSequenceClassification)"],
        ),
        "pool": ({"reward_model": reward, "kv_cache_memory_bytes": 4096}, ["pad.kv_cache_memory_bytes=4096", "least"]),
    }
    worker = Worker("v1")
    try:
        errors = worker.run(start_and_fail, [pad for pad, _ in cases.values()], str(models.base), "v1")
    finally:
        worker.close()
    for (name, (_, fragments)), error in zip(cases.items(), errors, strict=True):
        for fragment in fragments:
            assert fragment in error, (name, error)
        assert "\n" not in error, (name, error)


def write_to(log: Path) -> None:
    """What this process and those that it starts write."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def test_pipeline_parallelism_stops_the_start(models, tmp_path, monkeypatch):
    """In the engine core's process, as it is served: the paragraph is in its log."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", A_CORE_EACH)
    pad = {"reward_model": str(models.reward)}
    with pytest.raises(RuntimeError, match="Engine core initialization failed"):
        Engine(
            "v1",
            models.base,
            multiprocess=True,
            before=partial(write_to, tmp_path / "log"),
            pipeline_parallel_size=2,
            logits_processors=PLUGIN,
            additional_config={"pad": pad},
        )
    assert "pad cannot guide this engine: pipeline_parallel_size=2" in (tmp_path / "log").read_text()


def start_engines(cases: list[dict], base: str, reward: str, runner: str) -> list[str]:
    """Try to start an engine with each set of vLLM's own arguments, in this process; returns the errors."""
    set_environment(runner)
    from vllm import LLM

    errors = []
    for kwargs in cases:
        settings = {
            "model": base,
            "dtype": "float32",
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "max_model_len": 256,
            "additional_config": {"pad": {"reward_model": reward}},
        }
        try:
            LLM(**settings | kwargs)
            errors.append("started")
        except ValueError as error:
            errors.append(str(error))
    return errors


def test_engines_that_could_not_be_guided_do_not_start(models):
    """Each with what to change. On V1, vLLM itself refuses drafts with a listed processor."""
    drafts = {"method": "draft_model", "model": str(models.base), "num_speculative_tokens": 2}
    synthetic = drafts | {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.0}
    cases = {
        "v1": [
            ({"speculative_config": drafts, "logits_processors": PLUGIN}, "speculative decoding"),
            ({"enable_prompt_embeds": True}, "enable_prompt_embeds: the reward model reads tokens"),
        ],
        "v2": [
            ({"speculative_config": synthetic}, "'synthetic' ignores the guided logits"),
            ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ],
    }
    for runner, engines in cases.items():
        worker = Worker(runner)
        try:
            started = worker.run(
                start_engines, [kwargs for kwargs, _ in engines], str(models.base), str(models.reward), runner
            )
        finally:
            worker.close()
        for (kwargs, fragment), error in zip(engines, started, strict=True):
            assert fragment in error, (kwargs, error)
