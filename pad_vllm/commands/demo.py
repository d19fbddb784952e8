"""``pad-vllm demo``"""

from __future__ import annotations

import argparse

from pad_vllm.demo.smollm import DEFAULTS
from pad_vllm.demo.users import DEMO_BETA


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--beta", type=float, default=DEMO_BETA, help="guidance strength (default %(default)s)")
    parser.add_argument(
        "--top-k", type=int, default=DEFAULTS["top_k"], help="candidates per token (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the sampling (default %(default)s)")
    parser.add_argument(
        "--cache-dir", help="folder that keeps the models (default $PAD_VLLM_CACHE or ~/.cache/pad-vllm)"
    )
    parser.add_argument("--svg", metavar="FILE", help="also write a picture of the last question's first answers")
    served = "start a server, show its answers to two users and an unguided one side by side, and open the playground"
    parser.add_argument("--serve", action="store_true", help=served)


def run(serve: bool, svg: str | None, **settings) -> int:
    if serve:
        from pad_vllm.demo.serve import serve as show_served

        return show_served(**settings)
    from pad_vllm.demo.show import show

    show(svg=svg, **settings)
    return 0
