"""A reward model for SmolLM2, learned from its own answers: ``python -m pad_vllm.demo.recipe FOLDER``.

1. SmolLM2 answers the training prompts through the engine: plain, with a preference in its prompt, and guided by itself
   (``reference: neutral``), which needs no training and goes to extremes.
2. Answers to one prompt that differ in a measure become comparisons of a user who wants that.
3. ``pad-vllm train`` learns a LoRA from them.

Each step keeps what it has done, and goes on from there when it is started again. ``--adapter`` writes
what the demo has of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pad_vllm.demo import wishes
from pad_vllm.demo.measures import DIMENSIONS, DIRECTIONS, OPPOSITES, loops, measure
from pad_vllm.demo.smollm import ADAPTER, ADAPTER_SETTINGS, PROMPT_TEMPLATE, build_base
from pad_vllm.evaluation.engine import Request, generate
from pad_vllm.training.data import write_records
from pad_vllm.training.train import Stage, TrainingConfig, train

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

FAST_BF16 = torch.cpu._is_avx512_bf16_supported()
ENGINE = {
    "dtype": "bfloat16" if FAST_BF16 else "float32",
    "max_model_len": 1024,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2 << 30,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 64
    * 512,  # no prompt in pieces: there vLLM 0.32 fails on a CPU where a request has a seed
}
TRAINER = {"logging_steps": 10, "use_cpu": True, "bf16": FAST_BF16}
PLAIN = "plain"
WORDINGS_EACH = 3
"""Of how often two answers are compared, at most."""
LONGEST_WORD = 25
"""Letters; a longer one is none ("Mmmm...")."""
FAR = 3.0
"""Standard deviations beyond which two answers do not differ more."""


@dataclass(frozen=True)
class Recipe:
    """Sizes, strengths and lengths.

    Attributes:
        num_prompts: of the training prompts; the last ``num_test_prompts`` of them are for measuring only.
        prompts_per_part: answered by one engine, whose answers are then kept.
        beta, top_k: of guidance without training.
        max_answer: tokens of an answer that are measured and learned from, the first ones.
        margin: by how many standard deviations of the answers' measure two of a comparison differ.
        num_comparisons, num_test_comparisons: at most.
    """

    num_prompts: int = 340
    num_test_prompts: int = 20
    prompts_per_part: int = 85
    max_tokens: int = 96
    temperature: float = 0.7
    beta: float = 3.0
    top_k: int = 40
    max_answer: int = 64
    margin: float = 1.0
    num_comparisons: int = 8000
    num_test_comparisons: int = 120
    combined: float = 0.2
    lora_rank: int = 8
    stage: Stage = field(default_factory=lambda: Stage(lr=1e-3, batch_size=8, beta=0.1, nll_weight=1.5, opposites=True))
    seed: int = 0


FULL = Recipe()
TINY = Recipe(
    num_prompts=2,
    num_test_prompts=1,
    prompts_per_part=2,
    max_tokens=20,
    max_answer=16,
    margin=0.5,
    num_comparisons=4,
    num_test_comparisons=1,
    stage=Stage(lr=5e-4, batch_size=2, opposites=True),
)
"""A minute, and a reward model that has learned next to nothing: for tests."""


def sample(folder: Path, base: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """Answers to the training prompts: ``prompt``, ``how``, ``value`` (that was asked for), ``text``, ``finished``."""
    prompts = wishes.prompts()[: recipe.num_prompts]
    parts = {
        folder / f"answers-{start:03}.jsonl": (base, prompts[start : start + recipe.prompts_per_part], start, recipe)
        for start in range(0, len(prompts), recipe.prompts_per_part)
    }
    missing = {part: arguments for part, arguments in parts.items() if not part.exists()}
    cores = sorted(os.sched_getaffinity(0))[: len(missing)]
    if len(cores) > 1:
        context = multiprocessing.get_context("spawn")
        free = context.SimpleQueue()
        for core in cores:
            free.put(core)
        with ProcessPoolExecutor(len(cores), context, _take_core, (free,)) as pool:
            for done in [pool.submit(_answer_part, part, *arguments) for part, arguments in missing.items()]:
                done.result()
    else:
        for part, arguments in missing.items():
            _answer_part(part, *arguments)
    return [json.loads(line) for part in parts for line in part.read_text("utf-8").splitlines()]


def _take_core(free: SimpleQueue) -> None:
    """An engine on each core answers more than one on all of them, whose threads wait for each other."""
    core = free.get()
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND=str(core), OMP_NUM_THREADS="1")


def _answer_part(part: Path, base: Path, prompts: Sequence[str], first: int, recipe: Recipe) -> None:
    print(f"Answering prompts {first} to {first + len(prompts)}", flush=True)
    write_records(part, _answer(base, prompts, first, recipe))


def _answer(base: Path, prompts: Sequence[str], first: int, recipe: Recipe) -> list[dict[str, Any]]:
    from pad_vllm.reward.template import PromptTemplate
    from pad_vllm.training.data import prompt_ids

    tokenizer = AutoTokenizer.from_pretrained(base)
    template = PromptTemplate(tokenizer, PROMPT_TEMPLATE)
    records, requests = [], []
    for number, prompt in enumerate(prompts, first):
        rng = random.Random(f"{recipe.seed} {number}")
        ids = prompt_ids(prompt, tokenizer)
        for how, value in _ways(rng):
            text = wishes.preference([value], rng) if value else None
            guidance = {"pad_preference": text} if how == "guided" else {}
            requests.append(Request(template.compose(ids, text) if how == "prompted" else ids, guidance))
            records.append({"prompt": prompt, "how": how, "value": value})
    pad = {
        "reward_model": str(base),
        "prompt_template": PROMPT_TEMPLATE,
        "reference": "neutral",
        "beta": recipe.beta,
        "top_k": recipe.top_k,
    }
    answers = generate(
        str(base),
        {"all": requests},
        temperature=recipe.temperature,
        max_tokens=recipe.max_tokens,
        seed=recipe.seed + 1000 * first,
        additional_config={"pad": pad},
        logits_processors=["pad_vllm:PADLogitsProcessor"],
        **ENGINE,
    )["all"]
    num_tokens = sum(map(len, answers.tokens))
    print(f"{len(requests)} answers, {num_tokens} tokens, {num_tokens / answers.seconds:.0f} a second", flush=True)
    ends = tokenizer.eos_token_id
    return [
        record | {"text": text.strip(), "finished": tokens[-1:] == [ends]}
        for record, text, tokens in zip(records, answers.texts, answers.tokens, strict=True)
    ]


def _ways(rng: random.Random) -> Iterator[tuple[str, str | None]]:
    """How a prompt is answered: as it is, as three preferences ask, and guided both ways of four dimensions."""
    yield PLAIN, None
    yield "prompted", "list"  # which an answer hardly ever is by itself
    for value in rng.sample([value for value in DIRECTIONS if value != "list"], 2):
        yield "prompted", value
    for name in rng.sample(list(DIMENSIONS), 4):
        yield "guided", DIMENSIONS[name].less
        yield "guided", DIMENSIONS[name].more


def compare(
    answers: Sequence[Mapping[str, Any]], recipe: Recipe, tokenizer: PreTrainedTokenizerBase, held_out: bool = False
) -> list[dict[str, Any]]:
    """Comparisons of users who want one value, or two: records as ``pad-vllm train`` reads them.

    Two answers are compared twice: by a user who wants what the one has more of, and by a user who wants the opposite.
    So nothing but the preference says which was chosen. No answer goes in circles. Of each the first tokens are
    compared, which training reads; one that is shorter has ended there.

    Args:
        held_out: preferences in words, and of two values together, that training does not use.
    """
    rng = random.Random(f"{recipe.seed} {held_out}")
    by_prompt: dict[str, list[tuple[str, dict[str, float]]]] = defaultdict(list)
    for answer in answers:
        ids = tokenizer.encode(answer["text"], add_special_tokens=False)
        sound = not loops(answer["text"]) and all(len(word) <= LONGEST_WORD for word in answer["text"].split())
        if ids and sound and (answer["finished"] or len(ids) > recipe.max_answer):
            text = tokenizer.decode(ids[: recipe.max_answer])
            by_prompt[answer["prompt"]].append((text, measure(text)))
    found = [m for own in by_prompt.values() for _, m in own]
    spread = {name: statistics.pstdev(m[name] for m in found) or 1.0 for name in DIMENSIONS}

    def couples(values: tuple[str, ...]) -> Iterator[list[dict[str, Any]]]:
        """Of each prompt answers that differ in what these values say, and as little as can be otherwise: the best two
        of every prompt, then others, and all of it again in other words, where it is little."""
        asked = dict(DIRECTIONS[value] for value in values)
        ranked = []
        for prompt, own in by_prompt.items():
            pairs = []
            for (more, m), (less, n) in itertools.permutations(own, 2):
                apart = {name: (m[name] - n[name]) / spread[name] for name in DIMENSIONS}
                wanted = min(sign * apart[name] for name, sign in asked.items())
                unasked = statistics.mean(min(abs(apart[name]), FAR) for name in DIMENSIONS if name not in asked)
                if wanted >= recipe.margin:
                    pairs.append((min(wanted, FAR) - unasked, more, less))
            ranked.append([(prompt, more, less) for more, less in _disjoint(sorted(pairs, reverse=True))])
        rng.shuffle(ranked)
        opposite = tuple(OPPOSITES[value] for value in values)
        in_turn = list(filter(None, itertools.chain(*itertools.zip_longest(*ranked))))
        for prompt, more, less in in_turn * WORDINGS_EACH:
            yield [
                {
                    "prompt": prompt,
                    "preference": wishes.preference(users, rng, held_out),
                    "chosen": chosen,
                    "rejected": rejected,
                    "labels": dict(DIRECTIONS[value] for value in users),
                }
                for users, chosen, rejected in ((values, more, less), (opposite, less, more))
            ]

    total = recipe.num_test_comparisons if held_out else recipe.num_comparisons
    records = []
    for wants, share in (
        ([(dimension.more,) for dimension in DIMENSIONS.values()], 1 - recipe.combined),
        (wishes.combinations(held_out, with_opposites=True), recipe.combined),
    ):
        for values in wants:
            records += itertools.islice(couples(values), max(1, round(total * share / len(wants) / 2)))
    rng.shuffle(records)
    return [record for couple in records for record in couple]


def _disjoint(pairs: Iterable[tuple[float, str, str]]) -> Iterator[tuple[str, str]]:
    """Of pairs of answers, best first, those whose answers are in none before."""
    taken: set[str] = set()
    for _, one, other in pairs:
        if taken.isdisjoint((one, other)):
            taken |= {one, other}
            yield one, other


def learn(folder: Path, recipe: Recipe = FULL, cache_dir: str | None = None) -> Path:
    """All three steps. Returns the reward model's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    base = build_base(cache_dir)
    answers = sample(folder, base, recipe)
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = wishes.prompts()[: recipe.num_prompts]
    test = set(prompts[len(prompts) - recipe.num_test_prompts :])
    files = {}
    for name, held_out in (("train", False), ("test", True)):
        records = compare([a for a in answers if (a["prompt"] in test) == held_out], recipe, tokenizer, held_out)
        print(f"{len(records)} comparisons to {name}: {dict(Counter(d for r in records for d in r['labels']))}")
        files[name] = write_records(folder / f"{name}.jsonl", records)
    reward = folder / "reward"
    if not reward.exists():
        config = TrainingConfig(
            str(files["train"]),
            str(base),
            str(reward),
            stages=("backbone",),
            eval_data=str(files["test"]),
            prompt_template=PROMPT_TEMPLATE,
            lora_rank=recipe.lora_rank,
            max_answer=recipe.max_answer,
            save_steps=200,  # where it is measured too, which takes a minute
            backbone=recipe.stage,
            seed=recipe.seed,
            trainer=TRAINER,
        )
        print(train(config))
    return reward


def pack(folder: Path, target: Path, recipe: Recipe = FULL) -> None:
    """Of a reward model what the demo keeps: its LoRA in half precision, and how it was made."""
    from safetensors.torch import load_file, save_file

    reward = folder / "reward"
    target.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half() for name, tensor in load_file(reward / "adapter" / ADAPTER.name).items()}
    save_file(weights, target / ADAPTER.name, {"format": "pt"})
    settings = json.loads((reward / "adapter" / ADAPTER_SETTINGS.name).read_text())
    kept = {name: settings[name] for name in ("peft_type", "task_type", "r", "lora_alpha", "target_modules")}
    kept["target_modules"] = sorted(kept["target_modules"])
    (target / ADAPTER_SETTINGS.name).write_text(json.dumps(kept, indent=1) + "\n")
    made = json.loads((reward / "training.json").read_text())
    record = {"made_by": "python -m pad_vllm.demo.recipe", "model": "SmolLM2-135M-Instruct", "recipe": asdict(recipe)}
    record |= {name: made[name] for name in ("num_comparisons", "metrics")}
    (target / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of what is made on the way; an unfinished one is gone on with")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="write the LoRA and its record there")
    args = parser.parse_args()
    print(f"The reward model is in {learn(args.folder)}")
    if args.adapter:
        pack(args.folder, args.adapter)


if __name__ == "__main__":
    main()
