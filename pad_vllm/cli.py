"""The ``pad-vllm`` command: a table of its parts in :mod:`pad_vllm.commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from pad_vllm import __version__

COMMANDS = {
    "demo": ("demo", "vLLM answers the same prompts for users of different tastes"),
    "playground": ("playground", "a page to try guidance with, beside a server that runs"),
    "explain": ("explain", "one prompt under several settings, token by token"),
    "models": ("models", "make the demo's models, and say where they are"),
    "check": ("check", "whether this installation, and a configuration, could guide"),
    "train": ("train", "learn a personalized reward model from a preference set"),
    "fit": ("fit", "a new user's weights from a few comparisons"),
    "eval": ("evaluate", "ways to personalize answers, measured side by side"),
    "convert": ("convert", "a reward model of a checkpoint with a value head, or a LoRA adapter"),
    "traces": ("traces", "what guidance did to a server's requests, by persona"),
    "bench": ("bench", "what guidance costs, beside the other ways to get it"),
}
"""Name -> its module, and what it does."""


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="pad-vllm", description="Personalized alignment at decoding time inside vLLM."
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text)
        if name in argv[:1]:  # the others are not imported
            command = import_module(f"pad_vllm.commands.{module}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.run)
    settings = vars(parser.parse_args(argv))
    try:
        raise SystemExit(settings.pop("run")(**settings))
    except (ValueError, OSError) as error:  # what the user got wrong is a line, not a traceback
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
