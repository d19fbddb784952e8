"""``pad-vllm fit``"""

from __future__ import annotations

import argparse
import json
from typing import Any

from pad_vllm.commands.options import assignments, given
from pad_vllm.params import MAX_PREFERENCES
from pad_vllm.updating import update_personas

NAME = "new-user"
"""Of a persona that nobody names."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="the user's comparisons, best 20 to 100; the format is that of train")
    parser.add_argument(
        "--reward-model",
        required=True,
        help="folder of a reward model with heads; with --attributes, of any reward model; with --adapters, of the "
        "model that they are for",
    )
    basis = parser.add_mutually_exclusive_group()
    basis.add_argument(
        "--attributes", metavar="FILE", help="fit weights of the texts in this JSON or YAML list, not of heads"
    )
    basis.add_argument(
        "--adapters",
        nargs="+",
        metavar="NAME=FOLDER",
        default=[],
        help="fit weights of these LoRA adapters, not of heads; names as in the server's configuration",
    )
    parser.add_argument(
        "--next",
        metavar="FILE",
        dest="pool",
        help="do not fit, but choose from this file the pair of answers that the user should compare next: the one "
        "that tells most about the weights of heads, --attributes or --adapters",
    )
    parser.add_argument("--heads", help="file of heads, if it is not beside the model")
    parser.add_argument("--name", help=f"name of the persona (default {NAME})")
    parser.add_argument(
        "--update",
        metavar="FILE",
        help="add the persona to this JSON or YAML file; a server that reads its personas from this file takes it "
        "without a restart",
    )
    parser.add_argument("--columns", nargs="+", metavar="FIELD=NAME", default=[], help="the data's own names of fields")
    parser.add_argument("--split", default="train", help="split of the data, if it is a folder (default %(default)s)")
    parser.add_argument(
        "--prompt-template", help="text around {prompt} and {preference} (default: from the reward model's pad.json)"
    )
    parser.add_argument(
        "--insert-after", help="text behind which the preference goes (default: from the reward model's pad.json)"
    )


def run(name, update, pool, columns, prompt_template, attributes, adapters, **settings) -> int:
    from pad_vllm.training.fit import fit
    from pad_vllm.training.mixture import fit_adapters, mixture_of
    from pad_vllm.training.sliders import fit_sliders, persona_of, sliders_of

    if update is not None and name is None:
        raise ValueError(f"--update={update!r}: say whose persona it is by --name")
    settings |= given(prompt_template=prompt_template) | {"columns": assignments("--columns", columns)}
    if pool is not None:
        if update is not None:
            raise ValueError("--next: goes without --update: it fits no persona, but names a pair to compare")
        basis = {"attributes": attributes, "adapters": assignments("--adapters", adapters)}
        return print_next(pool, settings | basis)
    if adapters:
        what, found = "adapters", fit_adapters(**settings, adapters=assignments("--adapters", adapters))
    elif attributes is not None:
        what, found = "attributes", fit_sliders(**settings, attributes=attributes)
    else:
        what, found = "heads", fit(**settings)
    print(
        f"{found.num_comparisons} comparisons: the weights predict the choice in {found.accuracy:.0%} of them, and in "
        f"{found.held_out_accuracy:.0%} of those that the fit has not seen (cross-validation)."
    )
    if found.held_out_accuracy < 0.5 + 1 / found.num_comparisons**0.5:  # two standard errors of a coin
        print(f"Chance might do as well: these {what} say little about this user, or there are too few comparisons.")
    persona: dict[str, Any]
    if what == "heads":
        persona = {"pad_weights": found.weights}
        print("  ".join(f"{head} {weight:+g}" for head, weight in zip(found.names, found.weights, strict=True)))
    else:
        sliders = sliders_of(found)
        persona = mixture_of(sliders) if adapters else persona_of(sliders)
        if num_left_out := len(found.names) - len(sliders):
            why = f"at most {MAX_PREFERENCES} are served" if len(found.names) > MAX_PREFERENCES else "their weight is 0"
            print(f"{num_left_out} of {len(found.names)} {what} are left out: {why}.")
        print("\n".join(f"{weight:+.2f}  {text}" for text, weight in sliders.items()))
    print(f"For the server's personas:\n{json.dumps({name or NAME: persona})}")
    if update is not None:
        update_personas(update, name, persona)
        print(f"{name!r} is in {update}.")
    return 0


def print_next(pool: str, settings: dict[str, Any]) -> int:
    """``pad-vllm fit --next``"""
    from pad_vllm.training.choosing import choose

    pair, bits = choose(**settings, pool=pool)
    print(f"The comparison to make next (it should tell {bits:.2f} bits):\n{pair.prompt}")
    print(f"\nA: {pair.chosen}\n\nB: {pair.rejected}\n")
    print("If the user chooses A, add this line to the comparisons; if B, exchange the two answers:")
    record = {"prompt": pair.prompt, "preference": pair.preference, "chosen": pair.chosen, "rejected": pair.rejected}
    columns = settings["columns"]  # as the comparisons have them
    print(json.dumps({columns.get(name, name): value for name, value in record.items() if value is not None}))
    return 0
