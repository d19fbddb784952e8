"""The demo's answers in a terminal."""

from __future__ import annotations

from rich.console import Console

from pad_vllm.demo.client import side_by_side


def test_what_models_say_is_no_markup():
    console = Console(record=True, width=120)
    answers = {"[bold] ada": "a[i] and [red]b[/INST]", "guest": "[link=x]"}
    console.print(side_by_side("Why [not]?", answers))
    shown = console.export_text()
    assert all(text in shown for text in ("Why [not]?", *answers, *answers.values()))
