"""A small run of the alignment table through real engines."""

from __future__ import annotations

import json
import random
from collections import defaultdict

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import alignment
from pad_vllm.evaluation import evaluate as evaluation
from pad_vllm.synthetic import models, world
from pad_vllm.training.data import prompt_ids
from tests.support.models import make_adapter


@pytest.fixture(scope="module")
def small(cache, tmp_path_factory):
    """The alignment table on the synthetic models, small."""
    output = tmp_path_factory.mktemp("alignment")
    results = alignment.run_alignment(output, **alignment.SMALL, cache_dir=str(cache))
    return output, results


def test_the_alignment_table(small):
    output, results = small
    (rows,) = results["rows"].values()
    for group in ("seen", "unseen"):
        found = {row["method"]: row for row in rows if row["group"] == group}
        assert set(found) == {"base", "prompting", "best_of_n", *(f"pad, beta {b:g}" for b in alignment.BETAS)} | {
            "pad_weights, true",
            "pad_weights, fit",
            "reward_model",
        }
        base, pad = found["base"], found["pad, beta 1"]
        assert base["win_rate"].mean == 0.5
        assert pad["satisfaction"].mean >= base["satisfaction"].mean + 0.2
        assert pad["win_rate"].mean > 0.7
        assert found["best_of_n"]["satisfaction"].mean > base["satisfaction"].mean
        assert base["well_formed"].mean > 0.8
        assert pad["well_formed"].mean > base["well_formed"].mean - 0.25
        for name in ("true", "fit"):
            assert found[f"pad_weights, {name}"]["satisfaction"].mean >= base["satisfaction"].mean + 0.2
        assert {row["num_answers"] for row in found.values()} == {16}
    text = (output / "alignment.md").read_text()
    assert text.count("intervals apart") + text.count("intervals NOT apart") == 4
    assert text.count("| pad, beta 1 |") == 2
    assert json.loads((output / "alignment.json").read_text())["rows"] == json.loads(json.dumps(results["rows"]))
    for name in ("alignment-beta.png", "alignment-dimensions.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_every_answer_is_kept_and_judged_by_the_checker(small):
    _, results = small
    (answers,) = results["answers"].values()
    for method, records in answers.items():
        assert len(records) == 32, method
        for record in records:
            assert record["satisfaction"] == sum(record["satisfied"].values()) / len(record["satisfied"])
            assert record["nll"] > 0
    assert any(a["text"] != b["text"] for a, b in zip(answers["base"], answers["pad, beta 1"], strict=True))


def test_mixing_heads_moves_every_dimension(small):
    """Weights alone, the true ones and those fitted to 30 comparisons, for users who want two dimensions or more."""
    _, results = small
    (answers,) = results["answers"].values()
    for method in ("pad_weights, true", "pad_weights, fit"):
        shares = defaultdict(list)
        for record in answers[method]:
            if len(record["satisfied"]) >= 2:
                for dimension, satisfied in record["satisfied"].items():
                    shares[record["user"], dimension].append(satisfied)
        assert len(shares) >= 4
        assert all(sum(share) / len(share) >= 0.75 for share in shares.values()), (method, dict(shares))
    for fit in results["fit"].values():
        assert fit["num_comparisons"] == 30
        assert fit["held_out_accuracy"] >= 0.75


def test_a_base_with_another_tokenizer(cache, tmp_path):
    """Every method answers, also where the reward model is an adapter; one reference reads all answers in its own
    tokens."""
    built = models.build(cache)
    make_adapter(tmp_path / "adapter", built.reward, seed=0, rank=1, targets=["q_proj"])
    prompts = [{"prompt": f"How do I {topic.task}?", "topic": topic.task} for topic in world.TRAIN_TOPICS[:2]]
    wanted = dict.fromkeys(["length"], world.DIMENSIONS["length"][0])
    config = evaluation.EvaluationConfig(
        base=str(models.build_base("mistral", tmp_path, 0, models.TINY)),
        pad={"reward_model": str(tmp_path / "adapter"), "prompt_template": models.PROMPT_TEMPLATE},
        users={"u": {"preference": world.preference(wanted, random.Random(0)), "wanted": wanted, "prompts": prompts}},
        checker="pad_vllm.synthetic.world:check",
        methods=("base", "best_of_n", "pad", "reward_model"),
        betas=(1.0,),
        best_of=2,
        reference=str(built.base),
        max_tokens=24,
        engine=alignment.ENGINE,
    )
    answers = evaluation.evaluate(config)["answers"]
    assert list(answers) == ["base", "best_of_n", "pad, beta 1", "reward_model"]
    assert answers["pad, beta 1"] != answers["base"]
    reference, tokenizer = AutoModelForCausalLM.from_pretrained(built.base), AutoTokenizer.from_pretrained(built.base)
    for records in answers.values():
        for record, asked in zip(records, prompts, strict=True):
            ids = prompt_ids(asked["prompt"], tokenizer)
            own = tokenizer.encode(record["text"], add_special_tokens=False)
            logprobs = reference(torch.tensor([ids + own])).logits[0].log_softmax(-1)
            found = -sum(logprobs[len(ids) - 1 + i, token].item() for i, token in enumerate(own))
            end = -logprobs[-1, tokenizer.eos_token_id].item()
            assert record["nll"] == pytest.approx(found / len(own), abs=2e-3) or record["nll"] == pytest.approx(
                (found + end) / (len(own) + 1), abs=2e-3
            )
