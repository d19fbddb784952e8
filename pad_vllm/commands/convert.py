"""``pad-vllm convert``"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="folder of a LoRA adapter, or of a checkpoint with a value head (the authors' release, TRL)"
    )
    parser.add_argument("target", help="folder to write; must not exist")


def run(source: str, target: str) -> int:
    from pad_vllm.training.export import convert

    print(f"The reward model is in {convert(source, target)}")
    return 0
