"""The ``pad-vllm`` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from pad_vllm.benchmarks.throughput import add_arguments as add_bench_arguments


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
    check.add_argument("--engine-args", type=json.loads, metavar="JSON", help="other arguments of the engine")
    check.set_defaults(run=_check)

    _add_train(commands.add_parser("train", help="learn a personalized reward model from a preference set"))
    _add_fit(commands.add_parser("fit", help="a new user's weights from a few comparisons"))

    evaluate = commands.add_parser("eval", help="ways to personalize answers, measured side by side")
    evaluate.add_argument("config", help="what to evaluate: a JSON or YAML file; see docs/training.md")
    evaluate.add_argument("--output", required=True, help="folder for the table, the JSON and the plots")
    evaluate.set_defaults(run=_eval)

    convert = commands.add_parser("convert", help="a reward model of a checkpoint with a value head, or a LoRA adapter")
    convert.add_argument("source", help="folder: the released layout, TRL's value head models, or an adapter")
    convert.add_argument("target", help="folder to write; must not exist")
    convert.set_defaults(run=_convert)

    bench = commands.add_parser("bench", help="what guidance costs, beside the other ways to get it")
    bench.set_defaults(run=_bench)
    add_bench_arguments(bench)

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


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", help="preference set: JSON lines, or a folder that datasets reads; see docs/training.md"
    )
    parser.add_argument("--model", required=True, help="causal language model to start from: path or hub id")
    parser.add_argument("--output", required=True, help="folder of the reward model; must not exist")
    parser.add_argument("--reference", help="pi_ref, best the base model to be served (default: the model itself)")
    parser.add_argument(
        "--stages", nargs="+", choices=("backbone", "heads"), help="default: what the data has labels for"
    )
    parser.add_argument("--eval-data", help="comparisons to measure on (default: a twentieth of the data)")
    parser.add_argument("--columns", nargs="+", metavar="FIELD=NAME", default=[], help="names of the data's fields")
    parser.add_argument("--split", default="train", help="of a folder (default %(default)s)")
    parser.add_argument("--prompt-template", help="as in the server's configuration")
    parser.add_argument("--insert-after", help="where other than the chat template's messages say; goes into pad.json")
    parser.add_argument(
        "--max-length", type=int, help="longer comparisons are left out (default: the model's positions)"
    )
    parser.add_argument(
        "--lora-rank", type=int, default=0, help="train a LoRA, merged at the end (default: all weights)"
    )
    parser.add_argument("--save-steps", type=int, default=200, help="steps between checkpoints (default %(default)s)")
    parser.add_argument(
        "--trainer", nargs="+", metavar="NAME=JSON", default=[], help="of transformers' TrainingArguments"
    )
    parser.add_argument("--seed", type=int, default=0)
    for stage, lr in (("backbone", 5e-6), ("heads", 1e-3)):
        parser.add_argument(f"--{stage}-lr", type=float, default=lr, help="peak learning rate (default %(default)s)")
        parser.add_argument(
            f"--{stage}-epochs", type=float, default=1.0, help="passes over the data (default %(default)s)"
        )
    parser.add_argument("--batch-size", type=int, default=16, help="comparisons a step (default %(default)s)")
    parser.add_argument("--beta", type=float, default=0.1, help="scale of the PAD loss (default %(default)s)")
    parser.add_argument("--nll-weight", type=float, default=1.0, help="of the chosen answers (default %(default)s)")
    parser.set_defaults(run=_train)


def _add_fit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="the user's comparisons, 20 to 100: as for train")
    parser.add_argument("--reward-model", required=True, help="folder of a reward model with heads")
    parser.add_argument("--heads", help="file of heads, where it is not beside the model")
    parser.add_argument("--name", default="new-user", help="of the persona (default %(default)s)")
    parser.add_argument("--columns", nargs="+", metavar="FIELD=NAME", default=[], help="names of the data's fields")
    parser.add_argument("--split", default="train", help="of a folder (default %(default)s)")
    parser.add_argument("--prompt-template", help="default: as the reward model's pad.json says")
    parser.add_argument("--insert-after", help="default: as the reward model's pad.json says")
    parser.set_defaults(run=_fit)


def _assignments(option: str, values: Sequence[str]) -> dict[str, str]:
    if strange := [value for value in values if "=" not in value]:
        raise ValueError(f"{option}: {strange[0]!r}: expected NAME=VALUE")
    return dict(value.split("=", 1) for value in values)


def _given(**settings) -> dict:
    """Those that were given: the rest have defaults of their own."""
    return {name: value for name, value in settings.items() if value is not None}


def _train(
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
    trainer,
    **settings,
) -> int:
    from pad_vllm.training.train import Stage, TrainingConfig, train

    common = {"batch_size": batch_size, "beta": beta, "nll_weight": nll_weight}

    def run() -> None:
        config = TrainingConfig(
            **settings,
            **_given(prompt_template=prompt_template),
            columns=_assignments("--columns", columns),
            trainer={name: json.loads(value) for name, value in _assignments("--trainer", trainer).items()},
            stages=tuple(stages) if stages else None,
            backbone=Stage(lr=backbone_lr, epochs=backbone_epochs, **common),
            heads=Stage(lr=heads_lr, epochs=heads_epochs, **common),
        )
        for stage, metrics in train(config).items():
            print(stage + ": " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
        print(f"The reward model is in {config.output}; `pad-vllm check` reads it with the server's configuration.")

    return _or_error(run)


def _fit(name, columns, prompt_template, **settings) -> int:
    from pad_vllm.training.fit import fit

    def run() -> None:
        found = fit(**settings, **_given(prompt_template=prompt_template), columns=_assignments("--columns", columns))
        print(
            f"{found.num_comparisons} comparisons: the weights say which answer was chosen in {found.accuracy:.0%}, in "
            f"{found.held_out_accuracy:.0%} of those left out of the fit in turn."
        )
        print("  ".join(f"{head} {weight:+g}" for head, weight in zip(found.names, found.weights, strict=True)))
        print(f"For the server's personas:\n{json.dumps({name: {'pad_weights': found.weights}})}")

    return _or_error(run)


def _eval(config: str, output: str) -> int:
    from pathlib import Path

    from pad_vllm.evaluation.evaluate import evaluate, read_config
    from pad_vllm.evaluation.report import plot, table

    def run() -> None:
        sys.path.insert(0, str(Path(config).resolve().parent))  # the checker's module may stand beside its name
        result = evaluate(read_config(config))
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "evaluation.md").write_text(table(result["rows"]))
        plot({"base": result["rows"]}, folder)
        print(table(result["rows"]))

    return _or_error(run)


def _bench(**settings) -> int:
    from pad_vllm.benchmarks.throughput import main

    return _or_error(lambda: main(argparse.Namespace(**settings)))


def _convert(source: str, target: str) -> int:
    from pad_vllm.training.export import convert

    return _or_error(lambda: print(f"The reward model is in {convert(source, target)}"))


def _or_error(run: Callable[[], None]) -> int:
    """What the user got wrong is a line, not a traceback."""
    try:
        run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    main()
