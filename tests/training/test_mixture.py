"""Adapters of one base model in the synthetic world, each tuned for a taste: mixed for a user by weights that were
fitted to comparisons, and served over one set of weights."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.alignment import own_record
from pad_vllm.synthetic import models, world
from pad_vllm.training.mixture import fit_adapters, mixture_of
from pad_vllm.training.sliders import sliders_of
from pad_vllm.training.train import Stage, TrainingConfig, train
from tests.support.engine import Worker

TASTES = {
    "brief": {"length": "concise"},
    "formal": {"tone": "formal"},
    "careful": {"stance": "cautious"},
}
USER = {"brief": 1.0, "formal": -0.5, "careful": 0.0}
"""How much what each adapter was tuned for is worth to the user."""
WANTED = {"length": "concise", "tone": "playful"}
"""What these weights say of the best answer."""
NUM_QUESTIONS = 24


@pytest.fixture(scope="module")
def adapters(cache, tmp_path_factory) -> dict[str, str]:
    """What ``pad-vllm train --lora-rank`` writes, as it is."""
    folder, base = tmp_path_factory.mktemp("adapters"), models.build(cache).base
    settings = {"stages": ("backbone",), "lora_rank": 4, "backbone": Stage(lr=4e-3, batch_size=12)}
    for name, wanted in TASTES.items():
        rng = random.Random(name)
        data = models.write_records(folder / f"{name}.jsonl", [own_record(wanted, rng) for _ in range(240)])
        train(TrainingConfig(str(data), str(base), str(folder / name), save_steps=10**6, **settings), quiet=True)
    return {name: str(folder / name) for name in TASTES}


def comparisons(path: Path, number: int) -> Path:
    """By the user, of two answers of random styles: the chosen one is worth more."""
    rng = random.Random(0)
    records: list[dict[str, Any]] = []
    while len(records) < number:
        topic, question = rng.choice(world.TRAIN_TOPICS), rng.choice(world.TRAIN_QUESTIONS)
        answers = [world.answer(topic, rng.choice(world.STYLES), rng) for _ in range(2)]
        worth = [sum(USER[n] * world.satisfaction(text, TASTES[n]) for n in USER) for text in answers]
        if worth[0] != worth[1]:
            chosen, rejected = answers if worth[0] > worth[1] else answers[::-1]
            records.append({"prompt": question.format(topic.task), "chosen": chosen, "rejected": rejected})
    return models.write_records(path, records)


def satisfaction(cache: Path, adapters: Mapping[str, str], persona: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Of the user, and the share of well formed answers: unguided, and guided by the base's adapters."""
    from pad_vllm.evaluation.engine import quiet

    quiet()
    from vllm import LLM

    from pad_vllm.synthetic.measure import generate

    llm = LLM(
        str(models.build(cache).base),
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        kv_cache_memory_bytes=256 << 20,
        logits_processors=["pad_vllm:PADLogitsProcessor"],
        additional_config={"pad": {"reward_model": "base", "adapters": dict(adapters), "personas": {"u": persona}}},
    )
    topics = random.Random(0).sample(world.TOPICS, NUM_QUESTIONS)
    questions = [world.HELD_OUT_QUESTIONS[0].format(topic.task) for topic in topics]
    found = []
    for arguments in (None, {"pad_persona": "u", "pad_beta": 1.5}):
        texts = generate(llm, questions, [arguments] * len(questions), temperature=0.8)
        satisfied = sum(world.satisfaction(text, WANTED) for text in texts) / NUM_QUESTIONS
        well_formed = sum(world.is_well_formed(text, topic) for text, topic in zip(texts, topics, strict=True))
        found.append((satisfied, well_formed / NUM_QUESTIONS))
    return found


def test_a_known_mixture_is_found_and_served(cache, adapters, tmp_path):
    built = models.build(cache)
    found = fit_adapters(str(built.base), comparisons(tmp_path / "own.jsonl", 60), adapters)
    sliders = sliders_of(found)
    assert found.num_comparisons == 60
    assert found.held_out_accuracy >= 0.9
    assert list(sliders)[:2] == ["brief", "formal"], sliders
    assert sliders["brief"] > 0 > sliders["formal"], sliders
    assert abs(sliders.get("careful", 0)) < 0.5 * abs(sliders["formal"]), sliders

    worker = Worker("v1")
    unguided, guided = worker.run(satisfaction, cache, adapters, mixture_of(sliders))
    worker.close()
    assert guided[0] >= unguided[0] + 0.25, (unguided, guided)
    assert guided[1] >= 0.8, (unguided, guided)
