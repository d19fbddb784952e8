"""The language table's rivals that take work for each user, or for each prompt: best of n, sliders, DPO."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pad_vllm.demo import recipe, wishes
from pad_vllm.demo.measures import DIMENSIONS, DIRECTIONS
from pad_vllm.evaluation.engine import Answers, Request, generate
from pad_vllm.training.data import Example
from pad_vllm.training.records import write_records

if TYPE_CHECKING:
    from .language import Bench

NUM_CHOICES = 30
"""Comparisons of a user to whom sliders are fitted."""


def best_of(bench: Bench, method: str, singles: Sequence[int]) -> None:
    """Of several answers of the base model that which the reward model rewards most, as log pi_theta - log pi_ref."""
    from transformers import AutoModelForCausalLM

    from pad_vllm.training.trainer import score_answers

    sizes = bench.sizes
    prompts = list(dict.fromkeys(bench.cells[i].prompt for i in singles))[: sizes.best_of_prompts]
    own = [i for i in singles if bench.cells[i].prompt in prompts]
    start = time.perf_counter()
    asked = [Request(bench.plain(prompt)) for prompt in prompts for _ in range(sizes.best_of)]
    drawn = generate(
        str(bench.models.base),
        {method: asked},
        temperature=sizes.temperature,
        max_tokens=sizes.max_tokens,
        seed=sizes.seed + 10**6,
        nll=True,
        **recipe.ENGINE,
    )[method]
    by_prompt = {p: range(n * sizes.best_of, (n + 1) * sizes.best_of) for n, p in enumerate(prompts)}
    reference, model = (AutoModelForCausalLM.from_pretrained(m).eval() for m in bench.models)
    ref = score_answers(reference, [Example(list(r.prompt), t) for r, t in zip(asked, drawn.tokens, strict=True)])
    best = []
    for i in own:
        cell = bench.cells[i]
        rows = by_prompt[cell.prompt]
        context = bench.template.compose(bench.plain(cell.prompt), cell.preference)
        rewards = score_answers(model, [Example(context, drawn.tokens[n]) for n in rows]) - ref[list(rows)]
        best.append(rows[int(rewards.argmax())])
    texts, tokens, nll = ([x[n] for n in best] for x in (drawn.texts, drawn.tokens, drawn.nll))
    bench.keep(method, own, Answers(texts, tokens, time.perf_counter() - start, nll))


def fit_user(bench: Bench, value: str) -> dict[str, Any]:
    """Arguments of a user's requests, from comparisons in which the user never said what was wanted."""
    from pad_vllm.training.sliders import fit_sliders, persona_of, sliders_of

    # One text for each end of three dimensions, the user's among them.
    names = list(dict.fromkeys([DIRECTIONS[value][0], *DIMENSIONS]))[:3]
    texts = [wishes.wordings(end)[0] for name in names for end in (DIMENSIONS[name].less, DIMENSIONS[name].more)]
    with tempfile.TemporaryDirectory() as folder:
        attributes = Path(folder, "attributes.json")
        attributes.write_text(json.dumps(texts))
        data = write_records(Path(folder, "choices.jsonl"), bench.choices[value][:NUM_CHOICES])
        fitted = fit_sliders(str(bench.models.reward), data, attributes)
    print(f"sliders of {value}: {sliders_of(fitted)}, {fitted.held_out_accuracy:.0%} of what was left out", flush=True)
    return persona_of(sliders_of(fitted)) | {"pad_beta": bench.sizes.betas[len(bench.sizes.betas) // 2]}


def tune_user(bench: Bench, value: str, target: Path) -> Path:
    """A model for one user, by DPO: the PAD objective without a preference to read."""
    from pad_vllm.training.train import TrainingConfig, train

    records = [{**r, "preference": None, "labels": {}} for r in bench.choices[value][: bench.sizes.tuned_pairs]]
    data = write_records(target.with_name("choices.jsonl"), records)
    stage = replace(recipe.FULL.rounds[0].stage, epochs=2.0, opposites=False)
    config = TrainingConfig(
        str(data),
        str(bench.models.base),
        str(target),
        stages=("backbone",),
        lora_rank=recipe.FULL.lora_rank,
        save_steps=10**6,
        max_answer=recipe.FULL.max_answer,
        backbone=stage,
        trainer=recipe.TRAINER,
    )
    train(config)
    return target
