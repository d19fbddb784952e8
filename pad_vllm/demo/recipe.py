"""A reward model for SmolLM2, learned from its own answers: ``python -m pad_vllm.demo.recipe FOLDER``.

1. SmolLM2 answers the training prompts through the engine: plain, with a preference in its prompt, and guided by itself
   (``reference: neutral``), which needs no training and goes to extremes.
2. Answers to one prompt that differ in a measure become comparisons of a user who wants that
   (:mod:`pad_vllm.demo.comparisons`).
3. ``pad-vllm train`` learns a LoRA from them.
4. Once more: guided by what was learned, weakly, answers differ as much and read better. Training goes on.

:mod:`pad_vllm.demo.balance` does all of it, and a last round of another kind.

Each step keeps what it has done, and goes on from there when it is started again. ``--adapter`` writes
what the demo has of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

from pad_vllm.demo import wishes
from pad_vllm.demo.comparisons import compare
from pad_vllm.demo.measures import DIMENSIONS, DIRECTIONS, OPPOSITES
from pad_vllm.demo.smollm import ADAPTER_SETTINGS, ADAPTER_WEIGHTS, PROMPT_TEMPLATE, build_base
from pad_vllm.evaluation.engine import Request, generate_batches
from pad_vllm.training.records import read_records, write_records
from pad_vllm.training.train import Stage, TrainingConfig, train

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

FAST_BF16 = torch.cpu._is_avx512_bf16_supported()
ENGINE: dict[str, Any] = {
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


@dataclass(frozen=True)
class Round:
    """One time of sampling and learning.

    Attributes:
        beta, top_k: of the guidance by what the round before has learned; at first by SmolLM2 itself.
        prompted, guided, guided_combinations: answers to a prompt that are asked for in words; dimensions, and
            combinations of two values, that answers are guided to, both ways.
        num_comparisons, num_test_comparisons: at most.
        combined: share of those in which a user wants two values.
        stage: of ``pad-vllm train``.
    """

    beta: float
    stage: Stage
    top_k: int = 40
    prompted: int = 3
    guided: int = 4
    guided_combinations: int = 0
    num_comparisons: int = 8000
    num_test_comparisons: int = 120
    combined: float = 0.2


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths, in all rounds.

    Attributes:
        num_prompts: of the training prompts; the last ``num_test_prompts`` of them are for measuring only.
        prompts_per_part: answered by one engine, whose answers are then kept.
        max_answer: tokens of an answer that are measured and learned from, the first ones.
        margin: by how many standard deviations of the answers' measure two of a comparison differ.
    """

    rounds: tuple[Round, ...]
    num_prompts: int = 340
    num_test_prompts: int = 20
    prompts_per_part: int = 85
    max_tokens: int = 96
    temperature: float = 0.7
    max_answer: int = 64
    margin: float = 1.0
    lora_rank: int = 8
    seed: int = 0


_STAGE = Stage(lr=1e-3, batch_size=8, beta=0.1, nll_weight=1.5, opposites=True)
FULL = Recipe(
    (
        Round(beta=3.0, stage=_STAGE),
        Round(
            beta=1.0,
            stage=replace(_STAGE, lr=5e-4),
            prompted=1,
            guided=3,
            guided_combinations=2,
            num_comparisons=4400,
            combined=0.35,
        ),
    )
)
_SHORT = Round(
    beta=3.0,
    stage=Stage(lr=5e-4, batch_size=2, opposites=True),
    prompted=1,
    guided=2,
    num_comparisons=2,
    num_test_comparisons=1,
)
TINY = Recipe(
    (_SHORT, replace(_SHORT, beta=1.0, guided=1, guided_combinations=1)),
    num_prompts=2,
    num_test_prompts=1,
    prompts_per_part=2,
    max_tokens=20,
    max_answer=16,
    margin=0.5,
)
"""A minute, and a reward model that has learned next to nothing: for tests."""


def sample(folder: Path, base: Path, reward: Path, recipe: Recipe, number: int = 0) -> list[dict[str, Any]]:
    """A round's answers to the prompts: ``prompt``, ``how``, ``values`` (asked for), ``text``, ``finished``."""
    prompts = wishes.prompts()[: recipe.num_prompts]
    parts = {
        folder / f"answers-{start:03}.jsonl": (
            *(base, reward, prompts[start : start + recipe.prompts_per_part]),
            *(start, recipe, number),
        )
        for start in range(0, len(prompts), recipe.prompts_per_part)
    }
    return answer_parts(parts, answer_round)


def answer_parts(
    parts: Mapping[Path, tuple[Any, ...]], answer: Callable[..., list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """What ``answer`` makes of each part's arguments, kept in the part's file; an engine on each core.

    Args:
        answer: a function that a process finds by its name.
    """
    missing = {part: arguments for part, arguments in parts.items() if not part.exists()}
    cores = sorted(os.sched_getaffinity(0))[: len(missing)]
    if len(cores) > 1:
        context = multiprocessing.get_context("spawn")
        free = context.SimpleQueue()
        for core in cores:
            free.put(core)
        with ProcessPoolExecutor(len(cores), context, _take_core, (free,)) as pool:
            tasks = [pool.submit(_answer_part, part, answer, *arguments) for part, arguments in missing.items()]
            for done in tasks:
                done.result()
    else:
        for part, arguments in missing.items():
            _answer_part(part, answer, *arguments)
    return [record for part in parts for record in read_records(part)]


def _take_core(free: SimpleQueue) -> None:
    """An engine on each core answers more than one on all of them, whose threads wait for each other."""
    core = free.get()
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND=str(core), OMP_NUM_THREADS="1")


def _answer_part(part: Path, answer: Callable[..., list[dict[str, Any]]], *arguments: Any) -> None:
    print(f"Answering for {part.name}", flush=True)
    write_records(part, answer(*arguments))


def answer_round(
    base: Path, reward: Path, prompts: Sequence[str], first: int, recipe: Recipe, number: int
) -> list[dict[str, Any]]:
    from pad_vllm.reward.template import PromptTemplate
    from pad_vllm.training.data import end_token, prompt_ids

    turn = recipe.rounds[number]
    tokenizer = AutoTokenizer.from_pretrained(base)
    template = PromptTemplate(tokenizer, PROMPT_TEMPLATE)
    records, requests = [], []
    for i, prompt in enumerate(prompts, first):
        rng = random.Random(f"{recipe.seed} {i}" + f" {number}" * bool(number))
        ids = prompt_ids(prompt, tokenizer)
        for how, values in _ways(turn, rng):
            text = wishes.preference(values, rng) if values else ""
            guidance = {"pad_preference": text} if how == "guided" else {}
            requests.append(Request(template.compose(ids, text) if how == "prompted" else ids, guidance))
            records.append({"prompt": prompt, "how": how, "values": values})
    pad = {
        "reward_model": str(reward),
        "prompt_template": PROMPT_TEMPLATE,
        "reference": "neutral",
        "beta": turn.beta,
        "top_k": turn.top_k,
    }
    answers = generate_batches(
        str(base),
        {"all": requests},
        temperature=recipe.temperature,
        max_tokens=recipe.max_tokens,
        seed=recipe.seed + 1000 * first + number,
        additional_config={"pad": pad},
        logits_processors=["pad_vllm:PADLogitsProcessor"],
        **ENGINE,
    )["all"]
    num_tokens = sum(map(len, answers.tokens))
    print(f"{len(requests)} answers, {num_tokens} tokens, {num_tokens / answers.seconds:.0f} a second", flush=True)
    ends = end_token(tokenizer)
    return [
        record | {"text": text.strip(), "finished": tokens[-1:] == [ends]}
        for record, text, tokens in zip(records, answers.texts, answers.tokens, strict=True)
    ]


def _ways(turn: Round, rng: random.Random) -> Iterator[tuple[str, list[str]]]:
    """How a prompt is answered: as it is, as some preferences ask, and guided both ways."""
    yield PLAIN, []
    others = rng.sample([value for value in DIRECTIONS if value != "list"], turn.prompted - 1)
    for value in ["list", *others]:  # which an answer hardly ever is by itself
        yield "prompted", [value]
    for name in rng.sample(list(DIMENSIONS), turn.guided):
        yield "guided", [DIMENSIONS[name].less]
        yield "guided", [DIMENSIONS[name].more]
    for values in rng.sample(wishes.combinations(with_opposites=True), turn.guided_combinations):
        yield "guided", list(values)
        yield "guided", [OPPOSITES[value] for value in values]


def learn(folder: Path, recipe: Recipe = FULL, cache_dir: str | None = None) -> Path:
    """All rounds, each in a folder of its own. Returns the last one's reward model's folder."""
    base = build_base(cache_dir)
    reward, adapter = base, None
    for number in range(len(recipe.rounds)):
        own = _round_folder(folder, number)
        own.mkdir(parents=True, exist_ok=True)
        if not (own / "reward").exists():
            _learn(own, base, adapter, sample(own, base, reward, recipe, number), recipe, number)
        reward = adapter = own / "reward"
    return reward


def _round_folder(folder: Path, number: int) -> Path:
    return folder / f"round-{number + 1}"


def _learn(
    folder: Path, base: Path, adapter: Path | None, answers: list[dict[str, Any]], recipe: Recipe, number: int
) -> None:
    turn = recipe.rounds[number]
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = wishes.prompts()[: recipe.num_prompts]
    test = set(prompts[len(prompts) - recipe.num_test_prompts :])
    files = {}
    for name, held_out in (("train", False), ("test", True)):
        records = compare(
            [a for a in answers if (a["prompt"] in test) == held_out],
            tokenizer,
            turn.num_test_comparisons if held_out else turn.num_comparisons,
            *(recipe.max_answer, recipe.margin, turn.combined, recipe.seed, held_out),
        )
        print(f"{len(records)} comparisons to {name}: {dict(Counter(d for r in records for d in r['labels']))}")
        files[name] = write_records(folder / f"{name}.jsonl", records)
    config = TrainingConfig(
        str(files["train"]),
        str(base),
        str(folder / "reward"),
        stages=("backbone",),
        eval_data=str(files["test"]),
        prompt_template=PROMPT_TEMPLATE,
        lora_rank=0 if adapter else recipe.lora_rank,
        adapter=str(adapter) if adapter else None,
        max_answer=recipe.max_answer,
        save_steps=200,  # where it is measured too, which takes a minute
        backbone=turn.stage,
        seed=recipe.seed,
        trainer=TRAINER,
    )
    print(train(config))


def pack(folder: Path, target: Path, recipe: Recipe = FULL) -> None:
    """Of a reward model what the demo keeps: its LoRA in half precision, and how it was made."""
    made = [
        json.loads((_round_folder(folder, number) / "reward" / "training.json").read_text())
        for number in range(len(recipe.rounds))
    ]
    record = {
        "made_by": "python -m pad_vllm.demo.recipe",
        "model": "SmolLM2-135M-Instruct",
        "recipe": asdict(recipe),
        "rounds": [{name: one[name] for name in ("num_comparisons", "metrics")} for one in made],
    }
    write_packed(_round_folder(folder, len(recipe.rounds) - 1) / "reward", target, record)


def write_packed(reward: Path, target: Path, record: Mapping[str, Any]) -> None:
    """A LoRA in half precision, and its record."""
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half() for name, tensor in load_file(reward / ADAPTER_WEIGHTS).items()}
    save_file(weights, target / ADAPTER_WEIGHTS, {"format": "pt"})
    settings = json.loads((reward / ADAPTER_SETTINGS).read_text())
    kept = {name: settings[name] for name in ("peft_type", "task_type", "r", "lora_alpha", "target_modules")}
    kept["target_modules"] = sorted(kept["target_modules"])
    (target / ADAPTER_SETTINGS).write_text(json.dumps(kept, indent=1) + "\n")
    (target / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def run_rounds(
    said: str | None, name: str, learn_rounds: Callable[[Path, bool], tuple[Path, Mapping[str, Any]]]
) -> None:
    """The command of a module whose rounds follow these.

    Args:
        said: the module's docstring.
        learn_rounds: with a folder, and whether the last round alone follows the demo's adapter: the reward model's
            folder, and the record of all rounds.
    """
    parser = _parser(said)
    parser.add_argument("--from-demo", action="store_true", help="the last round alone, of the demo's adapter")
    args = parser.parse_args()
    reward, record = learn_rounds(args.folder, args.from_demo)
    print(f"The reward model is in {reward}")
    if args.adapter:
        write_packed(reward, args.adapter, {**record, "made_by": f"python -m {name}"})


def _parser(said: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(said or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="of what is made on the way; an unfinished one is gone on with")
    parser.add_argument("--adapter", type=Path, metavar="FOLDER", help="write the LoRA and its record there")
    return parser


def main() -> None:
    args = _parser(__doc__).parse_args()
    print(f"The reward model is in {learn(args.folder)}")
    if args.adapter:
        pack(args.folder, args.adapter)


if __name__ == "__main__":
    main()
