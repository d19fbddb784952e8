"""What a bound gains at equal likelihood, of answers whose figures are known."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.language_frontier import BASE, BOUNDS, FREE, bounded, gains, in_words

CURVE = [(1.0, 0.5), (1.1, 0.6), (1.2, 0.7), (1.4, 0.8), (1.6, 0.8), (1.8, 0.85)]
"""Nats a token and satisfaction, without guidance and by beta."""


def tables(nll: float, satisfied: float):
    """Of 3 prompts and 4 wishes, each alike; and of one method with a bound."""
    points = dict(zip([BASE.name, *FREE], CURVE, strict=True)) | {bounded(BOUNDS[0]).name: (nll, satisfied)}
    of = [{name: np.full((3, 4), point[i]) for name, point in points.items()} for i in range(2)]
    return SimpleNamespace(nll=of[0], satisfied=of[1])


@pytest.mark.parametrize(("nll", "satisfied", "gain"), [(1.1, 0.6, 0.0), (1.3, 0.85, 0.1), (1.5, 0.7, -0.1)])
def test_the_gain_is_over_the_curve_at_equal_likelihood(nll, satisfied, gain):
    assert gains(tables(nll, satisfied), bounded(BOUNDS[0]).name) == pytest.approx([gain] * 3)


def test_beyond_the_strongest_there_is_nothing_to_compare_with():
    found = gains(tables(1.9, 0.9), bounded(BOUNDS[0]).name)
    assert found is None
    assert in_words(found, True) == "beyond"


def test_the_interval_is_that_of_answers_that_differ():
    mixed = tables(1.2, 0.7)
    mixed.satisfied[bounded(BOUNDS[0]).name] = np.tile([1.0, 0.0, 1.0, 1.0], (3, 1))
    mean, low, high = gains(mixed, bounded(BOUNDS[0]).name)
    assert mean == pytest.approx(0.05)
    assert -0.4 < low < 0 < high < 0.31
