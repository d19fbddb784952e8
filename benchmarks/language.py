"""The language table: what guidance does to SmolLM2's English, beside the other ways to personalize it.

    python -m benchmarks.language [--small] [--gemma] [--methods NAME ...] [--work FOLDER] [--output benchmarks/results]

The reward model is the demo's, trained on SmolLM2's own answers, or SmolLM2 as it is, held against its own answer
without the preference. With ``--gemma`` the base is Gemma 3 270M, which has another tokenizer and follows no
instructions. Users want

- one: of twelve values (six measures, less or more of each);
- two: values of different measures together.

Every method's answers are kept in the work folder as they come, and are not made again, also where there are more
prompts later. Writes language.md, language.json and language.png, or those of language-gemma.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")

from pad_vllm.demo import recipe, wishes
from pad_vllm.demo.comparisons import compare
from pad_vllm.demo.gemma import NEXT_QUESTION, build_gemma
from pad_vllm.demo.measures import DIRECTIONS, OPPOSITES
from pad_vllm.demo.smollm import PROMPT_TEMPLATE, DemoModels, build, build_untrained
from pad_vllm.evaluation.engine import Answers, Request, generate
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import answer_ids, prompt_ids
from pad_vllm.training.records import write_records

from .language_rivals import best_of, fit_user, tune_user

GROUPS = ("one", "two")
NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Sizes:
    """How many prompts each group's users ask, and how far the costly methods go.

    Attributes:
        prompts: by group.
        base_answers: unguided answers to each prompt, against which the others are held.
        best_of: answers that the reward model chooses from, for ``best_of_prompts`` of the prompts.
        betas: strengths of guidance by the trained reward model, with the reference that its folder names.
        untrained_betas: and by SmolLM2 itself.
        base_betas: and by the trained one against the base model (``reference: base``).
        fitted: values of users to whom sliders are fitted.
        tuned: values of users for whom a model is tuned by DPO, from ``tuned_pairs`` comparisons.
        choice_prompts: training prompts whose answers those users chose from.
        together: methods that an engine answers before their answers are kept.
    """

    prompts: Mapping[str, int]
    base_answers: int = 4
    best_of: int = 8
    best_of_prompts: int = 4
    betas: tuple[float, ...] = (1.0, 1.5, 2.0)
    untrained_betas: tuple[float, ...] = (2.5,)
    base_betas: tuple[float, ...] = (1.0,)
    fitted: tuple[str, ...] = ("brief", "emphatic")
    tuned: tuple[str, ...] = ("brief", "personal")
    tuned_pairs: int = 96
    choice_prompts: int = 85
    max_tokens: int = 128
    temperature: float = 0.7
    top_k: int = 40
    seed: int = 0
    together: int = 2


FULL = Sizes({"one": 80, "two": 16})
GEMMA = {
    "base_betas": (0.8, 1.0),
    "untrained_betas": (2.5,),
    "best_of_prompts": 0,
    "fitted": (),
    "tuned": (),
    "choice_prompts": 0,
}
"""What is not done on Gemma: answers that take models or choices of its own."""
SMALL = Sizes(
    {"one": 1, "two": 1},
    base_answers=1,
    best_of=2,
    best_of_prompts=1,
    betas=(1.5,),
    untrained_betas=(2.5,),
    fitted=(),
    tuned=(),
    choice_prompts=0,
    max_tokens=16,
    together=9,
)


class Cell(NamedTuple):
    """What a user wants of an answer to a prompt, and how the user says it."""

    group: str
    prompt: str
    values: tuple[str, ...]
    preference: str


class Plan(NamedTuple):
    """What a method asks for cells (``base``: for prompts), and the engine that it asks."""

    indices: Sequence[int]
    requests: Sequence[Request]
    model: Path
    pad: Mapping[str, Any]

    def like(self, other: Plan) -> bool:
        """Whether one engine can answer both."""
        return self.model == other.model and self.pad == other.pad


class Bench:
    """Answers of every method, made as they are asked for and kept in ``work``.

    Args:
        models: the base, and the trained reward model.
        untrained: the reward model that is SmolLM2.
        stop: how the base goes on after an answer, other than by an end token.
    """

    def __init__(self, models: DemoModels, untrained: Path, work: Path, sizes: Sizes, stop: Sequence[str] = ()) -> None:
        from transformers import AutoTokenizer

        self.models, self.untrained, self.work, self.sizes, self.stop = models, untrained, work, sizes, stop
        self.tokenizer = AutoTokenizer.from_pretrained(models.base)
        self.template = PromptTemplate(self.tokenizer, PROMPT_TEMPLATE)
        self.cells = list(cells(sizes))
        self.prompts = list(dict.fromkeys(cell.prompt for cell in self.cells))
        work.mkdir(parents=True, exist_ok=True)

    @cached_property
    def choices(self) -> dict[str, list[dict[str, Any]]]:
        """Comparisons that a user of each value made among SmolLM2's answers to training prompts."""
        base, sizes = self.models.base, replace(recipe.FULL, num_prompts=self.sizes.choice_prompts)
        records = compare(recipe.sample(self.work, base, base, sizes), self.tokenizer, num=10**6, combined=0.0)
        once = {(r["prompt"], r["chosen"], r["rejected"], *r["labels"].items()): r for r in records}.values()
        return {value: [r for r in once if r["labels"] == {name: sign}] for value, (name, sign) in DIRECTIONS.items()}

    def answer(self, plans: Mapping[str, Plan]) -> dict[str, list[dict[str, Any]]]:
        """Method -> records of its answers: ``cell``, ``text``, ``num_tokens``, ``nll``, ``seconds``. A few methods
        share an engine."""
        missing = {method: left for method, plan in plans.items() if (left := self._left(method, plan)).requests}
        while missing:
            first = next(iter(missing.values()))
            now = [method for method in missing if missing[method].like(first)][: self.sizes.together]
            answers = generate(
                str(first.model),
                {method: missing[method].requests for method in now},
                temperature=self.sizes.temperature,
                max_tokens=self.sizes.max_tokens,
                seed=self.sizes.seed + max(len(self.kept(method)) for method in now),
                nll=True,
                stop=self.stop,
                additional_config={"pad": {"top_k": self.sizes.top_k, **first.pad}},
                logits_processors=["pad_vllm:PADLogitsProcessor"],
                **recipe.ENGINE,
            )
            for method in now:
                self.keep(method, missing.pop(method).indices, answers[method])
        return {method: self.kept(method) for method in plans}

    def _left(self, method: str, plan: Plan) -> Plan:
        """What is left of a plan after what was kept."""
        kept = Counter(record["cell"] for record in self.kept(method))
        left = []
        for i, request in zip(plan.indices, plan.requests, strict=True):
            kept[i] -= 1
            if kept[i] < 0:
                left.append((i, request))
        return plan._replace(indices=[i for i, _ in left], requests=[request for _, request in left])

    def kept(self, method: str) -> list[dict[str, Any]]:
        """What a method answered so far, of the cells that there are."""
        places = {place: i for i, place in enumerate(self.places(method))}
        records = [record | {"cell": places.get(tuple(record["of"]))} for record in self._records(method)]
        return [record for record in records if record["cell"] is not None]

    def _records(self, method: str) -> list[dict[str, Any]]:
        file = self.work / f"{method}.jsonl"
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []

    def places(self, method: str) -> list[tuple[str, ...]]:
        """What each index of a method's plan is, in words: of ``base`` a prompt, of all others a cell."""
        if method == "base":
            return [(prompt,) for prompt in self.prompts]
        return [(cell.group, cell.prompt, cell.preference) for cell in self.cells]

    def keep(self, method: str, indices: Sequence[int], answers: Answers) -> None:
        """Add answers to what was kept."""
        seconds, places = answers.seconds / len(indices), self.places(method)
        records = [
            {"of": places[i], "text": text.strip(), "num_tokens": len(tokens), "nll": nll, "seconds": seconds}
            for i, text, tokens, nll in zip(indices, answers.texts, answers.tokens, answers.nll or [], strict=True)
        ]
        print(f"{method}: {len(records)} answers in {answers.seconds:.0f} s", flush=True)
        write_records(self.work / f"{method}.jsonl", [*self._records(method), *records])

    def plain(self, prompt: str) -> list[int]:
        return prompt_ids(prompt, self.tokenizer)

    def answer_ids(self, text: str) -> list[int]:
        """An answer in the base's tokens, as it would have written it."""
        if self.stop:  # a document, which has no end token
            return self.tokenizer.encode(f" {text}", add_special_tokens=False)
        return answer_ids(text, self.tokenizer)

    def with_examples(self, cell: Cell) -> list[int]:
        """The prompt after three of the user's own choices, and the preference."""
        rng = random.Random(f"{self.sizes.seed} {cell.prompt}")
        chosen = rng.sample(self.choices[cell.values[0]], NUM_EXAMPLES)
        messages = [
            message
            for record in chosen
            for message in (
                {"role": "user", "content": record["prompt"]},
                {"role": "assistant", "content": record["chosen"]},
            )
        ]
        ids = self.tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": cell.prompt}], add_generation_prompt=True, return_dict=False
        )
        return self.template.compose(ids, cell.preference)


def cells(sizes: Sizes) -> Iterator[Cell]:
    prompts = wishes.prompts(held_out=True)
    for number, group in enumerate(GROUPS):
        rng = random.Random(sizes.seed + number)
        wants = wishes.combinations(held_out=True) if group == "two" else [(value,) for value in DIRECTIONS]
        for prompt in prompts[: sizes.prompts[group]]:
            for values in wants:
                yield Cell(group, prompt, values, wishes.preference(values, rng, held_out=True))


def answers_of(bench: Bench, methods: Sequence[str] = ("",)) -> dict[str, list[dict[str, Any]]]:
    """Method -> records. Those of ``base`` are of prompts, and of all others of cells.

    Args:
        methods: how the names begin of those that are to answer now; of others there is what they answered before.
    """

    def wanted(method: str) -> bool:
        return method == "base" or method.startswith(tuple(methods))

    sizes, cells = bench.sizes, bench.cells
    reward, untrained = ({"reward_model": str(path)} for path in (bench.models.reward, bench.untrained))
    singles = [i for i, cell in enumerate(cells) if cell.group == "one"]
    plans: dict[str, Plan] = {}

    def ask(
        method: str, indices: Sequence[int], request: Callable[[Cell], Request], pad: Mapping = reward, **engine: Path
    ) -> None:
        model = engine.get("model", bench.models.base)
        if wanted(method):
            plans[method] = Plan(indices, [request(cells[i]) for i in indices], model, pad)
        elif bench.kept(method):
            plans[method] = Plan([], [], model, pad)

    def guided(beta: float, **arguments: str) -> Callable[[Cell], Request]:
        return lambda cell: Request(
            bench.plain(cell.prompt), {"pad_preference": cell.preference, "pad_beta": float(beta), **arguments}
        )

    def from_the_opposite(beta: float) -> Callable[[Cell], Request]:
        """A slider: more of the wish, less of its opposite."""

        def request(cell: Cell) -> Request:
            rng = random.Random(f"{sizes.seed} {cell.preference} {cell.prompt}")
            texts = [cell.preference, wishes.preference([OPPOSITES[cell.values[0]]], rng, held_out=True)]
            arguments = {"pad_preference": texts, "pad_preference_weights": [1.0, -1.0], "pad_beta": float(beta)}
            return Request(bench.plain(cell.prompt), arguments)

        return request

    def prompted(cell: Cell) -> Request:
        return Request(bench.template.compose(bench.plain(cell.prompt), cell.preference))

    numbers = [number for number in range(len(bench.prompts)) for _ in range(sizes.base_answers)]
    everyone = range(len(cells))
    plans["base"] = Plan(numbers, [Request(bench.plain(bench.prompts[n])) for n in numbers], bench.models.base, reward)
    ask("prompting", everyone, prompted)
    for beta in sizes.betas:
        ask(f"PAD, beta {beta:g}", everyone, guided(beta))
    for beta in sizes.base_betas:
        ask(f"PAD against the base, beta {beta:g}", everyone, guided(beta, pad_reference="base"))
    if sizes.base_betas:  # a neutral reference would read the preference too, in the base's prompt
        first = guided(sizes.base_betas[0], pad_reference="base")
        ask("prompting and PAD", everyone, lambda cell: Request(prompted(cell).prompt, first(cell).guidance))
    for beta in sizes.untrained_betas:
        ask(f"PAD untrained, beta {beta:g}", everyone, guided(beta), untrained)
        ask(f"PAD untrained, from the opposite, beta {beta:g}", singles, from_the_opposite(beta), untrained)
    found = bench.answer(plans)
    plans.clear()
    method = f"best of {sizes.best_of}"
    if sizes.best_of_prompts and wanted(method) and not bench.kept(method):
        best_of(bench, method, singles)
    if best := bench.kept(method):
        found[method] = best
    if sizes.choice_prompts:
        ask("prompting with examples", singles, lambda cell: Request(bench.with_examples(cell)))
    for value in sizes.fitted:
        method, own = f"sliders of {value}", [i for i in singles if cells[i].values == (value,)]
        sliders = fit_user(bench, value) if wanted(method) and len(bench.kept(method)) < len(own) else {}
        ask(method, own, lambda cell, s=sliders: Request(bench.plain(cell.prompt), s))
    with tempfile.TemporaryDirectory() as folder:
        for value in sizes.tuned:
            method, own = f"DPO for {value}", [i for i in singles if cells[i].values == (value,)]
            tune = wanted(method) and len(bench.kept(method)) < len(own)
            model = tune_user(bench, value, Path(folder, value)) if tune else bench.models.base
            ask(method, own, lambda cell: Request(bench.plain(cell.prompt)), model=model)
        return found | bench.answer(plans)


def main() -> None:
    from .language_report import write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--small", action="store_true", help="a few prompts and methods, and short answers: a minute")
    parser.add_argument("--gemma", action="store_true", help="of Gemma 3 270M; see `pad-vllm models --gemma`")
    parser.add_argument(
        "--methods", nargs="+", default=[""], metavar="NAME", help="how their names begin; default: all"
    )
    parser.add_argument("--work", type=Path, help="where answers are kept (default: in the cache of models)")
    parser.add_argument("--cache-dir", help="of the models (default $PAD_VLLM_CACHE or ~/.cache/pad-vllm)")
    args = parser.parse_args()
    models, untrained = build(args.cache_dir), build_untrained(args.cache_dir)
    sizes = SMALL if args.small else FULL
    name, stop = "language", ()
    if args.gemma:
        models = models._replace(base=build_gemma(args.cache_dir))
        sizes, name, stop = replace(sizes, **GEMMA), "language-gemma", (NEXT_QUESTION,)
    work = args.work or models.reward.parent / f"{name}-{models.reward.name}{'-small' if args.small else ''}"
    bench = Bench(models, untrained, work, sizes, stop)
    write(args.output, name, bench, answers_of(bench, args.methods))


if __name__ == "__main__":
    main()
