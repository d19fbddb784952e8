"""A user's taste from few choices, on the demo's model: pairs that ``pad-vllm fit --next`` would name, and random ones.

    timeout 900 python -m benchmarks.language_choices [--prompts 8] [--users 100] [--work FOLDER] [--output FOLDER]

SmolLM2 answers held-out prompts, as they are, asked in words, and guided by the demo's reward model; the same reward
model scores every answer under one attribute for each measure. Answers and scores are kept in the work folder, a prompt
and an attribute at a time: what was stopped goes on there. Simulated users want a hidden mixture of the measures, and a
tenth of their choices are mistakes. What the fitted weights say of pairs of prompts that were not asked about is held
against what the user would say without mistakes. Writes language-choices.md and .json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")

import torch

from pad_vllm.demo import recipe, wishes
from pad_vllm.demo.comparisons import is_sound
from pad_vllm.demo.measures import measures_of
from pad_vllm.demo.smollm import DemoModels, build
from pad_vllm.evaluation.metrics import bootstrap
from pad_vllm.training.choosing import information
from pad_vllm.training.data import Example, answer_ids, prompt_ids
from pad_vllm.training.fit import load_reward_model
from pad_vllm.training.posterior import MISTAKES, draw_normals, mean_direction, weights_of
from pad_vllm.training.records import read_records, write_records
from pad_vllm.training.trainer import score_answers

from .record import hardware

ATTRIBUTES = ("simple", "gloomy", "brief", "list", "impersonal", "emphatic")
"""One of each measure's two, the one that the reward model serves more strongly (docs/training.md)."""
_NEUTRAL = "neutral"
NUMBERS = (3, 5, 10, 20, 30)
NUM_PAIRS, NUM_HELD_OUT = 240, 120
"""Of a user: those that may be asked about, and those of other prompts, at most."""
DRAWS_EACH, STEPS_EACH = 96, 30
"""Of each user's posterior, after each choice; all users at once."""


def answer_pool(models: DemoModels, work: Path, num_prompts: int) -> list[dict[str, Any]]:
    """Sound answers to held-out prompts: ``prompt``, ``text``, and whether it has ``finished``."""
    prompts = wishes.prompts(held_out=True)[:num_prompts]
    file, kept = work / "answers.jsonl", list[dict[str, Any]]()
    if file.exists():
        kept = read_records(file)
    known = {one["prompt"] for one in kept}
    if missing := [prompt for prompt in prompts if prompt not in known]:
        kept += recipe.answer_round(models.base, models.reward, missing, prompts.index(missing[0]), recipe.FULL, 1)
        write_records(file, kept)
    return [one for one in kept if one["prompt"] in prompts and is_sound(one)]


def score_pool(models: DemoModels, work: Path, pool: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers' ``prompt`` and ``measures``, and ``favors``: by how many nats each attribute makes them likelier."""
    model, template = load_reward_model(str(models.reward), None, None)
    tokenizer, max_answer = template.tokenizer, recipe.FULL.max_answer
    found = []
    for prompt in dict.fromkeys(one["prompt"] for one in pool):
        ids = [answer_ids(one["text"], tokenizer) for one in pool if one["prompt"] == prompt]
        own = [one for one in pool if one["prompt"] == prompt]
        read = [i for i, one in enumerate(own) if one["finished"] or len(ids[i]) > max_answer + 1]
        scores = {}
        for name in (_NEUTRAL, *ATTRIBUTES):
            file = work / f"{name} {wishes.prompts(held_out=True).index(prompt):03}.json"
            if not file.exists():
                plain = prompt_ids(prompt, tokenizer)
                context = plain if name == _NEUTRAL else template.compose(plain, wishes.wordings(name)[0])
                examples = [Example(context, ids[i][:max_answer]) for i in read]
                write_records(file, [score_answers(model, examples).tolist()])
                print(file.stem, flush=True)
            scores[name] = json.loads(file.read_text())
        for place, i in enumerate(read):
            text = tokenizer.decode(ids[i][:max_answer], skip_special_tokens=True)
            favors = [scores[name][place] - scores[_NEUTRAL][place] for name in ATTRIBUTES]
            found.append({"prompt": prompt, "measures": measures_of(text), "favors": favors})
    return found


@dataclass(frozen=True)
class Users:
    """What users choose from, and what they want.

    Attributes:
        pairs: (num_users, num_pairs, num_features) float64, of about 1: one answer minus the other.
        wants: (num_users, num_pairs) float64, above 0 where the first answer is what the user wants more.
        others, wants_of_others: the same of pairs that are not asked about.
    """

    pairs: torch.Tensor
    wants: torch.Tensor
    others: torch.Tensor
    wants_of_others: torch.Tensor

    def choices(self, mistakes: float, seed: int = 0) -> torch.Tensor:
        """1 where the first answer would be chosen, -1 where the second: (num_users, num_pairs). Of two that are as
        good, either."""
        generator = torch.Generator().manual_seed(seed)
        chance, coin = torch.rand((2, *self.wants.shape), generator=generator, dtype=self.wants.dtype)
        likes = torch.where(self.wants == 0, (coin < 0.5).double() - 0.5, self.wants).sign()
        return torch.where(chance < mistakes, -likes, likes)

    def agreement(self, weights: torch.Tensor) -> torch.Tensor:
        """Share of the other pairs that the weights (num_users, num_features) order as the user does: (num_users,)."""
        open_ = self.wants_of_others != 0
        ordered = torch.einsum("ujf,uf->uj", self.others, weights) * self.wants_of_others > 0
        return (ordered & open_).double().sum(1) / open_.sum(1)


def weights_by_number(
    users: Users, choices: torch.Tensor, numbers: Sequence[int], is_chosen: bool, seed: int = 0
) -> dict[int, torch.Tensor]:
    """The weights (num_users, num_features) that are fitted after so many choices.

    Args:
        is_chosen: each pair is the one that tells most of those left; else they come as they stand.
    """
    num_users, num_pairs, _ = users.pairs.shape
    everyone, left = torch.arange(num_users), torch.ones(num_users, num_pairs, dtype=torch.bool)
    made, normals, found = users.pairs[:, :0], None, {}
    for number in range(1, max(numbers) + 1):
        which = torch.full((num_users,), number - 1)
        if is_chosen:
            normals = draw_normals(made, start=normals, num_draws=DRAWS_EACH, num_steps=STEPS_EACH, seed=seed + number)
            which = torch.where(left, information(users.pairs, weights_of(normals)), -1).argmax(1)
        left[everyone, which] = False
        one = users.pairs[everyone, which] * choices[everyone, which].unsqueeze(1)
        made = torch.cat([made, one.unsqueeze(1)], 1)
        if number in numbers:
            fitted = draw_normals(made, num_draws=DRAWS_EACH, num_steps=4 * STEPS_EACH, seed=seed)
            found[number] = mean_direction(weights_of(fitted))
    return found


def simulated_users(answers: Sequence[Mapping[str, Any]], num_users: int, seed: int = 0) -> Users:
    """Users who want two or three of the measures' ends, by standard normal weights. Each is asked about pairs of
    answers to three quarters of the prompts, and held against pairs of the others."""
    rng = random.Random(seed)
    measures = torch.tensor([list(one["measures"].values()) for one in answers], dtype=torch.float64)
    measures = measures / measures.std(0)
    favors = torch.tensor([one["favors"] for one in answers], dtype=torch.float64)
    by_prompt: dict[str, list[int]] = {}
    for i, one in enumerate(answers):
        by_prompt.setdefault(one["prompt"], []).append(i)
    rows: list[tuple[torch.Tensor, ...]] = []
    for number in range(num_users):
        user = torch.zeros(measures.shape[1], dtype=torch.float64)
        for wish in rng.sample(range(len(user)), 2 + number % 2):
            user[wish] = rng.gauss(0, 1)
        prompts = rng.sample(sorted(by_prompt), len(by_prompt))
        cut, row = len(prompts) * 3 // 4, list[torch.Tensor]()
        for own in (prompts[:cut], prompts[cut:]):
            pairs = [pair for prompt in own for pair in itertools.combinations(by_prompt[prompt], 2)]
            sampled = rng.sample(pairs, min(NUM_PAIRS if not row else NUM_HELD_OUT, len(pairs)))
            first, second = ([pair[i] for pair in sampled] for i in (0, 1))
            row += [favors[first] - favors[second], (measures[first] - measures[second]) @ user]
        rows.append(tuple(row))
    shortest = [min(len(row[i]) for row in rows) for i in range(4)]
    stacked = [torch.stack([row[i][: shortest[i]] for row in rows]) for i in range(4)]
    scale = stacked[0].square().mean().sqrt()
    return Users(stacked[0] / scale, stacked[1], stacked[2] / scale, stacked[3])


def agreement_rows(users: Users, numbers: Sequence[int], seed: int = 0) -> dict[str, Any]:
    """Agreement by number of choices, chosen and random, with 95% intervals over users; by how much as many or fewer
    chosen ones agree more than the most random ones; and what the basis allows: all pairs asked about, no mistakes."""
    found = {
        is_chosen: {
            number: users.agreement(weights).tolist()
            for number, weights in weights_by_number(users, users.choices(MISTAKES, seed), numbers, is_chosen).items()
        }
        for is_chosen in (True, False)
    }
    num_pairs = users.pairs.shape[1]
    best = users.agreement(weights_by_number(users, users.choices(0.0), [num_pairs], False)[num_pairs]).tolist()
    names = [str(i) for i in range(len(best))]
    most = found[False][max(numbers)]
    return {
        "users": len(best),
        "pairs": num_pairs,
        "next": {number: bootstrap(own, names) for number, own in found[True].items()},
        "random": {number: bootstrap(own, names) for number, own in found[False].items()},
        "next_above_most_random": {
            number: bootstrap([a - b for a, b in zip(own, most, strict=True)], names)
            for number, own in found[True].items()
        },
        "all": bootstrap(best, names),
    }


def choices_as_markdown(record: Mapping[str, Any]) -> str:
    rows, prompts, most = record["rows"], record["prompts"], max(map(int, record["rows"]["random"]))

    def said(estimate: Sequence[float]) -> str:
        mean, low, high = (100 * value for value in estimate)
        return f"{mean:.0f}% ({low:.0f} to {high:.0f})"

    lines = [
        "# A user's taste from few choices",
        f"SmolLM2-135M-Instruct's answers to {prompts} held-out prompts ({record['answers']}), scored by the demo's "
        f"reward model under {len(ATTRIBUTES)} attributes, on {record['hardware']}, {record['date']}, by "
        f"`python -m benchmarks.language_choices --prompts {prompts} --users {rows['users']}`. {rows['users']} "
        f"simulated users want two or three of the measures of [language.md](language.md); {100 * MISTAKES:.0f}% of "
        "their choices are mistakes. Weights are fitted to choices between the pairs that `pad-vllm fit --next` names, "
        f"of {rows['pairs']}, and to choices between random ones; a cell has the share of pairs of answers to other "
        "prompts that the weights order as the user would. Intervals are 95%, over users, who share answers.",
        f"| choices | named by --next | random | named, above {most} random (points) |\n| ---: | ---: | ---: | ---: |",
    ]
    for number in rows["next"]:
        mean, low, high = (100 * value for value in rows["next_above_most_random"][number])
        lines[-1] += (
            f"\n| {number} | {said(rows['next'][number])} | {said(rows['random'][number])} | "
            f"{mean:+.0f} ({low:+.0f} to {high:+.0f}) |"
        )
    lines.append(f"All {rows['pairs']} pairs asked about, without a mistake: {said(rows['all'])}.")
    return "\n\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--work", type=Path, help="where answers are kept (default: in the cache of models)")
    parser.add_argument("--cache-dir", help="of the models (default $PAD_VLLM_CACHE or ~/.cache/pad-vllm)")
    args = parser.parse_args()
    models = build(args.cache_dir)
    work = args.work or models.reward.parent / f"language-choices-{models.reward.name}"
    work.mkdir(parents=True, exist_ok=True)
    found = score_pool(models, work, answer_pool(models, work, args.prompts))
    args.output.mkdir(parents=True, exist_ok=True)
    record = {
        "hardware": hardware(),
        "date": date.today().isoformat(),
        "prompts": args.prompts,
        "answers": len(found),
        "attributes": [wishes.wordings(name)[0] for name in ATTRIBUTES],
        "rows": agreement_rows(simulated_users(found, args.users), NUMBERS),
    }
    (args.output / "language-choices.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.output / "language-choices.md").write_text(choices_as_markdown(record))
    print(choices_as_markdown(record))


if __name__ == "__main__":
    main()
