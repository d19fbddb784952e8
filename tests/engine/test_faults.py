"""One request's fault ends that request alone, wherever in a step it strikes; the others are as they are by themselves.

Faults are put into the functions of a running engine, for one request, at its first step or later; what they do beside
is done, as far as a real fault would let it.
"""

from __future__ import annotations

import pytest

from tests.engine.test_engine import PREFERENCES
from tests.support.engine import PLUGIN, Engine, engine_stats, greedy, guided, pad_config, running_guidance
from tests.support.fixtures import MIX

pytestmark = pytest.mark.every_release

MAX_TOKENS = 12
VICTIM = "the one that fails"
CONTROLS = {"presence_penalty": 0.6, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
AS_ORACLE = {"penalties": (0.6, 0.3, 1.2)}
STAGES = {
    "v1": ("begin", "compose", "rows", "forward", "kernel", "controls", "penalize", "take out"),
    "v2": ("begin", "forward", "kernel", "controls"),  # which penalizes by itself
    "v2 with drafts": ("compose", "rows", "forward"),
}
"""Of a step, by the runner: V2's take their time, and what is before the step is the same on both."""


@pytest.fixture(scope="module", params=["v1", "v2", pytest.param("v2 with drafts", marks=pytest.mark.one_release)])
def runner(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(models, runner):
    drafts = {"method": "draft_model", "model": str(models.named), "num_speculative_tokens": 2}
    engine = Engine(
        runner.split()[0],
        models.base,
        logits_processors=PLUGIN,
        max_num_seqs=6,
        speculative_config=drafts if runner == "v2 with drafts" else None,
        **pad_config(models.named),
    )
    yield engine
    engine.close()


def inject(llm, stage: str, after: int) -> None:
    """Let ``stage`` fail for the request of VICTIM's preference, whenever it comes to it but the first ``after`` times;
    until :func:`heal`."""
    from pad_vllm.params import MAX_CONTEXTS
    from pad_vllm.worker.adapters import v1

    guidance = running_guidance(llm)
    slots_of_victim, num_calls = set(), 0
    new_request = guidance.new_request

    def note_slot(slot, params, *args):
        slots_of_victim.discard(slot)
        if params.preferences == (VICTIM,):
            slots_of_victim.add(slot)
        return new_request(slot, params, *args)

    def fail_for(is_victims, function, first=False):
        def wrapped(*args, **kwargs):
            nonlocal num_calls
            hit = is_victims(*args, **kwargs)
            num_calls += hit
            if hit and num_calls > after and first:
                raise RuntimeError("broken on purpose")
            result = function(*args, **kwargs)
            if hit and num_calls > after:
                raise RuntimeError("broken on purpose")
            return result

        return wrapped

    def in_rows(pieces, rows):
        owners = {*rows.slots.tolist(), *(piece.slot for piece in pieces)}
        return any(slot // MAX_CONTEXTS in slots_of_victim for slot in owners)

    def in_layout(layout):
        return bool(slots_of_victim & set(layout.slots.tolist()))

    def is_penalized(penalties, *_):
        return any(state.slot in slots_of_victim for state in penalties.penalized.values())

    where = {
        "begin": (guidance.slots.controls, "write", lambda slot, *_: slot in slots_of_victim, False),
        "compose": (guidance.loaded.fit.template, "compose_shared", lambda ids, text: text == VICTIM, False),
        "rows": (guidance, "_params_of", in_layout, False),
        "forward": (guidance.engine, "_forward", in_rows, False),
        "kernel": (guidance.rule, "guide_", lambda *_, **__: in_layout(guidance._params.layout), True),
        "controls": (
            guidance.slots.controls,
            "of_rows",
            lambda row_slots, *_: bool(slots_of_victim & set(row_slots.tolist())),
            False,
        ),
        "penalize": (v1.Penalties, "apply_", is_penalized, True),
        "take out": (v1.Penalties, "invert_", is_penalized, True),
        "written": (guidance.rule, "guide_", lambda *_, **__: in_layout(guidance._params.layout), False),
    }
    owner, name, is_victims, first = where[stage]
    original = getattr(owner, name)
    guidance.new_request = note_slot
    guidance.is_healed_by = [(guidance, "new_request", new_request), (owner, name, original)]
    setattr(owner, name, fail_for(is_victims, original, first))


def heal(llm) -> float:
    """Returns how many requests have failed, since the start."""
    guidance = running_guidance(llm)
    for owner, name, original in guidance.is_healed_by:
        setattr(owner, name, original)
    return guidance.stats.failed_requests


def failed_requests(llm) -> float:
    return running_guidance(llm).stats.failed_requests


def batch(encode, expect) -> tuple[list, list, list]:
    """A victim with everything, and neighbours: one context, controls, several contexts and heads, unguided."""
    prompts = [encode(text) for text in ("say why", "answer", "the rain keeps falling", "a", "You are asked")]
    plain = greedy(MAX_TOKENS)
    several = {"preference": [*PREFERENCES, "kind"], "reference": "neutral", "weights": list(MIX)}
    params = [
        plain | CONTROLS | guided(preference=VICTIM),
        plain | guided(preference=PREFERENCES[0]),
        plain | CONTROLS | guided(preference=PREFERENCES[1], beta=0.6),
        plain | guided(**several),
        plain,
    ]
    several = several | {"head": "mixed"}
    del several["weights"]
    expected = [
        expect(prompts[0], preference=VICTIM, max_tokens=MAX_TOKENS, **AS_ORACLE),
        expect(prompts[1], preference=PREFERENCES[0], max_tokens=MAX_TOKENS),
        expect(prompts[2], preference=PREFERENCES[1], beta=0.6, max_tokens=MAX_TOKENS, **AS_ORACLE),
        expect(prompts[3], max_tokens=MAX_TOKENS, **several),
        expect(prompts[4], guided=False, max_tokens=MAX_TOKENS),
    ]
    return prompts, params, expected


def test_a_fault_ends_its_request_alone(models, encode, expect, engine, runner):
    prompts, params, expected = batch(encode, expect)
    end = models.tokenizer.eos_token_id
    for stage in STAGES[runner]:
        for after in (0,) if stage in ("begin", "compose") else (0, 2):  # which are once in a request's life
            before = engine.call(failed_requests)
            engine.call(inject, stage, after)
            victim, *others = engine.generate(prompts, params)
            failed = engine.call(heal) - before
            assert others == expected[1:], (stage, after)
            assert failed == 1, (stage, after)
            num_guided = victim.index(end) if end in victim else MAX_TOKENS
            assert victim == expected[0][:num_guided] + [end] * (MAX_TOKENS - num_guided), (stage, after)
            assert num_guided < MAX_TOKENS, (stage, after)
            assert (num_guided == 0) == (after == 0) or stage == "forward", stage  # a step may have several of these
        assert engine.generate(prompts, params) == expected, f"what failed at {stage} left something behind"


def test_logits_that_the_kernel_has_written_over_end_their_requests(models, encode, expect, engine):
    """They cannot be guided again, and are not left as they are; who was not in that step goes on."""
    prompts, params, expected = batch(encode, expect)
    before = engine.call(failed_requests)
    engine.call(inject, "written", 2)
    *guided_ones, unguided = engine.generate(prompts, params)
    assert engine.call(heal) - before == 4
    end = models.tokenizer.eos_token_id
    for got, should in zip(guided_ones, expected, strict=False):
        num_guided = got.index(end)
        assert 0 < num_guided < MAX_TOKENS
        assert got == should[:num_guided] + [end] * (MAX_TOKENS - num_guided)
    assert unguided == expected[-1]
    assert engine.generate(prompts, params) == expected


def test_nothing_leaks(engine, encode, runner):
    engine.generate([encode("a")], greedy(1))  # V1 hears of requests that left with the next step
    stats = engine.call(engine_stats)
    assert stats["blocks"] == stats["free_blocks"] + stats["held_blocks"]
    if runner == "v1":
        assert stats["contexts"] == 0 == stats["held_blocks"]
