"""The demo's world, guided by the demo's models through the real engine. Trains them where the cache has none."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pad_vllm.demo import world
from pad_vllm.demo.show import USERS
from tests.support.engine import Worker

pytestmark = pytest.mark.first  # trains the models that others read


def measure_demo() -> dict[str, tuple[float, float]]:
    """Satisfaction (unguided, guided) of every single value and held-out combination."""
    from pad_vllm.demo.models import build
    from pad_vllm.demo.show import measure, start

    return measure(start(build()), beta=1.0, top_k=10)


@pytest.fixture(scope="module")
def satisfied():
    worker = Worker(preloaded=True)
    yield worker.run(measure_demo)
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


def test_the_command_says_what_it_can_do():
    out = subprocess.run([sys.executable, "-m", "pad_vllm.cli", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in out.stdout
