"""``pad-vllm demo``: vLLM answers the same prompts for users of different tastes, side by side, and is measured."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pad_vllm.demo import world
from pad_vllm.demo.models import DemoModels, build

if TYPE_CHECKING:
    from vllm import LLM

MAX_TOKENS = 96
TEMPERATURE = 0.8
NUM_QUESTIONS = 48
"""Questions per preference in the table of measurements."""

USERS: dict[str, dict[str, str]] = {
    "Ada": {"length": "concise", "tone": "formal"},
    "Ben": {"tone": "playful", "stance": "direct", "example": "example"},
    "Cleo": {"length": "concise", "stance": "cautious", "tone": "playful"},
    "Dev": {"tone": "formal", "restatement": "restating", "example": "example", "encouragement": "encouraging"},
}
"""What each user wants; the last two want dimensions together that no training preference asks for together."""


def show(beta: float = 1.0, top_k: int = 10, seed: int = 0, cache_dir: str | None = None) -> None:
    """Train the models if need be, generate through vLLM, print answers and measurements."""
    console = Console(width=None if os.isatty(1) else 120)
    console.rule("[bold]pad-vllm: one model, each user's taste")
    models = build(cache_dir, seed)
    console.print(
        f"Models in {models.base.parent}. The reward model rewards the answer that was asked for above the other in "
        f"{models.metrics['backbone']['accuracy']:.0%} of pairs about topics, in words and in combinations that it was "
        "never trained on."
    )
    with console.status("Starting vLLM ..."):
        llm = start(models)

    rng = random.Random(seed)
    for question in _questions(2, rng):
        _print_answers(console, llm, question, {"pad_beta": beta, "pad_top_k": top_k}, rng)
    _print_measurements(console, measure(llm, beta, top_k, seed), beta, top_k)


def start(models: DemoModels) -> LLM:
    """A vLLM engine of the base model, guided by the reward model."""
    # Quiet, in this process, and reaching nothing; the parent's environment wins.
    for key, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        os.environ.setdefault(key, value)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    from vllm import LLM

    return LLM(
        str(models.base),
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        kv_cache_memory_bytes=256 << 20,
        logits_processors=["pad_vllm:PADLogitsProcessor"],
        additional_config={"pad": {"reward_model": str(models.reward)}},
    )


def generate(
    llm: LLM, questions: Sequence[str], extra_args: Sequence[Mapping | None], temperature: float, seed: int = 0
) -> list[str]:
    """One answer per question, each with its own guidance arguments (None: unguided)."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=temperature, max_tokens=MAX_TOKENS, seed=seed + i, extra_args=args)
        for i, args in enumerate(extra_args)
    ]
    chats = [[{"role": "user", "content": question}] for question in questions]
    return [output.outputs[0].text for output in llm.chat(chats, params, use_tqdm=False)]


def measure(llm: LLM, beta: float, top_k: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Mean satisfaction without and with guidance, of every single value and two held-out combinations.

    Sampled at temperature 0.8, on questions in a phrasing that the reward model was never trained on.
    """
    rng = random.Random(seed)
    wants = {value: {dimension: value} for dimension, values in world.DIMENSIONS.items() for value in values}
    wants |= {" + ".join(USERS[name].values()): USERS[name] for name in ("Cleo", "Dev")}
    questions = _questions(NUM_QUESTIONS, rng)
    unguided = generate(llm, questions, [None] * len(questions), TEMPERATURE, seed)
    guidance = [
        {"pad_preference": world.preference(wanted, rng), "pad_beta": beta, "pad_top_k": top_k}
        for wanted in wants.values()
        for _ in questions
    ]
    guided = generate(llm, questions * len(wants), guidance, TEMPERATURE, seed)
    satisfied = {}
    for i, (name, wanted) in enumerate(wants.items()):
        own = guided[i * len(questions) : (i + 1) * len(questions)]
        satisfied[name] = (_mean_satisfaction(unguided, wanted), _mean_satisfaction(own, wanted))
    return satisfied


def _questions(number: int, rng: random.Random) -> list[str]:
    """Questions about different topics, in a phrasing that the reward model was never trained on."""
    topics = rng.sample(world.TOPICS, number)
    return [rng.choice(world.HELD_OUT_QUESTIONS).format(topic.task) for topic in topics]


def _mean_satisfaction(texts: Sequence[str], wanted: Mapping[str, str]) -> float:
    return sum(world.satisfaction(text, wanted) for text in texts) / len(texts)


def _print_answers(console: Console, llm: LLM, question: str, guidance: dict, rng: random.Random) -> None:
    """One question, answered unguided and for every user."""
    preferences = {name: world.preference(wanted, rng) for name, wanted in USERS.items()}
    extra_args = [None, *({"pad_preference": text, **guidance} for text in preferences.values())]
    unguided, *answers = generate(llm, [question] * len(extra_args), extra_args, temperature=0)
    table = Table(box=SIMPLE_HEAD, title=f"[bold]{question}", title_justify="left", show_lines=True, expand=True)
    table.add_column("for", ratio=3)
    table.add_column("the answer", ratio=6)
    table.add_column("unguided > guided", ratio=3)
    table.add_row("nobody: unguided", unguided, "")
    for (name, wanted), answer in zip(USERS.items(), answers, strict=True):
        seen = " [dim](a combination never trained on)[/]" if world.is_held_out(wanted) else ""
        table.add_row(f"[bold]{name}[/]: {preferences[name]}{seen}", answer, _compare(unguided, answer, wanted))
    console.print(table)


def _compare(unguided: str, guided: str, wanted: Mapping[str, str]) -> Text:
    """Each wanted value, and whether either answer shows it."""
    text = Text()
    before, after = world.measure(unguided), world.measure(guided)
    for dimension, value in wanted.items():
        marks = [("✓", "green") if found[dimension] == value else ("✗", "red") for found in (before, after)]
        text.append(f"{_label(value)} ").append(*marks[0]).append(" > ").append(*marks[1]).append("\n")
    return text


def _label(value: str) -> str:
    return f"with {value}" if value == "example" else value


def _print_measurements(
    console: Console, satisfied: Mapping[str, tuple[float, float]], beta: float, top_k: int
) -> None:
    title = f"[bold]Preferences satisfied[/] (beta {beta:g}, top-k {top_k}, {NUM_QUESTIONS} questions each)"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("preference")
    table.add_column("unguided", justify="right")
    table.add_column("guided", justify="right")
    table.add_column("")
    for name, (unguided, guided) in satisfied.items():
        label = " + ".join(map(_label, name.split(" + ")))
        bar = Text("█" * round(20 * unguided), "dim").append("█" * max(round(20 * (guided - unguided)), 0), "green")
        table.add_row(label + (" *" if "+" in name else ""), f"{unguided:.0%}", f"{guided:.0%}", bar)
    console.print(table)
    console.print("* combinations that the reward model was never trained on")
