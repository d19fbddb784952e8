"""The language table's steering vectors: one for each value, from users' choices on training prompts.

A value's vector is the difference of the means of what a layer hands on, over answers that its users chose and those
that they did not. The layer, and the strength, are for all values those that satisfy most on other training prompts
without looping.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pad_vllm.demo import recipe, wishes
from pad_vllm.demo.measures import DIRECTIONS, loops, measures_of
from pad_vllm.evaluation.decoding import STEERING, InTransformers, Steering
from pad_vllm.evaluation.engine import Request
from pad_vllm.evaluation.rivals import mean_activations
from pad_vllm.training.data import Example
from pad_vllm.training.loading import load_causal_lm

from .language_bench import Bench, Cell


def steering_of(bench: Bench) -> Callable[[Cell], Steering]:
    """Each cell's vector, made when the first cell asks for one, and kept."""

    @cache
    def made() -> dict[str, Steering]:
        file = bench.work / "steering.safetensors"
        if not file.exists():
            found = chosen(bench, differences(bench))
            layers = {value: str(one.layer) for value, one in found.items()}
            save_file({value: one.vector.contiguous() for value, one in found.items()}, file, layers)
        with safe_open(file, "pt") as kept:
            return {value: Steering(int(layer), kept.get_tensor(value)) for value, layer in kept.metadata().items()}

    return lambda cell: made()[cell.values[0]]


def differences(bench: Bench) -> dict[str, torch.Tensor]:
    """Value -> for each of the layers the mean over chosen answers less that over rejected ones, (num_layers,
    hidden_size)."""
    model = load_causal_lm("base", bench.models.base).eval()
    pairs = [
        (value, sign, Example(bench.models.plain(record["prompt"]), bench.answer_ids(record[side])))
        for value in DIRECTIONS
        for record in bench.choices[value][: bench.sizes.tuned_pairs]
        for side, sign in (("chosen", 1), ("rejected", -1))
    ]
    # The opposite value has the same answers, the other way round.
    each = list({(tuple(e.prompt), tuple(e.answer)): e for _, _, e in pairs}.values())
    places = {(tuple(e.prompt), tuple(e.answer)): i for i, e in enumerate(each)}
    means = mean_activations(model, each, bench.sizes.steering_layers)

    def mean(value: str, sign: int) -> torch.Tensor:
        own = [(tuple(e.prompt), tuple(e.answer)) for v, s, e in pairs if (v, s) == (value, sign)]
        return means[[places[one] for one in own]].mean(0)

    return {value: mean(value, 1) - mean(value, -1) for value in DIRECTIONS}


def chosen(bench: Bench, differences: dict[str, torch.Tensor]) -> dict[str, Steering]:
    """Value -> the vector, with its strength in it."""
    sizes = bench.sizes
    prompts = wishes.prompts()[-sizes.steering_prompts :]

    def vector(value: str, layer: int, strength: float) -> Steering:
        return Steering(layer, strength * differences[value][sizes.steering_layers.index(layer)])

    settings = list(itertools.product(sizes.steering_layers, sizes.steering_strengths))
    asked = [(setting, value, prompt) for setting in settings for value in DIRECTIONS for prompt in prompts]
    plain = [prompt for prompt in prompts for _ in range(sizes.base_answers)]
    batches = {
        "plain": [Request(bench.models.plain(prompt)) for prompt in plain],
        "steered": [Request(bench.models.plain(prompt), {STEERING: vector(v, *how)}) for how, v, prompt in asked],
    }
    found = InTransformers(bench.models.base).generate(
        batches,
        temperature=sizes.temperature,
        max_tokens=sizes.steering_tokens,
        seed=sizes.seed,
        **recipe.ENGINE,
    )
    unguided = {
        prompt: [measures_of(text) for text, own in zip(found["plain"].texts, plain, strict=True) if own == prompt]
        for prompt in prompts
    }
    good = dict.fromkeys(settings, 0.0)
    for text, (setting, value, prompt) in zip(found["steered"].texts, asked, strict=True):
        if not loops(text):
            good[setting] += _share_beyond(value, text, unguided[prompt]) * len(settings) / len(asked)
    best = max(settings, key=good.__getitem__)
    said = ", ".join(f"layer {layer} x {strength:g} {share:.0%}" for (layer, strength), share in good.items())
    print(f"steering vectors, satisfied without a loop: {said}", flush=True)
    return {value: vector(value, *best) for value in DIRECTIONS}


def _share_beyond(value: str, text: str, unguided: Sequence[dict[str, float]]) -> float:
    """Of how many unguided answers this one is beyond, in the direction of the wish."""
    name, sign = DIRECTIONS[value]
    own = measures_of(text)[name]
    return sum((sign * (own - m[name]) > 0) + 0.5 * (own == m[name]) for m in unguided) / len(unguided)
