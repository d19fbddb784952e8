"""What transformers answers in the language table: steering vectors and Persona-judge, against forwards written out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.language_bench import SMALL, Bench
from benchmarks.language_methods import all_of, fit_user, tune_user
from pad_vllm.demo import smollm
from pad_vllm.demo.comparisons import compare
from pad_vllm.demo.measures import DIRECTIONS
from pad_vllm.evaluation.decoding import (
    DRAFTS_PER_ROUND,
    JUDGE,
    STEERING,
    ReadRows,
    Steering,
    judged,
    num_accepted_of,
    remainder,
    sampled,
)
from pad_vllm.evaluation.engine import Request
from pad_vllm.evaluation.rivals import mean_activations
from pad_vllm.training.data import Example

ANSWERS = Path(__file__).parents[1] / "data" / "answers.jsonl"
PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [14, 15, 16]]
GREEDY = 1e-4
"""A temperature."""


def dice(num: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(num)]


@torch.inference_mode()
def last_logits(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids])).logits[0, -1]


@torch.inference_mode()
def test_rows_of_a_batch_read_forget_and_leave(models):
    model = models.base_model
    contexts = ReadRows(model, PROMPTS)
    found = contexts.read(torch.stack([contexts.last, torch.tensor([20, 21, 22])], 1))
    contexts.forget(2, torch.tensor([1, 2, 1]))
    after = contexts.read(torch.tensor([[30], [31], [32]]))
    read = []
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(found[row, 0], last_logits(model, prompt), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[row, 1], last_logits(model, [*prompt, 20 + row]), atol=1e-4, rtol=1e-4)
        read.append([*prompt, *([21] if row == 1 else []), 30 + row])
        torch.testing.assert_close(after[row, 0], last_logits(model, read[-1]), atol=1e-4, rtol=1e-4)
    contexts.keep(torch.tensor([0, 2]))
    last = contexts.read(torch.tensor([[40], [42]]))
    torch.testing.assert_close(last[1, 0], last_logits(model, [*read[2], 42]), atol=1e-4, rtol=1e-4)


def test_a_steering_vector_is_added_where_the_answer_is_predicted(models):
    model = models.base_model
    generator = torch.Generator().manual_seed(3)
    vectors = [Steering(layer, 4 * torch.randn(model.config.hidden_size, generator=generator)) for layer in (0, 1, 0)]
    plain = [Request(prompt) for prompt in PROMPTS]
    steered = [Request(prompt, {STEERING: one}) for prompt, one in zip(PROMPTS, vectors, strict=True)]
    found = sampled(model, steered, dice(3), GREEDY, 6)
    assert found != sampled(model, plain, dice(3), GREEDY, 6)
    for prompt, (layer, vector), answer in zip(PROMPTS, vectors, found, strict=True):

        def add(_module, _inputs, output, prompt=prompt, vector=vector):
            output[:, len(prompt) - 1 :] += vector
            return output

        hook = model.model.layers[layer].register_forward_hook(add)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
        hook.remove()
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_means_are_over_the_answers_tokens(models):
    model = models.base_model
    examples = [Example([7, 8], [9, 10, 11]), Example([12, 13, 14], [15])]
    found = mean_activations(model, examples, [0, 1], batch_size=2)
    for row, (prompt, answer) in enumerate(examples):
        with torch.inference_mode():
            states = model(torch.tensor([[*prompt, *answer]]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(found[row, 0], states[1][0, len(prompt) :].mean(0), atol=1e-5, rtol=1e-4)


def test_drafts_are_accepted_until_the_first_that_is_not():
    q = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.4, 0.4]]).expand(3, 2, 3)
    p = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.4, 0.1], [0.1, 0.2, 0.7]]).expand(3, 3, 3)
    drafts = torch.tensor([[0, 1], [1, 2], [0, 2]])
    uniform = torch.tensor([[0.4, 0.99], [0.6, 0.0], [0.0, 0.3]])
    assert num_accepted_of(drafts, p, q, uniform).tolist() == [2, 0, 1]
    expected = torch.tensor([[0.0, 0.0, 0.5], [0.3, 0.0, 0.0], [0.1, 0.2, 0.7]])
    torch.testing.assert_close(remainder(p, q)[0], expected)
    torch.testing.assert_close(remainder(torch.cat([q, p[:, 2:]], 1), q)[0, 0], q[0, 0])  # equal: rounding alone


def test_a_round_has_the_judges_distribution_whatever_was_drafted(models):
    """A round's first token, a draft or what replaces it: over answers, each as often as the judge would say it."""
    model, num = models.base_model, 3000
    drafting, judging, temperature = PROMPTS[0], PROMPTS[1], 3.0
    requests = [Request(drafting, {JUDGE: judging})] * num
    found = torch.tensor([answer[0] for answer in judged(model, requests, dice(num), temperature, 1)])
    size = model.config.vocab_size
    often = torch.bincount(found, minlength=size) / num
    judge, drafter = ((last_logits(model, ids) / temperature).softmax(-1) for ids in (judging, drafting))
    expected = (often - judge).abs().sum() / 2
    assert (judge - drafter).abs().sum() / 2 > 3 * expected  # of a draw of as many from the judge itself:
    draw = torch.bincount(torch.multinomial(judge, num, True, generator=dice(1)[0]), minlength=size) / num
    assert expected < 1.3 * (draw - judge).abs().sum() / 2


def test_one_that_judges_itself_answers_as_ever(models):
    same = [Request(prompt, {JUDGE: prompt}) for prompt in PROMPTS]
    num = 3 * DRAFTS_PER_ROUND
    assert judged(models.base_model, same, dice(3), GREEDY, num) == sampled(
        models.base_model, same, dice(3), GREEDY, num
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    """Of one prompt and twelve wishes, and a random model of two layers with SmolLM2's tokenizer; users choose among
    answers of the repository."""
    sizes = replace(
        SMALL,
        prompts={"one": 1, "two": 0},
        is_judged=True,
        fitted=("brief",),
        choices=(5,),
        bounded=5,
        tuned=("brief",),
        tuned_pairs=6,
        choice_prompts=1,
        steering_prompts=1,
        steering_layers=(0, 1),
        steering_strengths=(1.0,),
        steering_tokens=8,
        max_tokens=8,
        part=8,
    )
    tokenizer = AutoTokenizer.from_pretrained(smollm.build_base())
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = Bench(smollm.DemoModels(folder, folder), folder, tmp_path_factory.mktemp("work"), sizes)
    answers = [json.loads(line) for line in ANSWERS.read_text("utf-8").splitlines()]
    records = compare(answers, tokenizer, num=10**4, combined=0.0)
    made.choices = {
        value: [r for r in records if r["labels"] == {name: sign}] for value, (name, sign) in DIRECTIONS.items()
    }
    return made


def test_the_rivals_answer_part_by_part(bench, capsys):
    asked = [one for one in all_of(bench) if one.method.name in ("Persona-judge", "steering vector")]
    bench.answer(asked)
    said = capsys.readouterr().out
    for one in asked:
        assert said.count(f"{one.method.name}: 8 answers") == said.count(f"{one.method.name}: 4 answers") == 1
        assert sorted(record["cell"] for record in bench.kept(one.method)) == list(range(12))
        assert len({record["text"] for record in bench.kept(one.method)}) > 6
    bench.answer(asked)
    assert capsys.readouterr().out == ""  # nothing is made twice
    names = [one.method.name for one in all_of(bench)]
    assert {"prompting with examples and PAD", "sliders of brief, 5 choices", "DPO for brief"} <= set(names)


def test_what_is_made_of_a_users_choices_is_kept(bench):
    fitted = fit_user(bench, "brief", 5)
    assert len(fitted["pad_preference"]) == len(fitted["pad_preference_weights"]) > 0
    path = Path(tune_user(bench, "brief"))
    changed = [file.stat().st_mtime_ns for file in path.iterdir()]
    assert fit_user(bench, "brief", 5) == fitted
    (bounded,) = [one for one in all_of(bench) if one.method.name == "sliders of brief, 5 choices, within 0.4 nats"]
    (plan,) = bounded.method.plan(bench.models, [bench.cells[i] for i in bounded.indices])
    (asked,) = {json.dumps(dict(request.guidance)) for request in plan.requests}
    assert json.loads(asked) == fitted | {"pad_max_divergence": 0.4}
    assert Path(tune_user(bench, "brief")) == path
    assert [file.stat().st_mtime_ns for file in path.iterdir()] == changed
    (tuned,) = [one for one in all_of(bench) if one.method.name == "DPO for brief"]
    (plan,) = tuned.method.plan(bench.models, [bench.cells[i] for i in tuned.indices])
    assert (plan.engine.model, plan.engine.adapter) == (str(bench.folders.base), str(path))
    with pytest.raises(ValueError, match="100 are asked for, and there are"):
        fit_user(bench, "brief", 100)
