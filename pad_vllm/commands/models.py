"""``pad-vllm models``"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache-dir", help="where models are kept (default $PAD_VLLM_CACHE or ~/.cache/pad-vllm)")


def run(cache_dir: str | None) -> int:
    from pad_vllm.demo.smollm import build

    with contextlib.redirect_stdout(sys.stderr):  # only the answer goes to a pipe
        models = build(cache_dir)
    print(json.dumps({name: str(path) for name, path in models._asdict().items()}))
    return 0
