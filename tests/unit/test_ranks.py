"""What ranks on several machines must read alike, by a real store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest

from pad_vllm.config import PADConfig
from tests.support.engine import Worker

pytestmark = pytest.mark.slow

PERSONAS = {"terse": {"preference": "concise"}}


def read_as_rank(rank: int, store: str, pad: dict | None) -> str:
    """What a rank says of its configuration: the persona's names, or the error."""
    import torch.distributed as dist

    from pad_vllm.worker import ranks

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    ranks.get_tp_group = lambda: SimpleNamespace(world_size=2, ranks=[0, 1], rank_in_group=rank)
    ranks.TIMEOUT = timedelta(seconds=2)
    try:
        if pad == {}:
            return "no plugin"
        config = ranks.read_alike(lambda: None if pad is None else PADConfig.from_additional_config({"pad": pad}))
    except ValueError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return "nothing" if config is None else ", ".join(config.personas)


@pytest.fixture(scope="module")
def ranks():
    workers = [Worker("v1"), Worker("v1")]
    yield workers
    for worker in workers:
        worker.close()


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({}, ["terse", "terse"]),
        ({"reward_model": "/elsewhere/the same"}, ["terse", "terse"]),
        (None, ["pad: rank 0 has a configuration, but rank 1 has nothing", "nothing"]),
        ("absent", ["pad: rank 1 has not reported its configuration within 0:00:02; every machine", "no plugin"]),
        ({"personas": {"terse": {"preference": "formal"}}}, ["pad.personas['terse']: rank 0 has PAD("] * 2),
        ({"personas": PERSONAS | {"bob": {"beta": 2}}}, ["pad.personas['bob']: rank 0 has nothing"] * 2),
        ({"top_k": 4}, ["pad.top_k: rank 0 has 10, but rank 1 has 4; every machine of an engine needs the same"] * 2),
        ({"adapters": {"warm": "here"}}, ["pad.adapters['warm']: rank 0 has nothing"] * 2),
        (
            {"personas": "gone.yaml"},
            ["on rank 1: pad.personas='gone.yaml'", "pad.personas='gone.yaml': cannot be read"],
        ),
    ],
)
def test_ranks_that_read_otherwise_do_not_start(ranks, tmp_path, second, words):
    first = {"reward_model": "/here/reward", "personas": PERSONAS}
    pads = [first, {None: None, "absent": {}}[second] if not isinstance(second, dict) else first | second]
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(
            lambda rank: ranks[rank].run(read_as_rank, rank, str(tmp_path / "store"), pads[rank]), (0, 1), timeout=60
        )
        for answer, expected in zip(answers, words, strict=True):
            assert answer.startswith(expected)
