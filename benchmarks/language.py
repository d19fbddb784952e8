"""The language table: what guidance does to SmolLM2's English, beside the other ways to personalize it.

    python -m benchmarks.language [--small | --rivals] [--gemma] [--methods NAME ...] [--prompts N] [--part N]
        [--loaded] [--keep] [--harper FOLDER] [--work FOLDER] [--output benchmarks/results]

The reward model is the demo's, trained on SmolLM2's own answers, or SmolLM2 as it is, held against its own answer
without the preference. With ``--gemma`` the base is Gemma 3 270M, which has another tokenizer and follows no
instructions. Users want

- one: of twelve values (six measures, less or more of each);
- two: values of different measures together.

Every method's answers are kept in the work folder as they come, and are not made again, also where there are more
prompts later. A stopped command goes on: ``--part 96`` keeps a method's answers 96 at a time, which take less than a
quarter of an hour. With ``--keep`` the record that is there keeps its rows of methods that have no answers in the work
folder, so that a table can be filled over several days. Where it is of another reward model, only rows of methods that
need none are kept. Writes language.md, language.json and language.png, or those of language-gemma, or language-rivals:
every method on a few prompts.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")

from pad_vllm.demo.gemma import NEXT_QUESTION, build_gemma
from pad_vllm.demo.smollm import build, build_untrained

from .language_bench import FEW_PROMPTS, FULL, GEMMA, SMALL, Bench
from .language_grammar import Harper
from .language_methods import after_work, all_of, at_once
from .language_report import write


def bench_answers(bench: Bench, methods: Sequence[str] = ("",)) -> dict[str, list[dict[str, Any]]]:
    """What the table calls a method -> records of its answers, of those that gave any.

    Args:
        methods: how the names begin of those that are to answer now, beside the base model; of others there is what
            they answered before.
    """
    for stage in (at_once(bench), after_work(bench)):
        bench.answer([one for one in stage if not one.method.is_personal or one.method.name.startswith(tuple(methods))])
    return {one.method.name: records for one in all_of(bench) if (records := bench.kept(one.method))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--small", action="store_true", help="a few prompts and methods, and short answers: a minute")
    parser.add_argument("--rivals", action="store_true", help="every method, on a few prompts")
    parser.add_argument("--prompts", type=int, metavar="N", help="of users with one wish")
    parser.add_argument("--loaded", action="store_true", help="the machine has other work: times say nothing")
    parser.add_argument("--part", type=int, metavar="N", help="answers of a method that are made, and then kept")
    parser.add_argument("--gemma", action="store_true", help="of Gemma 3 270M; see `pad-vllm models --gemma`")
    parser.add_argument(
        "--methods", nargs="+", default=[""], metavar="NAME", help="how their names begin; default: all"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the record's rows of methods without answers in the work folder"
    )
    parser.add_argument("--harper", type=Path, help="folder of the npm package harper.js, to find faults of grammar")
    parser.add_argument("--work", type=Path, help="where answers are kept (default: in the cache of models)")
    parser.add_argument("--cache-dir", help="of the models (default $PAD_VLLM_CACHE or ~/.cache/pad-vllm)")
    args = parser.parse_args()
    models, untrained = build(args.cache_dir), build_untrained(args.cache_dir)
    sizes = SMALL if args.small else FULL
    name = "language"
    stop: tuple[str, ...] = ()
    if args.rivals:
        sizes, name = replace(sizes, **FEW_PROMPTS), "language-rivals"
    if args.prompts is not None:
        sizes = replace(sizes, prompts={**sizes.prompts, "one": args.prompts})
    if args.part is not None:
        sizes = replace(sizes, part=args.part)
    if args.gemma:
        models = models._replace(base=build_gemma(args.cache_dir))
        sizes, name, stop = replace(sizes, **GEMMA), "language-gemma", (NEXT_QUESTION,)
    work = args.work or models.reward.parent / f"{name}-{models.reward.name}{'-small' if args.small else ''}"
    bench = Bench(models, untrained, work, sizes, stop)
    grammar = Harper(args.harper, work / "grammar.json") if args.harper else None
    write(args.output, name, bench, bench_answers(bench, args.methods), args.loaded, grammar, args.keep)


if __name__ == "__main__":
    main()
