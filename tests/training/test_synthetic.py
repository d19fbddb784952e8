"""The synthetic world, guided by the synthetic models through the real engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from pad_vllm.synthetic import world
from pad_vllm.synthetic.measure import USERS
from tests.support.engine import Worker


def measure_guided(cache: Path) -> dict[str, tuple[float, float]]:
    """Satisfaction (unguided, guided) of every single value and held-out combination."""
    from pad_vllm.synthetic.measure import measure_users, start
    from pad_vllm.synthetic.models import build

    return measure_users(start(build(cache)), beta=1.0, top_k=10)


@pytest.fixture(scope="module")
def satisfied(cache):
    worker = Worker("v1")
    yield worker.run(measure_guided, cache)
    worker.close()


def test_guidance_follows_every_single_preference(satisfied):
    for value in (value for values in world.DIMENSIONS.values() for value in values):
        unguided, guided = satisfied[value]
        assert guided >= 0.9, (value, unguided, guided)
        assert unguided <= 0.8, (value, unguided, guided)


def test_guidance_follows_combinations_never_trained_on(satisfied):
    for wanted in (wanted for wanted in USERS.values() if world.is_held_out(wanted)):
        unguided, guided = satisfied[" + ".join(wanted.values())]
        assert guided >= 0.85, (wanted, unguided, guided)
        assert guided - unguided >= 0.3, (wanted, unguided, guided)
