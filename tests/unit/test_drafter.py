"""What drafts are made of: the guided logits, with something in the base model's place."""

from __future__ import annotations

import pytest
import torch

from pad_vllm.benchmarks.drafts import accepted
from pad_vllm.params import NEUTRAL, GuidanceParams
from pad_vllm.worker.drafter import can_be_held_back, draft_weights, stand_in_weights


def params(preferences=("a",), weights=(1.0,), beta=1.0, reference="base", bound=None) -> GuidanceParams:
    return GuidanceParams(preferences, weights, None, beta=beta, top_k=10, reference=reference, max_divergence=bound)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("reference", ["base", "neutral", "none"])
@pytest.mark.parametrize(("preferences", "weights"), [((), (1.0,)), (("a",), (1.0,)), (("a", "b"), (0.7, 0.6))])
def test_drafts_are_guided_logits_of_a_base_model_that_is_its_stand_in(preferences, weights, beta, reference):
    """Exactly what guidance gives where the base model says what the stand-in does, on random logits."""
    asked = params(preferences, weights, beta, reference)
    contexts = asked.contexts()
    logits = {text: torch.randn(7, generator=torch.Generator().manual_seed(i)) for i, text in enumerate(contexts)}
    if reference == "neutral":
        y = logits[NEUTRAL]  # without a preference, too: then the reward is 0
    else:
        y = sum(weight / sum(contexts.values()) * logits[text] for text, weight in contexts.items())
    guided = (1 - beta * asked.base_weight) * y + beta * sum(contexts[text] * logits[text] for text in contexts)
    shares, scale = draft_weights(asked)
    assert sum(shares) == pytest.approx(1.0)
    drafted = scale * sum(share * logits[text] for share, text in zip(shares, contexts, strict=True))
    torch.testing.assert_close(drafted.log_softmax(0), guided.log_softmax(0))
    stand_in = sum(share * logits[text] for share, text in zip(stand_in_weights(asked), contexts, strict=True))
    torch.testing.assert_close(stand_in, y)


@pytest.mark.parametrize(
    ("asked", "is_held"),
    [
        ({"reference": "neutral"}, True),
        ({"reference": "none"}, True),
        ({"reference": "base", "beta": 0.3}, False),
        ({"reference": "base", "preferences": ("a", "b"), "weights": (0.7, 0.6), "beta": 1.7}, False),
        ({"reference": "neutral", "beta": 0.0}, False),
        ({"reference": "base", "preferences": ("a", "b"), "weights": (1.0, -1.0)}, True),
    ],
)
def test_a_bound_holds_drafts_where_they_move_away_from_what_stands_in(asked, is_held):
    assert can_be_held_back(params(**asked, bound=0.1)) == is_held
    assert not can_be_held_back(params(**asked))


def test_preferences_that_cancel_are_drafted_by_their_mean():
    shares, scale = draft_weights(params(("a", "b"), (1.0, -1.0), beta=2.0, reference="none"))
    assert sum(shares) == pytest.approx(1.0)
    assert scale > 0


def test_acceptance_by_position():
    """Passes that gave 1, 3, 3 and 5 tokens: of four first drafts three were accepted, of two third ones one."""
    assert accepted([1, 3, 3, 5], num_drafts=4) == [0.75, 1.0, 0.333, 1.0]
