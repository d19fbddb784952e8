"""The evaluation: its statistics, its report, what its files may say."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
import torch

from pad_vllm.evaluation.engine import Answers
from pad_vllm.evaluation.evaluate import EvaluationConfig, guided, load_checker, read_config
from pad_vllm.evaluation.harness import Models, in_tokens_of
from pad_vllm.evaluation.methods import Base, pick_best
from pad_vllm.evaluation.metrics import Estimate, bootstrap, distinct, win_shares
from pad_vllm.evaluation.report import plot, table
from pad_vllm.synthetic import world
from tests.support.models import make_adapter
from tests.support.tokenizers import make


def test_bootstrap_intervals_hold_what_they_say():
    """Of 200 samples of 6 users with tastes of their own, about 95% of the intervals hold the true mean; an interval
    that took answers for independent would hold it far less often."""
    rng = np.random.default_rng(0)
    groups = [user for user in "abcdef" for _ in range(20)]
    held = naive_held = 0
    for seed in range(200):
        values = (rng.normal(0.5, 0.2, 6)[:, None] + rng.normal(0, 0.3, (6, 20))).ravel()
        estimate = bootstrap(values, groups, seed)
        assert estimate.low <= estimate.mean <= estimate.high
        assert estimate.mean == pytest.approx(values.mean())
        held += estimate.low <= 0.5 <= estimate.high
        half = 1.96 * values.std() / len(values) ** 0.5
        naive_held += abs(values.mean() - 0.5) <= half
    assert held >= 170
    assert naive_held < 150


def test_bootstrap_of_groups_that_differ_in_size():
    """A value counts as much in the interval as in the mean, whatever its group's size."""
    values, groups = [1.0] * 90 + [0.0] * 10, [f"large {i % 10}" for i in range(90)] + [f"small {i}" for i in range(10)]
    mean, low, high = bootstrap(values, groups)
    assert mean == 0.9
    assert low < 0.9 < high
    assert low > 0.7  # a mean of the groups' means would be 0.5


def test_estimates_apart():
    assert Estimate(0.5, 0.4, 0.6).apart_from(Estimate(0.8, 0.7, 0.9))
    assert not Estimate(0.5, 0.4, 0.6).apart_from(Estimate(0.7, 0.6, 0.8))


def test_win_shares_and_distinct():
    assert win_shares([1, 0.5, 0], [0.5, 0.5, 0.5]) == [1, 0.5, 0]
    assert distinct(["a b a b", "c"], 2) == 2 / 3
    assert distinct(["a b", "a b"], 1) == 0.5
    assert distinct([""], 2) == 0


@pytest.mark.parametrize(
    ("kind", "reference"),
    [("model", "base"), ("adapter", "base"), ("served", "base"), ("model", "neutral"), ("model", "none")],
)
def test_best_of_n_takes_the_answer_of_the_highest_reward(kind, reference, models, tmp_path):
    """log pi_theta(y | x, p) - log pi_ref(y | x), by forwards written out, against the reference that guides."""
    reward, theta_model = {
        "model": lambda: (str(models.reward), models.reward_model),
        "adapter": lambda: (
            str(tmp_path / "adapter"),
            make_adapter(tmp_path / "adapter", models.base, seed=11, rank=4, targets=["q_proj", "o_proj"]),
        ),
        "served": lambda: ("base", models.base_model),
    }[kind]()
    rng = random.Random(0)
    samples = [[rng.randrange(5, 60) for _ in range(4)] for _ in range(6)]
    contexts = [([7, 8, 9], [9]), ([10, 11], [11])]

    def logprob(model, context, answer):
        logits = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
        return sum(logits[len(context) - 1 + i, token].item() for i, token in enumerate(answer))

    expected = []
    for i, (theta, ref) in enumerate(contexts):
        own = samples[3 * i : 3 * i + 3]
        against = {"base": models.base_model, "neutral": theta_model, "none": None}[reference]
        rewards = [
            logprob(theta_model, theta, answer) - (logprob(against, ref, answer) if against is not None else 0)
            for answer in own
        ]
        expected.append(own[rewards.index(max(rewards))])
    texts = [str(sample) for sample in samples]
    found = pick_best(
        Models.load(str(models.base), {"reward_model": reward, "reference": reference}),
        contexts,
        [range(3), range(3, 6)],
        Answers(texts, samples, seconds=1.0),
    )
    assert found.tokens == expected
    assert found.texts == list(map(str, expected))
    assert found.seconds > 1


def test_a_reference_reads_answers_in_its_own_tokens():
    own, reads = make("metaspace", 600), make("byte-level", 600)
    texts = ["The user likes short answers.", "naïve café"]
    tokens = [[*own.encode(texts[0], add_special_tokens=False), own.eos_token_id], own.encode(texts[1])]
    ended, cut = in_tokens_of(reads, Answers(texts, tokens, 1.0), own)
    assert reads.decode(ended[:-1]) == texts[0]
    assert ended[-1] == reads.eos_token_id
    assert reads.decode(cut) == texts[1]
    assert in_tokens_of(own, Answers(texts, tokens, 1.0), make("metaspace", 600)) is tokens


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"methods": ("base", "magic")}, "methods: magic: unknown; must be of base, prompting"),
        ({"methods": ("pad",)}, "must include base, with which the others are compared"),
        ({"users": {}}, "users: must name at least one user"),
        ({"prompts": []}, "users.ada: has no prompts"),
        ({"users": {"ada": {"preference": ["a", "b"]}}}, "users.ada: 2 preferences for 1 prompts"),
        ({"users": ["ada"]}, "users=['ada']: must be an object"),
        ({"users": {"ada": None}}, "users.ada=None: must be an object"),
        ({"users": {"ada": {"preference": 5}}}, "users.ada.preference=5: must be a text"),
        ({"users": {"ada": {"prompts": 5}}}, "users.ada.prompts=5: must be a list"),
        ({"prompts": ["p"]}, "prompts[0]='p': must be an object with a prompt"),
        ({"prompts": [{"topic": "t"}]}, "prompts[0]={'topic': 't'}: must be an object with a prompt"),
        ({"best_of": 0}, "best_of=0: must be at least 1"),
        ({"temperature": "x"}, "temperature='x': must be a number"),
        ({"betas": ("x",)}, "betas='x': must be a number"),
        ({"pad": "reward"}, "pad='reward': must be an object"),
    ],
)
def test_configurations_that_cannot_be(settings, says):
    good = {
        "base": "b",
        "pad": {"reward_model": "r"},
        "users": {"ada": {}},
        "checker": "c",
        "prompts": [{"prompt": "p"}],
    }
    with pytest.raises(ValueError, match=re.escape(says)):
        EvaluationConfig(**good | settings)


def test_a_configuration_of_files(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p", "topic": "t"}\n\n{"prompt": "q"}\n')
    (tmp_path / "users.yaml").write_text("ada: {preference: brief}\n")
    text = "base: b\npad: {reward_model: r}\nchecker: m:f\nprompts: prompts.jsonl\nusers: users.yaml\nbetas: [1]\n"
    (tmp_path / "eval.yaml").write_text(text)
    config = read_config(tmp_path / "eval.yaml")
    assert config.prompts == [{"prompt": "p", "topic": "t"}, {"prompt": "q"}]
    assert config.users == {"ada": {"preference": "brief"}}
    assert config.betas == (1,)
    for bad, says in (
        (text + "beta: 3\n", "unknown settings beta; there are base, pad, users"),
        (text.replace("base: b\n", ""), "'base'"),
        (text.replace("prompts.jsonl", "none.jsonl"), "prompts: .*none.jsonl"),
        ("- 1\n", "expected the settings of an evaluation"),
        (text.replace("betas: [1]", "betas: 1"), "betas=1: must be a list"),
    ):
        (tmp_path / "eval.yaml").write_text(bad)
        with pytest.raises(ValueError, match=says):
            read_config(tmp_path / "eval.yaml")
    assert load_checker("pad_vllm.synthetic.world:check") is world.check
    with pytest.raises(ValueError, match="'nothing' is not the 'module:name'"):
        load_checker("nothing")


def test_table_and_plot_of_one_group(tmp_path):
    estimate = Estimate(0.5, 0.25, 0.75)
    row = {
        "group": "all",
        "method": "base",
        "num_users": 1,
        "num_answers": 4,
        "satisfaction": estimate,
        "win_rate": estimate,
        "well_formed": estimate,
        "nll": Estimate(1.234, 1, 2),
        "distinct_2": 0.5,
        "seconds_over_base": 1.0,
        "dimensions": {"tone": 0.5},
    }
    assert "| base | 50% (25 to 75) | 50% (25 to 75) | 50% (25 to 75) | 1.23 | 0.50 | 1.0 |" in table([row])
    rows, methods = [row, row | {"method": "pad, beta 1"}], [Base("base"), guided(1)]
    assert len(plot({"base": rows}, tmp_path, methods)) == 2
