"""The alignment table: what guidance does for users whose tastes are known, beside the other ways to personalize.

    python -m benchmarks.alignment [--small] [--output benchmarks/results]

From nothing: trains, where the cache lacks them, four base models of different families, one reward model for all, and
a model tuned for each user of the first base. The last base (mistral) has another tokenizer than the reward model, and
another chat template. Then every method answers for users of two groups:

- seen: combinations, wordings, topics and questions that the reward model was trained on;
- unseen: dimensions never asked for together in training, in words never used there, about topics never met there.

Writes alignment.md, alignment.json and two plots.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")

from pad_vllm.cache import cached
from pad_vllm.evaluation import evaluate as evaluation
from pad_vllm.evaluation import harness, methods
from pad_vllm.evaluation.evaluate import EvaluationConfig, evaluate, guided, prompting
from pad_vllm.evaluation.methods import BASE
from pad_vllm.evaluation.metrics import Estimate
from pad_vllm.evaluation.report import plot, table
from pad_vllm.reward.heads import load_heads
from pad_vllm.synthetic import models, world
from pad_vllm.synthetic.models import ARCHITECTURES, Recipe
from pad_vllm.training.export import HEADS_FILE
from pad_vllm.training.fit import fit
from pad_vllm.training.heads import head_weights
from pad_vllm.training.train import Stage, TrainingConfig, train

from .record import hardware

BETAS = (0.5, 0.8, 1.0, 1.5)
PROMPTING = "{preference} {prompt}"
HEADLINE = guided(0.8)
RIVALS = (BASE, prompting(PROMPTING))
"""What the headline is held against."""
RESULT = "result.json"
MARGIN = 5
"""Percentage points of well-formed answers that PAD may lose."""
ENGINE = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 256 << 20,
    "max_num_seqs": 64,
}


def users(num_users: int, num_prompts: int, names: tuple[str, ...], seed: int) -> dict[str, dict[str, Any]]:
    """As many users of either group, each with a taste, its wording for each prompt, and prompts."""
    rng = random.Random(seed)
    found: dict[str, dict[str, Any]] = {}
    for group in ("seen", "unseen"):
        held_out = group == "unseen"
        for i in range(num_users):
            wanted = world.sample_wanted(rng, held_out)
            topics = list(world.HELD_OUT_TOPICS if held_out else world.TRAIN_TOPICS)
            rng.shuffle(topics)
            questions = world.HELD_OUT_QUESTIONS if held_out else world.TRAIN_QUESTIONS
            prompts = []
            for j in range(num_prompts):
                topic = topics[j % len(topics)]
                prompts.append({"prompt": rng.choice(questions).format(topic.task), "topic": topic.task})
            signs = {world.DIMENSIONS[d][0]: 1 if v == world.DIMENSIONS[d][0] else -1 for d, v in wanted.items()}
            found[f"{group}-{i}"] = {
                "group": group,
                "wanted": wanted,
                "preference": [world.preference(wanted, rng, held_out) for _ in prompts],
                "weights": {"true": head_weights(names, signs)},
                "prompts": prompts,
            }
    return found


def tune_for(user: Mapping[str, Any], base: Path, target: Path, num_pairs: int, recipe: Recipe, seed: int) -> float:
    """A model for one user, by DPO on comparisons that this user made; returns the seconds that it took.

    DPO (arXiv 2305.18290) is the PAD objective without a preference to read, against the model that it starts from.
    """
    rng = random.Random(seed)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        records = (own_record(user["wanted"], rng) for _ in range(num_pairs))
        data = models.write_records(Path(folder, "own.jsonl"), records)
        stage = Stage(lr=5e-4, batch_size=recipe.backbone.batch_size)
        config = TrainingConfig(
            str(data), str(base), str(target), stages=("backbone",), save_steps=10**6, backbone=stage, seed=seed
        )
        train(config, quiet=True)
    return time.perf_counter() - start


def own_record(wanted: Mapping[str, str], rng: random.Random) -> dict[str, Any]:
    """A comparison that a user who wants this has made, unspoken, of two answers of random styles."""
    while True:
        topic, question = rng.choice(world.TRAIN_TOPICS), rng.choice(world.TRAIN_QUESTIONS)
        answers = [world.answer(topic, rng.choice(world.STYLES), rng) for _ in range(2)]
        a, b = (world.satisfaction(answer, wanted) for answer in answers)
        if a != b:
            chosen, rejected = answers if a > b else answers[::-1]
            return {"prompt": question.format(topic.task), "chosen": chosen, "rejected": rejected}


def measure_fit(reward: Path, some_users: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Weights fitted to 30 comparisons of each user, who says nothing else."""
    rng = random.Random(seed)
    fits = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, user in some_users.items():
            records = (own_record(user["wanted"], rng) for _ in range(30))
            data = models.write_records(Path(folder, f"{name}.jsonl"), records)
            fits[name] = fit(str(reward), data)
    return {name: found._asdict() for name, found in fits.items()}


def run_alignment(
    output: Path,
    *,
    recipe: Recipe,
    architectures: tuple[str, ...],
    num_users: int,
    num_prompts: int,
    num_dpo_pairs: int,
    best_of: int,
    cache_dir: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The evaluation on every base; writes the results and returns them. A base's are kept in the cache of models, and
    are not made again."""
    reward = models.build(cache_dir, seed, recipe)
    names = load_heads(reward.reward / HEADS_FILE, recipe.hidden_size).names
    people = users(num_users, num_prompts, names, seed)
    sizes = (architectures[0], num_users, num_prompts, num_dpo_pairs, best_of)
    digest = fingerprint(models.fingerprint(seed, recipe), sizes, BETAS, ENGINE)

    def measure_fits(to: Path) -> None:
        keep(to, {"fit": measure_fit(reward.reward, people, seed)})

    fits = read_result(cached(cache_dir, f"alignment-fit-{digest}", measure_fits))["fit"]
    for name, user in people.items():
        user["weights"]["fit"] = fits[name]["weights"]
    found = {}
    for base in architectures:
        dpo_pairs = num_dpo_pairs if base == architectures[0] else 0

        def measure(to: Path, base: str = base, dpo_pairs: int = dpo_pairs) -> None:
            keep(to, measure_base(base, people, reward.reward, recipe, dpo_pairs, best_of, cache_dir, seed))

        found[base] = read_result(cached(cache_dir, f"alignment-{base}-{digest}", measure))
        print(f"\n## {base}\n\n{table(found[base]['rows'])}", flush=True)
    results = {
        "hardware": hardware(),
        "date": date.today().isoformat(),
        "seconds": round(sum(own["seconds"] for own in found.values())),
        "reward_model": reward.metrics,
        "fit": fits,
        "dpo_seconds": {name: seconds for own in found.values() for name, seconds in own["tuning"].items()},
        "rows": {base: own["rows"] for base, own in found.items()},
    }
    write(output, results)
    return results | {"answers": {base: own["answers"] for base, own in found.items()}}


def measure_base(
    base: str,
    people: Mapping[str, Mapping[str, Any]],
    reward: Path,
    recipe: Recipe,
    num_dpo_pairs: int,
    best_of: int,
    cache_dir: str | None,
    seed: int,
) -> dict[str, Any]:
    """One base model's rows and answers, and what tuning a model for each user took."""
    start = time.perf_counter()
    path = models.build_base(base, cache_dir, seed, recipe)
    own, tuning = {name: dict(user) for name, user in people.items()}, {}
    with tempfile.TemporaryDirectory() as folder:
        if num_dpo_pairs:
            for name, user in own.items():
                user["dpo"] = str(Path(folder, name))
                tuning[name] = tune_for(user, path, Path(folder, name), num_dpo_pairs, recipe, seed)
        config = EvaluationConfig(
            base=str(path),
            pad={"reward_model": str(reward)},
            users=own,
            checker="pad_vllm.synthetic.world:check",
            betas=BETAS,
            best_of=best_of,
            prompting=PROMPTING,
            reference=str(models.build_base(ARCHITECTURES[0], cache_dir, seed, recipe)),
            max_tokens=128,
            seed=seed,
            engine=ENGINE,
        )
        return evaluate(config) | {"tuning": tuning, "seconds": time.perf_counter() - start}


def fingerprint(*settings: Any) -> str:
    """A hash of what determines a result: settings, and the code that measures."""
    digest = hashlib.sha256(repr(settings).encode())
    for source in (__file__, evaluation.__file__, harness.__file__, methods.__file__):
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()[:16]


def keep(folder: Path, result: Mapping[str, Any]) -> None:
    folder.mkdir()
    (folder / RESULT).write_text(json.dumps(result) + "\n")


def read_result(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / RESULT).read_text())
    for row in result.get("rows", ()):
        row |= {name: Estimate(*value) for name, value in row.items() if isinstance(value, list)}
    return result


def verdicts(results: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """For every base and group: is PAD at the paper's usual beta above the base and above prompting, with intervals
    apart, and by how much less often are its answers well formed."""
    lines = []
    for base, rows in results.items():
        for group in ("seen", "unseen"):
            found = {row["method"]: row for row in rows if row["group"] == group}
            pad, unguided = found[HEADLINE.name], found[BASE.name]
            parts = [f"{base}, {group}: {HEADLINE.name} satisfies {100 * pad['satisfaction'][0]:.0f}%"]
            for rival in RIVALS:
                ours, theirs = Estimate(*pad["satisfaction"]), Estimate(*found[rival.name]["satisfaction"])
                apart = "intervals apart" if ours.apart_from(theirs) else "intervals NOT apart"
                parts.append(f"{rival.name} {100 * theirs.mean:.0f}% ({apart})")
            gain = 100 * (pad["well_formed"][0] - unguided["well_formed"][0])
            within = "within" if gain >= -MARGIN else "OUTSIDE"
            parts.append(f"well formed {gain:+.0f} points against base, {within} the margin of {MARGIN}")
            lines.append("; ".join(parts))
    return lines


def write(output: Path, results: Mapping[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "alignment.json").write_text(json.dumps(results, indent=1) + "\n")
    text = [
        "# Alignment",
        __doc__.partition("\n\n")[2].partition("\n\n")[2].partition("Writes")[0].strip(),
        f"`make alignment` on {results['hardware']}, {results['date']}, in {results['seconds'] / 60:.0f} minutes.",
    ]
    if results["dpo_seconds"]:
        spent = [f"{seconds:.0f}" for seconds in sorted(results["dpo_seconds"].values())]
        text.append(
            f"`dpo` has a model for each of {len(spent)} users, trained for {spent[0]} to {spent[-1]} s each, which "
            "would have to be served side by side; its time is that of its engines. The others train nothing for a "
            "user. `time / base` is of generating, and of ranking for `best_of_n`."
        )
    text += ["## In short", "\n".join(f"- {line}" for line in verdicts(results["rows"]))]
    for base, rows in results["rows"].items():
        text += [f"## {base}", table(rows).strip()]
    (output / "alignment.md").write_text("\n\n".join(text) + "\n")
    plot(results["rows"], output, [*RIVALS, *map(guided, BETAS)])


FULL: dict[str, Any] = {
    "recipe": models.FULL,
    "architectures": ARCHITECTURES,
    "num_users": 8,
    "num_prompts": 16,
    "num_dpo_pairs": 480,
    "best_of": 8,
}
SMALL = FULL | {"architectures": ("llama",), "num_users": 2, "num_prompts": 8, "num_dpo_pairs": 0, "best_of": 4}
"""One base, the demo's, and nobody tuned for: two minutes where the synthetic models are there."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--small", action="store_true", help="one base model, fewer users and prompts")
    parser.add_argument(
        "--cache-dir", help="where trained models are kept (default $PAD_VLLM_CACHE or ~/.cache/pad-vllm)"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run_alignment(args.output, **(SMALL if args.small else FULL), cache_dir=args.cache_dir, seed=args.seed)


if __name__ == "__main__":
    main()
