"""``pad-vllm fit``"""

from __future__ import annotations

import argparse
import json

from pad_vllm.commands.options import assignments, given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="the user's comparisons, 20 to 100: as for train")
    parser.add_argument("--reward-model", required=True, help="folder of a reward model with heads")
    parser.add_argument("--heads", help="file of heads, where it is not beside the model")
    parser.add_argument("--name", default="new-user", help="of the persona (default %(default)s)")
    parser.add_argument("--columns", nargs="+", metavar="FIELD=NAME", default=[], help="names of the data's fields")
    parser.add_argument("--split", default="train", help="of a folder (default %(default)s)")
    parser.add_argument("--prompt-template", help="default: as the reward model's pad.json says")
    parser.add_argument("--insert-after", help="default: as the reward model's pad.json says")


def run(name, columns, prompt_template, **settings) -> int:
    from pad_vllm.training.fit import fit

    found = fit(**settings, **given(prompt_template=prompt_template), columns=assignments("--columns", columns))
    print(
        f"{found.num_comparisons} comparisons: the weights say which answer was chosen in {found.accuracy:.0%}, in "
        f"{found.held_out_accuracy:.0%} of those left out of the fit in turn."
    )
    print("  ".join(f"{head} {weight:+g}" for head, weight in zip(found.names, found.weights, strict=True)))
    print(f"For the server's personas:\n{json.dumps({name: {'pad_weights': found.weights}})}")
    return 0
