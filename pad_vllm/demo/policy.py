"""A reward model's round on policy, which learns from answers as they are served: ``python -m pad_vllm.demo.policy
FOLDER``.

Comparisons say which of two answers a user wants, and not what guidance does with that: at beta 2 a wish that is met by
every answer is served as strongly as one that is met by half. Here

1. prompts of ours and real questions (:mod:`pad_vllm.demo.questions`) are answered as served, in words of all kinds, a
   few times for each wish, and for two wishes together;
2. an answer's score is how far it went from the plain ones to its prompt in the direction asked, and less if it goes in
   circles;
3. the reward model's LoRA climbs the scores (:mod:`pad_vllm.training.policy`), less the divergence of guidance from
   the base at every token: what a wish does not need is given back.

The rounds of :mod:`pad_vllm.demo.balance` come first. With ``--from-demo`` this one alone follows the demo's adapter.
Each step keeps what it has done, and goes on from there when it is started again.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from pad_vllm.demo import wishes
from pad_vllm.demo.balance import alternating, learn_rounds
from pad_vllm.demo.measures import DIRECTIONS, loops, measures_of
from pad_vllm.demo.recipe import ENGINE, FAST_BF16, TRAINER, answer_parts, run_rounds
from pad_vllm.demo.smollm import DEFAULTS, PROMPT_TEMPLATE, adapter_folder, build_base, build_reward
from pad_vllm.evaluation.engine import Request
from pad_vllm.evaluation.harness import Engine
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import prompt_ids
from pad_vllm.training.export import export, whole_folder
from pad_vllm.training.loading import import_peft, load_causal_lm, load_merged
from pad_vllm.training.policy import GuidedPolicy, PolicyTrainer, Rollout, Steps, policy_steps
from pad_vllm.training.settings import SAVING
from pad_vllm.training.trainer import last_checkpoint, training_arguments

CLEAR_DIFFERENCE = {"grade": 2.0, "sentiment": 0.15, "length": 25.0, "lists": 25.0, "person": 2.5, "emphasis": 1.0}
"""By how much an answer differs clearly, in each measure's unit: about the spread of plain answers to one prompt, where
there is any."""
TWO_WISHES = "two"
AT_ONCE = 8
"""Answers that are read together in training, whatever the batch size: memory grows with them."""


@dataclass(frozen=True)
class PolicyRound:
    """The sizes of a round.

    Attributes:
        num_prompts, num_questions: of ours and real ones, which are answered, from ``first_prompt`` and
            ``first_question`` on.
        prompts_per_part: answered by one engine, whose answers are then kept.
        plain: answers to a prompt as it is.
        each: answers for a wish to a prompt, in the same words.
        combinations: two wishes that a prompt is answered for.
        beta, top_k, temperature: as it is served.
        circles: what the score of an answer that goes in circles loses.
        shared: how many answers the mean score of a wish counts for, beside those to the same prompt, in what an
            answer's score is held against.
        divergence: what a nat a token counts, in units of the score.
        epochs, batch_size, lr: of training.
    """

    first_prompt: int = 100
    first_question: int = 140
    num_prompts: int = 9
    num_questions: int = 9
    prompts_per_part: int = 2
    plain: int = 4
    each: int = 3
    combinations: int = 4
    beta: float = 2.0
    top_k: int = 40
    temperature: float = 0.7
    max_tokens: int = 160
    circles: float = 0.7
    shared: float = 2.0
    divergence: float = 0.008
    epochs: float = 1.5
    batch_size: int = 32
    lr: float = 3e-4
    save_steps: int = 8
    seed: int = 0


def learn_on_policy(folder: Path, base: Path, reward: Path, sizes: PolicyRound) -> Path:
    """The round, in a folder that keeps what is done and is gone on with; its reward model's folder.

    Args:
        reward: the adapter learned so far, a PEFT folder over ``base``.
    """
    learned = folder / "reward"
    if learned.exists():
        return learned
    tokenizer = AutoTokenizer.from_pretrained(base)
    merged = folder / "merged"  # which answers without a LoRA's products in every layer
    if not merged.exists():
        export(merged, load_merged("reward_model", str(reward), str(base)), tokenizer)
    answers = answer_wishes(folder, base, merged, sizes)
    scored = scored_answers(answers, sizes)
    print(json.dumps(by_wish(scored)), flush=True)
    rollouts = rollouts_of(scored, tokenizer, sizes)
    guided = GuidedPolicy(sizes.beta, sizes.top_k, sizes.temperature)
    steps = _kept_steps(folder / "steps.pt", base, merged, rollouts, guided)
    _train(folder / "trained", base, reward, rollouts, steps, guided, sizes)
    shutil.rmtree(merged)
    record = {"sizes": asdict(sizes), "num_answers": len(scored), "before": by_wish(scored)}
    return export(learned, folder / "trained", tokenizer, record=record, defaults=DEFAULTS)


def answer_wishes(folder: Path, base: Path, reward: Path, sizes: PolicyRound) -> list[dict[str, Any]]:
    """Answers: ``prompt``, ``values`` (asked for), ``preference``, ``tokens``, ``text``."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts, each = alternating(sizes), sizes.prompts_per_part
    parts = {
        folder / f"answers-{start:03}.jsonl": (base, reward, prompts[start : start + each], start, sizes)
        for start in range(0, len(prompts), each)
    }
    return answer_parts(parts, answer_as_served)


def answer_as_served(
    base: Path, reward: Path, prompts: Sequence[str], first: int, sizes: PolicyRound
) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    records, requests = [], []
    for i, prompt in enumerate(prompts, first):
        rng = random.Random(f"policy {sizes.seed} {i}")
        ids = prompt_ids(prompt, tokenizer)
        for _ in range(sizes.plain):
            records.append({"prompt": prompt, "values": [], "preference": ""})
            requests.append(Request(ids))
        for values in [(value,) for value in DIRECTIONS] + rng.sample(wishes.combinations(), sizes.combinations):
            wish = _said(values, rng)
            for _ in range(sizes.each):
                records.append({"prompt": prompt, "values": list(values), "preference": wish})
                requests.append(Request(ids, {"pad_preference": wish, "pad_beta": sizes.beta}))
    found = Engine(str(base), {**DEFAULTS, "top_k": sizes.top_k, "reward_model": str(reward)}).generate(
        {"all": requests},
        temperature=sizes.temperature,
        max_tokens=sizes.max_tokens,
        seed=sizes.seed + 1000 * first,
        **ENGINE,
    )["all"]
    num_tokens = sum(map(len, found.tokens))
    print(f"{len(requests)} answers, {num_tokens / found.seconds:.0f} tokens a second", flush=True)
    return [
        record | {"tokens": list(tokens), "text": text.strip()}
        for record, text, tokens in zip(records, found.texts, found.tokens, strict=True)
    ]


def _said(values: Sequence[str], rng: random.Random) -> str:
    """In any words that are not held out."""
    return " ".join(rng.choice(rng.choice([wishes.wordings(v), wishes.later_wordings(v)])) for v in values)


def scored_answers(answers: Sequence[Mapping[str, Any]], sizes: PolicyRound) -> list[dict[str, Any]]:
    """Answers for wishes, each with ``score``: -1 to 1, less ``circles``, 0 as far as the prompt's plain ones; and
    ``advantage``, by how much that is better than others of the wish, to the same prompt most of all."""
    plain = defaultdict(list)
    for answer in answers:
        if not answer["values"]:
            plain[answer["prompt"]].append(measures_of(answer["text"]))
    scored = [
        {**answer, "score": _score(answer, plain[answer["prompt"]], sizes)}
        for answer in answers
        if answer["values"] and answer["tokens"]
    ]
    of_wish, of_prompt = defaultdict(list), defaultdict(list)
    for answer in scored:
        of_wish[_kind(answer)].append(answer["score"])
        of_prompt[(answer["prompt"], *answer["values"])].append(answer["score"])
    for answer in scored:
        own, shared = of_prompt[(answer["prompt"], *answer["values"])], statistics.mean(of_wish[_kind(answer)])
        others = sum(own) - answer["score"] + sizes.shared * shared
        answer["advantage"] = answer["score"] - others / (len(own) - 1 + sizes.shared)
    return scored


def _kind(answer: Mapping[str, Any]) -> str:
    return answer["values"][0] if len(answer["values"]) == 1 else TWO_WISHES


def _score(answer: Mapping[str, Any], plain: Sequence[Mapping[str, float]], sizes: PolicyRound) -> float:
    measures, moved = measures_of(answer["text"]), []
    for name, sign in (DIRECTIONS[value] for value in answer["values"]):
        moved.append(sign * (measures[name] - statistics.mean(own[name] for own in plain)) / CLEAR_DIFFERENCE[name])
    return statistics.mean(map(math.tanh, moved)) - sizes.circles * loops(answer["text"])


def by_wish(scored: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Wish, or two -> mean score."""
    kinds = defaultdict(list)
    for answer in scored:
        kinds[_kind(answer)].append(answer["score"])
    return {kind: round(statistics.mean(scores), 3) for kind, scores in kinds.items()}


def rollouts_of(scored: Sequence[Mapping[str, Any]], tokenizer: Any, sizes: PolicyRound) -> list[Rollout]:
    template = PromptTemplate(tokenizer, PROMPT_TEMPLATE)
    plain = {prompt: prompt_ids(prompt, tokenizer) for prompt in {answer["prompt"] for answer in scored}}
    return [
        Rollout(
            plain[answer["prompt"]],
            template.compose(plain[answer["prompt"]], answer["preference"]),
            answer["tokens"],
            answer["advantage"],
        )
        for answer in scored
    ]


def _kept_steps(file: Path, base: Path, reward: Path, rollouts: Sequence[Rollout], guided: GuidedPolicy) -> list[Steps]:
    if not file.exists():
        models = load_causal_lm("base", str(base)).eval(), load_causal_lm("reward_model", str(reward)).eval()
        found = policy_steps(*models, rollouts, guided, torch.bfloat16 if FAST_BF16 else torch.float32)
        part = file.with_suffix(".part")
        torch.save([tuple(own) for own in found], part)
        part.rename(file)
    return [Steps(*own) for own in torch.load(file)]


def _train(
    target: Path,
    base: Path,
    reward: Path,
    rollouts: Sequence[Rollout],
    steps: Sequence[Steps],
    guided: GuidedPolicy,
    sizes: PolicyRound,
) -> None:
    if target.exists():
        return
    model = import_peft().PeftModel.from_pretrained(load_causal_lm("base", str(base)), str(reward), is_trainable=True)
    checkpoints, at_once = target.with_name(f"{target.name}.unfinished"), math.gcd(sizes.batch_size, AT_ONCE)
    args = training_arguments(
        checkpoints,
        steps=max(1, int(sizes.epochs * len(rollouts)) // sizes.batch_size),
        batch_size=at_once,
        gradient_accumulation_steps=sizes.batch_size // at_once,
        lr=sizes.lr,
        seed=sizes.seed,
        save_steps=sizes.save_steps,
        **(SAVING | {"eval_strategy": "no"} | TRAINER | {"logging_steps": 4}),
    )
    trainer = PolicyTrainer(model, rollouts, steps, args, guided, divergence=sizes.divergence)
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    with whole_folder(target) as folder:
        model.save_pretrained(folder)
    shutil.rmtree(checkpoints)


def learn_all(folder: Path, from_demo: bool = False) -> tuple[Path, dict[str, Any]]:
    """The rounds before and this one; see :func:`pad_vllm.demo.balance.learn_rounds`."""
    if from_demo:
        reward, record = build_reward(), json.loads((adapter_folder() / "training.json").read_text())
    else:
        reward, record = learn_rounds(folder)
    reward = learn_on_policy(folder / "policy", build_base(), reward, PolicyRound())
    made = json.loads((reward / "training.json").read_text())
    return reward, record | {"policy": [*record.get("policy", ()), made]}


if __name__ == "__main__":
    run_rounds(__doc__, __spec__.name, learn_all)
