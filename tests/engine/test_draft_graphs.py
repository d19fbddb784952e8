"""All drafts of a step in one CUDA graph, on Model Runner V2: they are those of the loop. Without a GPU a graph is what
``tests/support/graphs.py`` makes of it."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch

from tests import oracle
from tests.engine.test_no_sync import watch_steps
from tests.support import operations
from tests.support.engine import PLUGIN, Engine, guided, pad_config, running_guidance
from tests.support.fixtures import MIX
from tests.support.graphs import draft_in_graphs, speculator_of
from tests.support.models import make_near

pytestmark = pytest.mark.every_release

NUM_DRAFTS = 4
MAX_NUM_SEQS = 6
PLAIN: tuple[dict[str, Any], ...] = (
    {"top_k": 5, "beta": 0.5},
    {"preference": "formal"},
    {"preference": "kind", "top_k": 40, "weights": list(MIX)},
    {"weights": list(MIX)},
)
MIXED: tuple[dict[str, Any], ...] = (
    {"top_k": 5, "beta": 0.5},
    {"preference": "formal", "reference": "neutral"},
    {"preference": ["formal", "kind"], "preference_weights": [1, -0.5]},
    {"preference": ["formal", "kind", "brief"], "reference": "neutral", "weights": list(MIX)},
)
HELD: dict[str, Any] = {"preference": "formal", "reference": "neutral", "max_divergence": 0.1}
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def near(models, tmp_path_factory):
    """A reward model that is the base with some noise, so that drafts are accepted and refused by turns: where it is,
    with heads, and as the oracle reads it."""
    path = tmp_path_factory.mktemp("near")
    model = make_near(path, models.base_model)
    models.tokenizer.save_pretrained(path)
    (path / "heads.safetensors").write_bytes((models.named / "heads.safetensors").read_bytes())
    return path, model


@pytest.fixture(scope="module")
def engine(models, near):
    speculative = {"method": "draft_model", "model": str(near[0]), "num_speculative_tokens": NUM_DRAFTS}
    engine = Engine(
        "v2",
        models.base,
        max_num_seqs=MAX_NUM_SEQS,
        logits_processors=PLUGIN,
        speculative_config=speculative,
        **pad_config(near[0], kv_cache_memory_bytes=4 << 20),
    )
    engine.reason = engine.call(reason)
    engine.call(draft_in_graphs)
    yield engine
    engine.close()


class Compared(NamedTuple):
    """What was seen of steps that draft."""

    answers: list[list[int]]
    unlike: list[str]
    """What the loop made of a step otherwise than its graph"""
    ran: list[tuple[int, bool]]
    """The graph of each step that had one: context rows, and whether contexts are mixed"""
    num_loops: int
    """Steps without one"""


def compare(llm, prompts: list[list[int]], params: list[dict[str, Any]]) -> Compared:
    """Generate, with each step's drafts made by a graph, and then once more by the loop, from the same state."""
    from vllm import SamplingParams

    from pad_vllm.worker.adapters import draft_graphs

    guidance, speculator = running_guidance(llm), speculator_of(llm)
    drafter, draft, buffers = guidance.drafter, guidance.drafter.draft, speculator.buffers
    seen, before, loops, replay_graph = Compared([], [], [], 0), [], [], draft_graphs.replay_graph

    def state() -> list[torch.Tensor]:
        """What drafts leave for verification, but for what padding writes."""
        caches = [cache[1:] for cache in guidance.model.kv_caches.values()]
        return [guidance.contexts.drafted.kept[:-1], *caches, buffers.draft_logits, buffers.kept_ids]

    def replay(graph) -> None:
        before[:] = [tensor.clone() for tensor in state()]
        seen.ran.extend(key for key, captured in speculator.graphs.captured.items() if captured.graph is graph)
        replay_graph(graph)

    def both(batch, num_drafts, draws) -> bool:
        before.clear()
        found = draft(batch, num_drafts, draws)
        if not before:
            if num_drafts:  # vLLM 0.33 asks for none now and then
                loops.append(found)
            return found
        places = batch.layout.logits_rows
        by_graph = [draws.drafts[places], *(tensor.clone() for tensor in state())]
        for tensor, was in zip(state(), before, strict=True):
            tensor.copy_(was)
        draws.drafts.fill_(-1)
        assert draft(batch, num_drafts, draws._replace(graphs=None, keep=True)) == found
        for i, (one, other) in enumerate(zip(by_graph, [draws.drafts[places], *state()], strict=True)):
            if not torch.allclose(one, other, rtol=1e-4, atol=1e-4):
                seen.unlike.append(f"{('drafts', 'hidden states')[i] if i < 2 else i}")
        return found

    drafter.draft, draft_graphs.replay_graph = both, replay
    try:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [SamplingParams(**asked) for asked in params],
            use_tqdm=False,
        )
    finally:
        drafter.draft, draft_graphs.replay_graph = draft, replay_graph
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    return seen._replace(answers=answers, num_loops=len(loops))


def asked_for(encode, kinds: tuple[dict[str, Any], ...]) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Three times as many requests as run at a time, of unlike lengths, every third of them sampled, some unguided."""
    prompts, params = [], []
    for i in range(3 * MAX_NUM_SEQS):
        prompts.append(encode(f"answer {i % 5} " + "and so on " * (i % 4)))
        sampling = {"temperature": 0.8, "seed": i} if i % 3 == 2 else {"temperature": 0.0}
        guidance = {} if i % 7 == 6 else guided(**kinds[i % len(kinds)])
        params.append(sampling | {"max_tokens": 3 + 7 * (i % 6), "ignore_eos": True} | guidance)
    return prompts, params


@pytest.mark.parametrize(("kinds", "mixes"), [(PLAIN, False), (MIXED, True)], ids=["plain", "mixed"])
def test_drafts_are_those_of_the_loop(encode, engine, kinds, mixes):
    """Padded, as requests come and go and contexts get blocks; what is kept for verification too. So the answers are
    those of the loop's drafts, sampled ones among them."""
    prompts, params = asked_for(encode, kinds)
    compared = engine.call(compare, prompts, params)
    assert compared.unlike == []
    assert len(compared.ran) > 20 > compared.num_loops == 0
    assert mixes in {mixed for _, mixed in compared.ran}
    assert len(set(compared.ran)) > 2
    assert engine.generate(prompts, params) == compared.answers


def test_answers_are_the_oracles(models, encode, near, engine):
    prompts = [encode(text) for text in ("the rain", "why", "say " * 20)]
    asked: list[dict[str, Any]] = [{"reward": near[1], "beta": 0.5, "top_k": 5}, {"reward": near[1]}, {}]
    params = [GREEDY | {"max_tokens": 40} | guided(**{k: v for k, v in one.items() if k != "reward"}) for one in asked]
    params[1] |= guided(beta=1.0)
    expected = [
        oracle.generate(models.base_model, prompt, 40, **({"beta": 1.0} if one else {}) | one)
        for prompt, one in zip(prompts, asked, strict=True)
    ]
    params[2] = GREEDY | {"max_tokens": 40}
    assert engine.generate(prompts, params) == expected


def test_replays_read_nothing_back(encode, engine):
    asked = [GREEDY | {"max_tokens": 100} | (guided(**one) if one else {}) for one in (*PLAIN[:2], *MIXED[:2], {})]
    _, decoding, _ = engine.call(watch_steps, [encode(f"answer {i}") for i in range(5)], asked)
    assert decoding == []


def test_what_a_graph_cannot_do_the_loop_does(encode, engine):
    """Drafts with a bound, and what was to be captured and could not be."""
    prompts, params = [encode("say why")] * 2, [GREEDY | {"max_tokens": 12} | guided(**one) for one in (HELD, PLAIN[0])]
    compared = engine.call(compare, prompts, params)
    assert compared.num_loops > 0 == len(compared.ran)
    assert engine.reason == "the attention back end CPU_ATTN plans each forward on the host"
    assert engine.call(capture_without_a_gpu) is None


def without_graphs(llm, *args) -> list[list[str]]:
    speculator = speculator_of(llm)
    graphs, speculator.graphs = speculator.graphs, None
    try:
        return operations.count(llm, *args)
    finally:
        speculator.graphs = graphs


@pytest.mark.one_release
def test_drafts_in_a_graph_launch_little(encode, engine):
    """Beside the graph, between two steps in which requests come or go."""
    asked = GREEDY | {"temperature": 0.8, "max_tokens": 60} | guided(preference="formal")
    args = asked, [encode("say why")] * 2, 7, True
    counts = {}
    for name, steps in (
        ("graph", engine.call(operations.count, *args)),
        ("loop", engine.call(without_graphs, *args)),
    ):
        counts[name] = sorted(steps, key=len)[len(steps) // 2]
    assert counts["graph"].count("graph") == 1
    assert len(counts["graph"]) <= 8, counts["graph"]
    assert counts["loop"].count("draft_kernel") == NUM_DRAFTS
    assert len(counts["loop"]) > 20, counts["loop"]


def reason(llm) -> str | None:
    from pad_vllm.worker.adapters.draft_graphs import why_not

    return why_not(running_guidance(llm).loaded)


def capture_without_a_gpu(llm) -> Any:
    from pad_vllm.worker.adapters.draft_graphs import capture_drafts

    speculator = speculator_of(llm)
    return capture_drafts(running_guidance(llm).drafter, speculator.buffers, speculator.drafts)


def short_of_blocks(llm, prompts, params) -> tuple[list[list[int]], float]:
    """Answers while something else has all blocks of the pool but a few, from the third step on; and how many steps
    were without drafts."""
    from vllm import SamplingParams

    guidance, pool = running_guidance(llm), running_guidance(llm).engine.blocks.pool
    before, taken, answers = guidance.stats.steps_without_drafts, [], {}
    for i, (prompt, asked) in enumerate(zip(prompts, params, strict=True)):
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, SamplingParams(**asked))
    for step in itertools.count():
        if step == 3:
            taken = pool.get_new_blocks(pool.get_num_free_blocks() - 1)
        for output in llm.llm_engine.step():
            answers[output.request_id[0]] = list(output.outputs[0].token_ids)
        if not llm.llm_engine.has_unfinished_requests():
            break
    pool.free_blocks(taken)
    return [answers[i] for i in sorted(answers)], guidance.stats.steps_without_drafts - before


def break_a_replay(llm) -> None:
    """The next one."""
    from pad_vllm.worker.adapters import draft_graphs

    replay_graph = draft_graphs.replay_graph

    def breaks(graph) -> None:
        draft_graphs.replay_graph = replay_graph
        raise RuntimeError("broken for a test")

    draft_graphs.replay_graph = breaks


def without_drafts(llm) -> float:
    return running_guidance(llm).stats.steps_without_drafts


def test_a_step_without_room_or_whose_replay_fails_has_no_drafts(models, encode, near, engine):
    """And what is generated is what it should be."""
    prompts, settings = [encode("why"), encode("the rain")], {"top_k": 5, "beta": 0.5}
    expected = [oracle.generate(models.base_model, prompt, 60, reward=near[1], **settings) for prompt in prompts]
    params = [GREEDY | {"max_tokens": 60} | guided(**settings)] * 2
    answers, num_short = engine.call(short_of_blocks, prompts, params)
    assert answers == expected
    assert num_short > 0
    before = engine.call(without_drafts)
    engine.call(break_a_replay)
    assert engine.generate(prompts, params) == expected
    assert engine.call(without_drafts) == before + 1
