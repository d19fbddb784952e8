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
    demo.add_argument("--serve", action="store_true", help="over HTTP: two users of one server, side by side")
    demo.set_defaults(run=_demo)

    check = commands.add_parser("check", help="whether this installation, and a configuration, could guide")
    check.add_argument("config", nargs="?", help="a configuration: the path of a JSON or YAML file, or JSON")
    check.add_argument("--model", help="a base model to hold the configured reward model against")
    check.add_argument("--max-model-len", type=int, help="that the engine would have")
    check.set_defaults(run=_check)

    args = vars(parser.parse_args(argv))
    raise SystemExit(args.pop("run")(**args))


def _demo(serve: bool, **settings) -> None:
    if serve:
        from pad_vllm.demo.serve import serve as run
    else:
        from pad_vllm.demo.show import show as run
    run(**settings)


def _check(**settings) -> int:
    from pad_vllm.check import check

    return check(**settings)


if __name__ == "__main__":
    main()
