"""An explanation on a terminal."""

from __future__ import annotations

import math
import os

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pad_vllm.explain.explaining import ExplainedAnswer, Explanation
from pad_vllm.explain.words import NO_TEXT, cells_of_token, columns, readable, shade, summary

PALE, FULL = (255, 240, 222), (245, 130, 20)
"""Of the least shade that is shown, and of the whole one."""
LEAST_SHADE, LEAST_WIDTH = 0.05, 28
"""A narrower column of text than this is hard to read: then answers stand below each other."""


def screen() -> Console:
    return Console(width=None if os.isatty(1) else 120)


def print_answers(explanation: Explanation) -> None:
    """All answers, each token shaded by its divergence, and underlined where it is not the base's first choice."""
    console = screen()
    console.print(Text(readable(explanation.prompt), style="bold"))
    answers = explanation.answers
    if console.width // len(answers) >= LEAST_WIDTH:
        table = Table(box=SIMPLE_HEAD, expand=True)
        for answer in answers:
            table.add_column(Text(readable(answer.label)), ratio=1)
        table.add_row(*(shaded(answer) for answer in answers))
        table.add_row(*(Text(summary(answer), style="dim") for answer in answers))
        console.print(table)
    else:
        for answer in answers:
            console.rule(Text(readable(answer.label)), align="left")
            console.print(shaded(answer))
            console.print(Text(summary(answer), style="dim"))
    console.print(
        Text.assemble(
            "Shaded by divergence: ",
            *((f" {nats:g} ", style_of(1 - math.exp(-nats))) for nats in (0.25, 1, 3)),
            " nats; ",
            ("underlined", "underline"),
            ": not what the base model would have said first.",
        )
    )


def shaded(answer: ExplainedAnswer) -> Text:
    text = Text()
    for token in answer.tokens:
        style = style_of(shade(token))
        if token.token_id != token.first_id:
            style += Style(underline=True)
        text.append(readable(token.text).replace("\n", "↵\n") or NO_TEXT, style)
    return text


def style_of(strength: float) -> Style:
    """Of a shade in [0, 1]; readable on a dark screen and on a light one."""
    if strength < LEAST_SHADE:
        return Style()
    mixed = [round(pale + strength * (full - pale)) for pale, full in zip(PALE, FULL, strict=True)]
    return Style(color="black", bgcolor="#{:02x}{:02x}{:02x}".format(*mixed))


def print_tokens(explanation: Explanation) -> None:
    """A table for each answer, a row for each token."""
    console = screen()
    for answer in explanation.answers:
        console.print(token_table(answer))


def token_table(answer: ExplainedAnswer) -> Table:
    table = Table(box=SIMPLE_HEAD, title=Text(readable(answer.label), style="bold"), title_justify="left")
    table.add_column("#", justify="right")
    for i, name in enumerate(columns(answer)):
        table.add_column(Text(name), justify="left" if i in (0, 2) else "right")
    for i, token in enumerate(answer.tokens):
        cells = map(Text, cells_of_token(token))
        table.add_row(str(i), *cells, style=None if token.token_id == token.first_id else "bold")
    return table
