"""A reward model's round of strength, in which some wishes learn to guide more: ``python -m pad_vllm.demo.strength
FOLDER``.

At one beta for all, one wish can be guided further at next to no likelihood, while another would go in circles. Here

1. prompts of ours and real questions are answered as served (:mod:`pad_vllm.demo.policy`);
2. each answer is read with its wish, and those to a wish that is to be stronger in more of its wordings;
3. the reward model's LoRA learns to guide these as it did at a higher beta, and the others as it did
   (:class:`pad_vllm.training.policy.StrengthTrainer`). Nobody scores an answer, and every token says what to learn.

The round of :mod:`pad_vllm.demo.policy` comes first. With ``--from-demo`` this one alone follows the demo's adapter.
Each step keeps what it has done, and goes on from there when it is started again.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, TrainingArguments

from pad_vllm.demo.policy import PolicyRound, answer_wishes, kept_steps, learn_all, said_in_any_words, train_lora
from pad_vllm.demo.recipe import run_rounds
from pad_vllm.demo.smollm import DEFAULTS, PROMPT_TEMPLATE, adapter_folder, build_base, build_reward
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import prompt_ids
from pad_vllm.training.export import export
from pad_vllm.training.policy import GuidedPolicy, Rollout, StrengthTrainer


@dataclass(frozen=True)
class StrengthRound:
    """The sizes of a round.

    Attributes:
        answers: which prompts are answered, and how.
        strengths: value -> by how many times the beta it is to be guided; the others by 1.
        wordings: in which an answer to such a value is read, beside its own.
        epochs, batch_size, lr: of training.
    """

    answers: PolicyRound = field(
        default_factory=lambda: PolicyRound(
            first_prompt=109,
            first_question=149,
            num_prompts=2,
            num_questions=2,
            each=2,
            weak=("academic", "gloomy", "detailed"),
            wordings_of_weak=4,
            seed=1,
        )
    )
    strengths: Mapping[str, float] = field(default_factory=lambda: {"detailed": 1.75, "academic": 1.5})
    wordings: int = 3
    epochs: float = 2.75
    batch_size: int = 32
    lr: float = 3e-4
    save_steps: int = 8
    seed: int = 0


def learn_strength(folder: Path, base: Path, reward: Path, sizes: StrengthRound) -> Path:
    """The round, in a folder that keeps what is done and is gone on with; its reward model's folder.

    Args:
        reward: the adapter learned so far, a PEFT folder over ``base``.
    """
    learned = folder / "reward"
    if learned.exists():
        return learned
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers = answer_wishes(folder, base, reward, sizes.answers)
    rollouts = readings_of(answers, tokenizer, sizes)
    guided = GuidedPolicy(sizes.answers.beta, sizes.answers.top_k, sizes.answers.temperature)
    steps = kept_steps(folder / "steps.pt", base, reward, rollouts, guided)

    def trainer_of(model: Any, args: TrainingArguments) -> StrengthTrainer:
        return StrengthTrainer(model, rollouts, steps, args, guided)

    train_lora(folder / "trained", base, reward, len(rollouts), sizes, trainer_of)
    record = {"sizes": asdict(sizes), "num_readings": len(rollouts)}
    return export(learned, folder / "trained", tokenizer, record=record, defaults=DEFAULTS)


def readings_of(answers: Sequence[Mapping[str, Any]], tokenizer: Any, sizes: StrengthRound) -> list[Rollout]:
    """What the reward model reads: an answer for a wish with that; one for a wish that is to be stronger in other
    wordings too; a plain one with each wish that is to be stronger."""
    template, rng, readings = PromptTemplate(tokenizer, PROMPT_TEMPLATE), random.Random(sizes.seed), []
    for answer in answers:
        if not answer["tokens"]:
            continue
        plain, values = prompt_ids(answer["prompt"], tokenizer), answer["values"]
        if values:
            others = sizes.wordings if len(values) == 1 and values[0] in sizes.strengths else 0
            asked = [(values, answer["preference"])]
            asked += [(values, said_in_any_words(values, rng)) for _ in range(others)]
        else:
            asked = [([value], said_in_any_words([value], rng)) for value in sizes.strengths]
        for wanted, wish in asked:
            strength = statistics.mean(sizes.strengths.get(value, 1.0) for value in wanted)
            read = template.compose(plain, wish)
            readings.append(Rollout(plain, read, answer["tokens"], strength=strength))
    return readings


def learn_all_rounds(folder: Path, from_demo: bool = False) -> tuple[Path, dict[str, Any]]:
    """The rounds before and this one; see :func:`pad_vllm.demo.balance.learn_rounds`."""
    if from_demo:
        reward, record = build_reward(), json.loads((adapter_folder() / "training.json").read_text())
    else:
        reward, record = learn_all(folder)
    reward = learn_strength(folder / "strength", build_base(), reward, StrengthRound())
    made = json.loads((reward / "training.json").read_text())
    return reward, record | {"strength": [*record.get("strength", ()), made]}


if __name__ == "__main__":
    run_rounds(__doc__, __spec__.name, learn_all_rounds)
