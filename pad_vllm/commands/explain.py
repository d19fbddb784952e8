"""``pad-vllm explain``"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pad_vllm.commands.options import given
from pad_vllm.config import read_pad
from pad_vllm.reading import json_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt as text; with --chat, what the user says")
    parser.add_argument("--model", required=True, help="the base model")
    parser.add_argument("--reward-model", help="the reward model; overrides the one that --config names")
    parser.add_argument("--config", help="a server's pad configuration: a JSON or YAML file, or JSON itself")
    parser.add_argument(
        "--with",
        dest="settings",
        action="append",
        default=[],
        metavar="JSON",
        help='the guidance of one answer, such as \'{"preference": "Be concise."}\'; give it once for each answer',
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--max-tokens", type=int, default=64, help="most tokens of each answer (default %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="(default %(default)g, which takes the most likely token)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default %(default)s)")
    parser.add_argument("--tokens", action="store_true", help="also print a table with a row for each token")
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page, and print no answers")
    parser.add_argument("--max-model-len", type=int, help="of the engine, as vLLM's option")
    parser.add_argument("--engine-args", metavar="JSON", help="further arguments of vLLM's engine")


def run(
    prompt: str,
    model: str,
    reward_model: str | None,
    config: str | None,
    settings: list[str],
    tokens: bool,
    html: str | None,
    engine_args: str | None,
    max_model_len: int | None,
    **options: Any,
) -> int:
    asked = [json_object("--with", text) for text in settings]
    engine = {} if engine_args is None else json_object("--engine-args", engine_args)
    engine |= given(max_model_len=max_model_len)
    if html is not None and not Path(html).absolute().parent.is_dir():  # before the minutes that it takes
        raise ValueError(f"--html {html!r}: there is no such folder")
    for key, value in {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}.items():
        os.environ.setdefault(key, value)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    from pad_vllm.explain.explaining import explain

    pad = read_configuration(config, reward_model)
    explanation = explain(model, pad, prompt, asked, engine=engine, **options)
    if html is not None:
        from pad_vllm.explain.document import document

        Path(html).write_text(document(explanation), encoding="utf-8")
        print(f"written: {html}")
    if html is None or tokens:
        from pad_vllm.explain.terminal import print_answers, print_tokens

        if html is None:
            print_answers(explanation)
        if tokens:
            print_tokens(explanation)
    return 0


def read_configuration(config: str | None, reward_model: str | None) -> Mapping[str, Any]:
    """``pad`` of a server's ``additional_config``. Raises ValueError where no reward model is named."""
    pad: Mapping[str, Any] = {}
    if config is not None:
        named: Any = json_object("--config", config) if config.lstrip().startswith("{") else config
        pad = read_pad({"pad": named}) or {}
    if reward_model is not None:
        pad = {**pad, "reward_model": reward_model}
    if not pad.get("reward_model"):
        raise ValueError("no reward model is named: give --reward-model, or a --config that names one")
    return pad
