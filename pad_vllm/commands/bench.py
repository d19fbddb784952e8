"""``pad-vllm bench``"""

from __future__ import annotations

import argparse

from pad_vllm.benchmarks.throughput import add_arguments, main

__all__ = ["add_arguments", "run"]


def run(**settings) -> int:
    main(argparse.Namespace(**settings))
    return 0
