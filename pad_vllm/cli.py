"""The ``pad-vllm`` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="pad-vllm", description="Personalized alignment at decoding time inside vLLM."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="vLLM answers the same prompts for users of different tastes")
    demo.add_argument("--beta", type=float, default=1.0, help="guidance strength (default %(default)s)")
    demo.add_argument("--top-k", type=int, default=10, help="candidates per token (default %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the world, the models and the sampling")
    demo.add_argument(
        "--cache-dir", help="where trained models are kept (default $PAD_VLLM_CACHE or ~/.cache/pad-vllm)"
    )
    demo.set_defaults(run=_demo)

    args = vars(parser.parse_args(argv))
    args.pop("run")(**args)


def _demo(**settings) -> None:
    from pad_vllm.demo.show import show

    show(**settings)


if __name__ == "__main__":
    main()
