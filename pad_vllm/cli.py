"""The ``pad-vllm`` command. Its subcommands are in :mod:`pad_vllm.commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from pad_vllm import __version__

COMMANDS = {
    "demo": ("demo", "answer the same prompts, through vLLM, for users of different tastes"),
    "playground": ("playground", "open a page on which you try guidance on a running server"),
    "explain": ("explain", "answer one prompt under several settings, and show what guidance did to each token"),
    "models": ("models", "make the demo's models, and print their folders"),
    "check": ("check", "check that this installation, and a configuration, can guide"),
    "train": ("train", "train a personalized reward model on a preference set"),
    "fit": ("fit", "fit a new user's weights to a few comparisons"),
    "eval": ("evaluate", "measure several ways to personalize answers side by side"),
    "convert": ("convert", "make a reward model from a LoRA adapter or a checkpoint with a value head"),
    "traces": ("traces", "summarize what guidance did to a server's requests"),
    "bench": ("bench", "measure what guidance costs, beside the other ways to be guided"),
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
        subparser = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
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
