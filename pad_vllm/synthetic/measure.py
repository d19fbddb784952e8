"""What guidance does in the synthetic world: answers of the real engine, held against what was wanted."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pad_vllm.evaluation.engine import quiet
from pad_vllm.synthetic import world
from pad_vllm.synthetic.models import SyntheticModels

if TYPE_CHECKING:
    from vllm import LLM

MAX_TOKENS = 96
TEMPERATURE = 0.8
NUM_QUESTIONS = 48
"""Questions per preference."""

USERS: dict[str, dict[str, str]] = {
    "Ada": {"length": "concise", "tone": "formal"},
    "Ben": {"tone": "playful", "stance": "direct", "example": "example"},
    "Cleo": {"length": "concise", "stance": "cautious", "tone": "playful"},
    "Dev": {"tone": "formal", "restatement": "restating", "example": "example", "encouragement": "encouraging"},
}
"""What each user wants; the last two want dimensions together that no training preference asks for together."""


def start(models: SyntheticModels) -> LLM:
    """A vLLM engine of the base model, guided by the reward model, in this process."""
    quiet()
    from vllm import LLM

    return LLM(
        str(models.base),
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        kv_cache_memory_bytes=256 << 20,
        logits_processors=["pad_vllm:PADLogitsProcessor"],
        additional_config={"pad": {"reward_model": str(models.reward)}},
    )


def generate(
    llm: LLM, questions: Sequence[str], extra_args: Sequence[Mapping | None], temperature: float, seed: int = 0
) -> list[str]:
    """One answer per question, each with its own guidance arguments (None: unguided)."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=temperature, max_tokens=MAX_TOKENS, seed=seed + i, extra_args=args)
        for i, args in enumerate(extra_args)
    ]
    chats = [[{"role": "user", "content": question}] for question in questions]
    return [output.outputs[0].text for output in llm.chat(chats, params, use_tqdm=False)]


def measure_users(llm: LLM, beta: float, top_k: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Mean satisfaction without and with guidance, of every single value and two held-out combinations.

    Sampled at temperature 0.8, on questions in a phrasing that the reward model was never trained on.
    """
    rng = random.Random(seed)
    wants = {value: {dimension: value} for dimension, values in world.DIMENSIONS.items() for value in values}
    wants |= {" + ".join(USERS[name].values()): USERS[name] for name in ("Cleo", "Dev")}
    topics = rng.sample(world.TOPICS, NUM_QUESTIONS)
    questions = [rng.choice(world.HELD_OUT_QUESTIONS).format(topic.task) for topic in topics]
    unguided = generate(llm, questions, [None] * len(questions), TEMPERATURE, seed)
    guidance = [
        {"pad_preference": world.preference(wanted, rng), "pad_beta": beta, "pad_top_k": top_k}
        for wanted in wants.values()
        for _ in questions
    ]
    guided = generate(llm, questions * len(wants), guidance, TEMPERATURE, seed)
    satisfied = {}
    for i, (name, wanted) in enumerate(wants.items()):
        own = guided[i * len(questions) : (i + 1) * len(questions)]
        satisfied[name] = (_mean_satisfaction(unguided, wanted), _mean_satisfaction(own, wanted))
    return satisfied


def _mean_satisfaction(texts: Sequence[str], wanted: Mapping[str, str]) -> float:
    return sum(world.satisfaction(text, wanted) for text in texts) / len(texts)
