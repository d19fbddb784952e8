"""The demo's answers in a terminal."""

from __future__ import annotations

from rich.console import Console

from pad_vllm.demo.client import answers_table


def test_what_models_say_is_no_markup():
    console = Console(record=True, width=120)
    answers = {"[bold] ada": "a[i] and [red]b[/INST]", "guest": "[link=x]"}
    console.print(answers_table("Why [not]?", answers))
    shown = console.export_text()
    assert all(text in shown for text in ("Why [not]?", *answers, *answers.values()))
