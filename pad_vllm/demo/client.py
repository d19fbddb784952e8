"""Answers for several users of one server, streamed side by side.

``python -m pad_vllm.demo.client QUESTION --base-url URL --model NAME --personas ada ben``
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

from openai import AsyncOpenAI
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table


async def stream_side_by_side(
    console: Console, base_url: str, model: str, question: str, personas: Sequence[str], **settings
) -> dict[str, str]:
    """Ask once for every persona, at the same time, and show the answers as they grow.

    Args:
        settings: of the chat completions, such as ``max_tokens``.

    Returns:
        persona -> answer.
    """
    answers = dict.fromkeys(personas, "")

    def table() -> Table:
        shown = Table(box=SIMPLE_HEAD, title=f"[bold]{question}", title_justify="left", expand=True)
        for persona in personas:
            shown.add_column(persona, ratio=1)
        shown.add_row(*answers.values())
        return shown

    async with AsyncOpenAI(base_url=base_url, api_key="-") as client:

        async def ask(persona: str, live: Live) -> None:
            chunks = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                stream=True,
                extra_body={"vllm_xargs": {"pad_persona": persona}},
                **settings,
            )
            async for chunk in chunks:
                answers[persona] += chunk.choices[0].delta.content or ""
                live.update(table())

        with Live(table(), console=console) as live:
            await asyncio.gather(*(ask(persona, live) for persona in personas))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description="Answers for several users of one server, streamed side by side.")
    parser.add_argument("question")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--personas", nargs="+", required=True)
    args = parser.parse_args()
    asyncio.run(stream_side_by_side(Console(), args.base_url, args.model, args.question, args.personas))


if __name__ == "__main__":
    main()
