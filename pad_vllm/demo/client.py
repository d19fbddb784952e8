"""Answers for several users of one server, streamed side by side.

``python -m pad_vllm.demo.client QUESTION --base-url URL --model NAME --personas ada ben``
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping

from openai import AsyncOpenAI
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text


def answers_table(question: str, answers: Mapping[str, str]) -> Table:
    """Title -> answer, as columns. All of it is text, whose brackets are no markup."""
    shown = Table(box=SIMPLE_HEAD, title=Text(question, "bold"), title_justify="left", expand=True)
    for title in answers:
        shown.add_column(Text(title), ratio=1)
    shown.add_row(*map(Text, answers.values()))
    return shown


async def stream_side_by_side(
    console: Console, base_url: str, model: str, question: str, personas: Mapping[str, str | None], **settings
) -> dict[str, str]:
    """Ask once for every persona, at the same time, and show the answers as they grow.

    Args:
        personas: column's title -> persona; None: an unguided answer.
        settings: of the chat completions, such as ``max_tokens``.

    Returns:
        title -> answer.
    """
    answers = dict.fromkeys(personas, "")

    async with AsyncOpenAI(base_url=base_url, api_key="-") as client:

        async def ask(title: str, live: Live) -> None:
            persona = personas[title]
            chunks = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                stream=True,
                extra_body={} if persona is None else {"vllm_xargs": {"pad_persona": persona}},
                **settings,
            )
            async for chunk in chunks:
                answers[title] += chunk.choices[0].delta.content or ""
                live.update(answers_table(question, answers))

        with Live(answers_table(question, answers), console=console) as live:
            await asyncio.gather(*(ask(title, live) for title in personas))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers for several users of one server, streamed side by side.")
    parser.add_argument("question")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--personas", nargs="+", required=True)
    args = parser.parse_args()
    asyncio.run(
        stream_side_by_side(Console(), args.base_url, args.model, args.question, {name: name for name in args.personas})
    )


if __name__ == "__main__":
    main()
