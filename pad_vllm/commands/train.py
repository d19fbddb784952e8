"""``pad-vllm train``"""

from __future__ import annotations

import argparse

from pad_vllm.commands.options import assignments, given, json_assignments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", help="preference set: JSON lines, or a folder that the datasets library reads; see docs/training.md"
    )
    parser.add_argument("--model", required=True, help="causal language model to start from: path or hub id")
    parser.add_argument("--output", required=True, help="folder to write the reward model to; must not exist")
    parser.add_argument(
        "--reference", help="reference model pi_ref; best is the base model that you will serve (default: --model)"
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=("backbone", "heads"),
        help="what to train (default: the backbone, and heads if the data has labels)",
    )
    parser.add_argument("--eval-data", help="comparisons to measure accuracy on (default: a twentieth of the data)")
    parser.add_argument("--columns", nargs="+", metavar="FIELD=NAME", default=[], help="the data's own names of fields")
    parser.add_argument("--split", default="train", help="split of the data, if it is a folder (default %(default)s)")
    parser.add_argument(
        "--prompt-template", help="text around {prompt} and {preference}; as in the server's configuration"
    )
    parser.add_argument(
        "--insert-after",
        help="text behind which the preference goes (default: where the chat template puts messages); kept in pad.json",
    )
    parser.add_argument(
        "--max-length", type=int, help="leave out comparisons of more tokens (default: the model's positions)"
    )
    parser.add_argument("--max-answer", type=int, help="learn from only the first tokens of an answer (default: all)")
    parser.add_argument(
        "--lora-rank",
        type=int,
        default=0,
        help="train a LoRA of this rank, which is then the reward model (default: train all weights)",
    )
    parser.add_argument(
        "--adapter", help="continue to train the LoRA in this folder, such as the output of an earlier run"
    )
    parser.add_argument("--save-steps", type=int, default=200, help="steps between checkpoints (default %(default)s)")
    parser.add_argument(
        "--trainer",
        nargs="+",
        metavar="NAME=JSON",
        default=[],
        help="further settings of transformers' TrainingArguments",
    )
    parser.add_argument("--seed", type=int, default=0)
    for stage, lr in (("backbone", 5e-6), ("heads", 1e-3)):
        parser.add_argument(f"--{stage}-lr", type=float, default=lr, help="peak learning rate (default %(default)s)")
        parser.add_argument(
            f"--{stage}-epochs", type=float, default=1.0, help="passes over the data (default %(default)s)"
        )
    parser.add_argument("--batch-size", type=int, default=16, help="comparisons a step (default %(default)s)")
    parser.add_argument("--beta", type=float, default=0.1, help="scale of the PAD loss (default %(default)s)")
    parser.add_argument(
        "--nll-weight",
        type=float,
        default=1.0,
        help="weight of the chosen answers' likelihood in the loss (default %(default)s)",
    )
    parser.add_argument(
        "--opposites",
        action="store_true",
        help="the data has each comparison twice, once from a user who chose the other answer; judge the two together",
    )


def run(
    columns,
    stages,
    prompt_template,
    backbone_lr,
    backbone_epochs,
    heads_lr,
    heads_epochs,
    batch_size,
    beta,
    nll_weight,
    opposites,
    trainer,
    **settings,
) -> int:
    from pad_vllm.training.train import Stage, TrainingConfig, train

    common = {"batch_size": batch_size, "beta": beta, "nll_weight": nll_weight}
    config = TrainingConfig(
        **settings,
        **given(prompt_template=prompt_template),
        columns=assignments("--columns", columns),
        trainer=json_assignments("--trainer", trainer),
        stages=tuple(stages) if stages else None,
        backbone=Stage(lr=backbone_lr, epochs=backbone_epochs, opposites=opposites, **common),
        heads=Stage(lr=heads_lr, epochs=heads_epochs, **common),
    )
    for stage, metrics in train(config).items():
        print(stage + ": " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    print(f"The reward model is in {config.output}; `pad-vllm check` reads it with the server's configuration.")
    return 0
