"""``pad-vllm demo``: vLLM answers the same prompts for users of different tastes, side by side, and is measured."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pad_vllm.demo.measures import DIMENSIONS, measures_of
from pad_vllm.demo.smollm import DemoModels, build
from pad_vllm.demo.users import DEMO_QUESTIONS, USERS, User
from pad_vllm.evaluation.engine import quiet

if TYPE_CHECKING:
    from vllm import LLM

MAX_TOKENS = 160
TEMPERATURE = 0.7
IN_PICTURE, PICTURE_WIDTH = 3, 104
"""Users, and columns, of a picture that is read at a page's width."""
ENGINE = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "kv_cache_memory_bytes": 512 << 20}


def show(
    beta: float,
    top_k: int,
    seed: int = 0,
    cache_dir: str | None = None,
    svg: str | None = None,
    questions: Sequence[str] = DEMO_QUESTIONS,
) -> None:
    """Make the models if need be, generate through vLLM, print answers and what is measured of them."""
    console = Console(width=None if os.isatty(1) else 120)
    console.rule("[bold]pad-vllm: one model, each user's taste")
    with console.status("Making SmolLM2-135M-Instruct ..."):
        models = build(cache_dir)
    with console.status("Starting vLLM ..."):
        llm = start(models)
    requests = [(question, user) for question in questions for user in (None, *USERS.values())]
    began = time.perf_counter()
    with console.status(f"{len(requests)} answers, as one batch ..."):
        answers = generate(llm, requests, {"pad_beta": beta, "pad_top_k": top_k}, seed)
    seconds = time.perf_counter() - began
    groups = [answers[i : i + len(USERS) + 1] for i in range(0, len(answers), len(USERS) + 1)]
    for question, (unguided, *guided) in zip(questions, groups, strict=True):
        console.print(side_by_side(question, unguided, dict(zip(USERS, guided, strict=True))))
    what = f"SmolLM2-135M-Instruct, guided by a reward model made of it: beta {beta:g}, top-k {top_k}."
    console.print(
        f"{what} {len(answers)} answers in {seconds:.0f} s, users and nobody in one batch. Models in "
        f"{models.base.parent}."
    )
    if svg is not None:
        unguided, *guided = groups[-1]
        table = side_by_side(questions[-1], unguided, dict(zip([*USERS][:IN_PICTURE], guided, strict=False)))
        Path(svg).write_text(picture(table, what))


def picture(table: Table, what: str) -> str:
    """An SVG of one question's answers, which loads nothing from elsewhere."""
    console = Console(width=PICTURE_WIDTH, record=True, file=io.StringIO())
    console.print(table)
    console.print(what)
    svg = re.sub(r"\s*@font-face \{.*?\}", "", console.export_svg(title="make demo"), flags=re.S)
    return svg.replace("Fira Code, monospace", "monospace").replace(" https://www.textualize.io", "")


def start(models: DemoModels) -> LLM:
    """A vLLM engine of SmolLM2, guided by the reward model, in this process."""
    quiet()
    from vllm import LLM

    return LLM(
        str(models.base),
        logits_processors=["pad_vllm:PADLogitsProcessor"],
        additional_config={"pad": {"reward_model": str(models.reward)}},
        **ENGINE,
    )


def generate(
    llm: LLM, requests: Sequence[tuple[str, User | None]], strength: Mapping[str, Any], seed: int
) -> list[str]:
    """An answer for each question and user; for no user an unguided one."""
    from vllm import SamplingParams

    def guidance(user: User | None) -> dict[str, Any] | None:
        return None if user is None else {f"pad_{key}": value for key, value in user.persona.items()} | dict(strength)

    params = [
        SamplingParams(temperature=TEMPERATURE, max_tokens=MAX_TOKENS, seed=seed, extra_args=guidance(user))
        for _, user in requests
    ]
    chats = [[{"role": "user", "content": question}] for question, _ in requests]
    return [output.outputs[0].text.strip() for output in llm.chat(chats, params, use_tqdm=False)]


def side_by_side(question: str, unguided: str, guided: Mapping[str, str]) -> Table:
    """One question's answers, by user, and what is measured of them."""
    table = Table(box=SIMPLE_HEAD, title=f"[bold]{question}", title_justify="left", show_lines=True, expand=True)
    table.add_column("for", ratio=3)
    table.add_column("the answer", ratio=7)
    table.add_column("measured", ratio=3)
    before = measures_of(unguided)
    table.add_row("nobody: unguided", Text(unguided), Text("\n".join(_say(name, before) for name in DIMENSIONS)))
    for name, answer in guided.items():
        user, after = USERS[name], measures_of(answer)
        found = Text()
        for dimension, moved in user.has(before, after).items():
            found.append(f"{_say(dimension, after)} ").append(*(("✓", "green") if moved else ("✗", "red"))).append("\n")
        table.add_row(f"[bold]{name}[/]: {user.say()}\n[dim]({user.what})[/]", Text(answer), found)
    return table


def _say(name: str, measures: Mapping[str, float]) -> str:
    return _WORDS[name].format(measures[name])


_WORDS = {
    "grade": "grade {:.0f}",
    "sentiment": "sentiment {:+.2f}",
    "length": "{:.0f} words",
    "lists": "{:.0f}% of lines listed",
    "person": "{:.1f}% 'you'",
    "emphasis": "{:.1f}% '!', 'very' ...",
}
