"""``pad-vllm models``"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dir", help="folder that keeps the models (default $PAD_VLLM_CACHE or ~/.cache/pad-vllm)"
    )
    parser.add_argument(
        "--gemma", action="store_true", help="use Gemma 3 270M as the base; install it first, under Gemma's terms"
    )


def run(cache_dir: str | None, gemma: bool) -> int:
    from pad_vllm.demo.gemma import build_gemma
    from pad_vllm.demo.smollm import DemoModels, build, build_reward

    with contextlib.redirect_stdout(sys.stderr):  # only the answer goes to a pipe
        models = DemoModels(build_gemma(cache_dir), build_reward(cache_dir)) if gemma else build(cache_dir)
    print(json.dumps({name: str(path) for name, path in models._asdict().items()}))
    return 0
