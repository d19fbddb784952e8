"""``pad-vllm demo``"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--beta", type=float, default=1.0, help="guidance strength (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=10, help="candidates per token (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the world, the models and the sampling")
    parser.add_argument(
        "--cache-dir", help="where trained models are kept (default $PAD_VLLM_CACHE or ~/.cache/pad-vllm)"
    )
    parser.add_argument("--serve", action="store_true", help="over HTTP: two users of one server, side by side")


def run(serve: bool, **settings) -> int:
    if serve:
        from pad_vllm.demo.serve import serve as show_served

        return show_served(**settings)
    from pad_vllm.demo.show import show

    show(**settings)
    return 0
