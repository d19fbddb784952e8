"""Requests and configuration: what is read, and what is refused with which words."""

from __future__ import annotations

import dataclasses

import pytest
import vllm

from pad_vllm import PAD, SamplingParams
from pad_vllm.checks import did_you_mean
from pad_vllm.config import PADConfig
from pad_vllm.params import GuidanceParams, check_num_chars


def config(**pad) -> PADConfig:
    return PADConfig.from_additional_config({"pad": {"reward_model": "rm", **pad}})


def test_pad_and_extra_args_say_the_same():
    pad = PAD(preference="concise", persona="a", weights=[1, 0.5], beta=2, top_k=5, max_divergence=1)
    extra_args = {
        "pad_preference": "concise",
        "pad_persona": "a",
        "pad_weights": [1.0, 0.5],
        "pad_beta": 2.0,
        "pad_top_k": 5,
        "pad_max_divergence": 1.0,
    }
    assert pad.extra_args() == extra_args
    assert PAD.from_extra_args(extra_args | {"other_plugin": object()}) == pad


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}])
def test_silence_asks_for_nothing(extra_args):
    assert PAD.from_extra_args(extra_args) is None


def test_a_salt_alone_asks_for_no_guidance():
    salted = PAD.from_extra_args({"pad_cache_salt": "tenant 1"})
    assert not salted.asks_for_guidance
    assert PAD(cache_salt="tenant 1", beta=1).asks_for_guidance
    assert config().resolve(salted) is None
    assert config().resolve(PAD(cache_salt="a", beta=1)).cache_salt == "a"
    assert config(personas={"p": {"beta": 1}}, default_persona="p").resolve(salted).cache_salt == "tenant 1"


def test_an_id_for_traces_asks_for_no_guidance_and_goes_with_it():
    named = PAD.from_extra_args({"pad_trace": "ticket 1"})
    assert not named.asks_for_guidance
    assert config().resolve(named) is None
    guided = config(personas={"p": {"beta": 1}}, default_persona="p").resolve(named)
    assert (guided.trace, guided.persona) == ("ticket 1", "p")
    assert config().resolve(PAD(beta=1)).trace is None is config().resolve(PAD(beta=1)).persona


def test_sampling_params_of_the_old_api():
    params = SamplingParams(temperature=0.7, logits_processors=[PAD(preference="formal")], extra_args={"x": 1})
    assert type(params) is vllm.SamplingParams
    assert params.temperature == 0.7
    assert params.extra_args == {"x": 1, "pad_preference": "formal"}
    assert SamplingParams(temperature=0.7).extra_args is None


@pytest.mark.parametrize(
    ("processors", "extra_args", "message"),
    [
        ([PAD(beta=1), PAD(beta=2)], None, "must be one PAD"),
        ([lambda ids, logits: logits], None, "must be one PAD"),
        ([PAD()], None, "is empty: give a preference"),
        ([PAD(beta=1)], {"pad_beta": 2}, "guidance is given twice"),
    ],
)
def test_sampling_params_refuses(processors, extra_args, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(logits_processors=processors, extra_args=extra_args)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preference": 1}, "pad_preference=1: must be a string or a list of them, not int"),
        ({"trace": 7}, "pad_trace=7: must be a string, not int"),
        ({"trace": "x" * 129}, "pad_trace: 129 characters, at most 128 are allowed"),
        ({"cache_salt": 7}, "pad_cache_salt=7: must be a string, not int"),
        ({"cache_salt": ""}, "pad_cache_salt='': must not be empty"),
        ({"cache_salt": "x" * 129}, "pad_cache_salt: 129 characters, at most 128 are allowed"),
        ({"cache_salt": "\ud800"}, "pad_cache_salt=.*lone surrogate"),
        ({"preference": ""}, "must not be empty"),
        ({"preference": "x" * 40_000}, "40000 characters, at most 32768"),
        ({"beta": True}, "pad_beta=True: must be a number, not bool"),
        ({"beta": float("inf")}, "pad_beta=inf: must be between 0 and 100"),
        ({"beta": 10**400}, "must be between 0 and 100"),
        ({"max_divergence": -0.1}, "pad_max_divergence=-0.1: must be between 0 and 1000"),
        ({"max_divergence": float("inf")}, "pad_max_divergence=inf: must be between 0 and 1000"),
        ({"max_divergence": float("nan")}, "pad_max_divergence=nan: must be between"),
        ({"max_divergence": "1"}, "pad_max_divergence='1': must be a number, not str"),
        ({"max_divergence": False}, "pad_max_divergence=False: must be a number, not bool"),
        ({"top_k": 2.0}, "pad_top_k=2.0: must be an integer, not float"),
        ({"top_k": -3}, "pad_top_k=-3: must be at least 1"),
        ({"weights": 0.5}, "pad_weights=0.5: must be a list"),
        ({"preference": []}, "pad_preference: a list of 0 texts; from 1 to 8"),
        ({"preference": ["a"] * 9}, "pad_preference: a list of 9 texts; from 1 to 8"),
        ({"preference": ["a", ["b"]]}, r"pad_preference\[1\]=\['b'\]: must be a string, not list"),
        ({"preference": {"a": 1}}, "pad_preference={'a': 1}: must be a string or a list of them, not dict"),
        ({"preference": ["a", "b"], "preference_weights": [1]}, "pad_preference_weights: 1 weights for 2 preferences"),
        ({"preference": "a", "preference_weights": []}, r"pad_preference_weights=\[\]: must be a list of numbers"),
        (
            {"preference": "a", "preference_weights": [float("nan")]},
            r"pad_preference_weights\[0\]=nan: must be between",
        ),
        ({"preference_weights": [[1]]}, r"pad_preference_weights\[0\]=\[1\]: must be a number, not list"),
        ({"reference": "bse"}, "pad_reference='bse': must be one of base, neutral, none"),
        ({"weights": [0.5, None]}, r"pad_weights\[1\]=None: must be a number"),
        ({"weights": [1e5]}, r"pad_weights\[0\]=100000.0: must be between -10000 and 10000"),
    ],
)
def test_pad_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        PAD(**arguments)


@pytest.mark.parametrize("additional_config", [None, {}, {"pad": None}, {"pad": {}}, {"other": 1}])
def test_not_configured(additional_config):
    assert PADConfig.from_additional_config(additional_config) is None


def test_defaults_are_the_published_settings():
    """The reference, for a reward model that says that it was made for this (test_folder.py)."""
    assert config(reference="base").resolve(PAD(preference="x")) == GuidanceParams(
        ("x",), (1.0,), None, beta=1.0, top_k=10, reference="base"
    )


def test_personas_defaults_and_overrides():
    personas = {"a": {"pad_preference": "brief", "pad_beta": 0.5}, "b": {"weights": [1, 0], "top_k": 3}}
    c = config(personas=personas, default_persona="a", beta=0.8)
    brief, long = (("brief",), (1.0,)), (("long",), (1.0,))
    assert c.resolve(None) == GuidanceParams(*brief, None, 0.5, 10, "base", persona="a")
    assert c.resolve(PAD(persona="b")) == GuidanceParams((), (1.0,), (1.0, 0.0), 0.8, 3, "base", persona="b")
    longer = GuidanceParams(*long, (1.0, 0.0), 0.8, 7, "base", persona="b")
    assert c.resolve(PAD(persona="b", preference="long", top_k=7)) == longer
    assert c.resolve(PAD(beta=2)) == GuidanceParams(*brief, None, 2.0, 10, "base", persona="a")
    assert config(personas=personas).resolve(None) is None


def test_a_requests_bound_stands_over_its_personas_and_the_servers():
    personas = {"held": {"preference": "brief", "max_divergence": 0}, "free": {"preference": "brief"}}
    server = config(personas=personas, max_divergence=0.5)
    asked = [PAD(persona="held"), PAD(persona="free"), PAD(persona="held", max_divergence=2), PAD(max_divergence=1000)]
    assert [server.resolve(one).max_divergence for one in asked] == [0.0, 0.5, 2.0, 1000.0]
    assert config(personas=personas).resolve(PAD(persona="free")).max_divergence is None
    assert PAD(max_divergence=0.1).asks_for_guidance


@pytest.mark.parametrize(
    ("pad", "message"),
    [
        ({"reward_modle": "x"}, "pad.reward_modle: no such key; did you mean 'reward_model'"),
        ({"reward_model": None}, "pad.reward_model is missing"),
        ({"reward_model": 7}, "pad.reward_model=7: must be a string"),
        ({"beta": "1"}, "pad.beta='1': must be a number"),
        ({"max_divergence": -1}, "pad.max_divergence=-1: must be between 0 and 1000"),
        ({"personas": {"a": {"max_divergence": "x"}}}, r"pad.personas\['a'\]: pad_max_divergence='x'"),
        ({"top_k": 65}, "pad.top_k=65: must be between 1 and 64"),
        ({"chat": "loose"}, "pad.chat='loose': must be one of 'auto', 'strict'"),
        ({"max_top_k": 4096}, "pad.max_top_k=4096: must be between 1 and 1024"),
        ({"reference": "natural"}, "pad.reference='natural': must be one of base, neutral, none"),
        ({"personas": {"a": {"preference_weights": [1]}}}, r"pad.personas\['a'\]: pad_preference_weights: there is no"),
        ({"prompt_template": "{preference}"}, "must contain {prompt} exactly once"),
        ({"prompt_template": "{prompt}"}, "must contain {preference}"),
        ({"trust_remote_code": "yes"}, "must be true or false"),
        ({"trace": 1}, "pad.trace=1: must be a string, not int"),
        ({"trace": "folder", "trace_text": 1}, "pad.trace_text=1: must be true or false"),
        ({"trace": "folder", "trace_files": 0}, "pad.trace_files=0: must be at least 1"),
        ({"trace": "folder", "trace_file_bytes": 100}, "pad.trace_file_bytes=100: must be at least 4096"),
        ({"kv_cache_memory_bytes": 0}, "pad.kv_cache_memory_bytes=0: must be at least 1"),
        ({"kv_cache_memory_bytes": 1.5}, "must be an integer"),
        ({"default_persona": "x"}, "pad.default_persona='x': no such persona; known: none"),
        ({"personas": []}, "must be an object of name -> request arguments"),
        ({"personas": {"a": {}}}, r"pad.personas\['a'\]={}: must be an object with at least one"),
        ({"personas": {"a": {"pad_beta": -1}}}, r"pad.personas\['a'\]: pad_beta=-1"),
        ({"personas": {"a": {"persona": "a"}}}, "a persona cannot name another"),
        ({"personas": {"a": {"beta": 1, "pad_beta": 2}}}, "given twice, with the prefix pad_ and without it"),
        ({"personas": {"a": {"top_k": 100}}}, "pad_top_k=100: must be between 1 and 64"),
        ({"personas": {"a": {"bata": 1}}}, "did you mean 'pad_beta'"),
    ],
)
def test_configuration_refuses(pad, message):
    with pytest.raises(ValueError, match=message):
        config(**pad)


def test_pad_must_be_an_object():
    with pytest.raises(ValueError, match="must be an object, not list"):
        PADConfig.from_additional_config({"pad": ["model"]})


def test_configuration_from_files(tmp_path):
    (tmp_path / "personas.yaml").write_text("terse:\n  preference: |\n    Be concise.\n    Be kind.\nb: {beta: 2}\n")
    (tmp_path / "heads").touch()
    (tmp_path / "pad.json").write_text('{"reward_model": "hub/rm", "heads": "heads", "personas": "personas.yaml"}')
    read = PADConfig.from_additional_config({"pad": str(tmp_path / "pad.json")})
    personas = {"terse": PAD(preference="Be concise.\nBe kind.\n"), "b": PAD(beta=2)}
    assert (read.reward_model, read.heads, read.personas) == ("hub/rm", str(tmp_path / "heads"), personas)
    assert config(personas=str(tmp_path / "personas.yaml")).personas == personas


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.json", None, "none.json': cannot be read .No such file"),
        ("a.json", '{"reward_model": }', "a.json': Expecting value: line 1 column 18"),
        ("a.json", '{"beta": 1, "beta": 2}', "a.json': 'beta' is given twice"),
        ("a.yaml", "personas:\n  a: {beta: 1}\n  a: {beta: 2}", "a.yaml': 'a' is given twice"),
        ("a.yaml", "a: [", "a.yaml': while parsing .* line 1"),
        ("a.yaml", "!!python/object:os.system {}", "could not determine a constructor"),
        ("a.yaml", "{1: 2, [1]: 3}", "unhashable key"),
        ("a.yaml", "- 1", "must be an object, not list"),
        ("a.yaml", "reward_model: x\nbeat: 1", "did you mean 'beta'"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        PADConfig.from_additional_config({"pad": str(tmp_path / name)})


PERSONAS = {"two": {"preference": ["brief", "kind"], "preference_weights": [1, -0.5]}, "none": {"beta": 1}}


def test_what_cancels_is_no_reward():
    c = config(heads="x")
    read = GuidanceParams((), (1.0,), (1.0, 0.0), 0.0, 5, "none")
    for asked in (
        PAD(weights=[1.0, 0.0], top_k=5, reference="neutral"),
        PAD(weights=[1.0, 0.0], top_k=5, preference=["a", "a"], preference_weights=[1, -1], reference="base"),
    ):
        assert c.resolve(asked).as_read() == read
    one = c.resolve(PAD(preference=["a", "b"], preference_weights=[1, -1], reference="none"))
    assert one.as_read() is one


def test_a_personas_weights_are_of_its_own_preferences():
    c = config(personas=PERSONAS, default_persona="two", reference="neutral")
    of_two = GuidanceParams(("brief", "kind"), (1.0, -0.5), None, 1.0, 10, "neutral", persona="two")
    assert c.resolve(None) == of_two
    asked = PAD(persona="two", preference_weights=[0.25, 0.75], reference="none")
    changed = {"preference_weights": (0.25, 0.75), "reference": "none"}
    assert c.resolve(asked) == dataclasses.replace(of_two, **changed)
    assert c.resolve(PAD(preference=["a", "b", "c", "d"])).preference_weights == (0.25,) * 4
    for persona, weights in (("two", [1]), ("none", [1]), (None, [1, 2, 3])):
        with pytest.raises(ValueError, match="pad_preference_weights"):
            c.resolve(PAD(persona=persona, preference_weights=weights))


@pytest.mark.parametrize(
    ("asked", "contexts", "base_weight"),
    [
        ({"preference": "a"}, {"a": 1.0}, 1.0),
        ({"beta": 1}, {None: 1.0}, 1.0),
        ({"preference": ["a", "b"]}, {"a": 0.5, "b": 0.5}, 1.0),
        ({"preference": ["a", "b"], "preference_weights": [1, -0.5], "reference": "none"}, {"a": 1, "b": -0.5}, 0),
        ({"preference": ["a", "b", "a"], "preference_weights": [1, 0, 2]}, {"a": 3.0}, 3.0),
        ({"preference": ["a", "b"], "reference": "neutral"}, {"a": 0.5, "b": 0.5, None: -1.0}, 0),
        ({"preference": ["a", "b"], "preference_weights": [1, -1], "reference": "neutral"}, {"a": 1, "b": -1}, 0),
        ({"beta": 1, "reference": "neutral"}, {None: 0.0}, 0),
        ({"preference": "a", "preference_weights": [0]}, {None: 0.0}, 0),
        ({"adapter": "x"}, {(None, "x"): 1.0}, 1.0),
        ({"adapter": "x", "reference": "neutral"}, {(None, "x"): 1.0, None: -1.0}, 0),
        ({"adapter": ["x", "y"], "preference_weights": [0.7, 0.5]}, {(None, "x"): 0.7, (None, "y"): 0.5}, 1.2),
        ({"adapter": ["x", "y"], "preference": "a"}, {("a", "x"): 0.5, ("a", "y"): 0.5}, 1.0),
        ({"adapter": "x", "preference": ["a", "b"]}, {("a", "x"): 0.5, ("b", "x"): 0.5}, 1.0),
        ({"adapter": ["x", "y"], "preference": ["a", "b"]}, {("a", "x"): 0.5, ("b", "y"): 0.5}, 1.0),
        ({"adapter": ["x", "x"]}, {(None, "x"): 1.0}, 1.0),
        ({"persona": "both"}, {(None, "x"): 1.0, (None, "y"): -0.5}, 0.5),
        ({"persona": "both", "preference": "a"}, {("a", "x"): 1.0, ("a", "y"): -0.5}, 0.5),
        ({"persona": "both", "preference": "a", "preference_weights": [1, 2]}, {("a", "x"): 1.0, ("a", "y"): 2.0}, 3.0),
        ({"persona": "both", "adapter": "y"}, {(None, "y"): 1.0}, 1.0),
        ({"persona": "two", "adapter": "y"}, {("brief", "y"): 0.5, ("kind", "y"): 0.5}, 1.0),
    ],
)
def test_what_the_reward_model_reads(asked, contexts, base_weight):
    adapters = {"x": "folder", "y": "folder"}
    both = {"adapter": ["x", "y"], "preference_weights": [1.0, -0.5]}
    params = config(adapters=adapters, personas=PERSONAS | {"both": both}).resolve(PAD(**asked))
    wanted = {(key if isinstance(key, tuple) else (key, None)): weight for key, weight in contexts.items()}
    assert params.contexts() == pytest.approx(wanted)
    assert params.base_weight == pytest.approx(base_weight)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"adapter": "z"}, r"pad_adapter='z': no such adapter; known: x, y"),
        ({"adapter": ["x", "yy"]}, r"pad_adapter='yy': no such adapter; did you mean 'y'\?"),
        ({"adapter": 3}, "pad_adapter=3: must be a name or a list of names, not int"),
        ({"adapter": []}, "pad_adapter: a list of 0 names; from 1 to 8 are allowed"),
        ({"adapter": ["x"] * 9}, "pad_adapter: a list of 9 names; from 1 to 8 are allowed"),
        ({"adapter": ["x", None]}, r"pad_adapter\[1\]=None: must be a string"),
        ({"adapter": ["x", "y"], "preference": ["a", "b", "c"]}, "pad_adapter: 2 adapters for 3 preferences"),
        ({"adapter": ["x", "y"], "preference_weights": [1]}, "pad_preference_weights: 1 weights for 2 contexts"),
        ({"adapter": "x", "preference_weights": [1, 2]}, "pad_preference_weights: 2 weights for 1 contexts"),
        ({"persona": "two", "adapter": ["x", "y", "x"]}, "pad_adapter: 3 adapters for 2 preferences"),
    ],
)
def test_adapters_that_cannot_be_asked_for(asked, message):
    with pytest.raises(ValueError, match=message):
        config(adapters={"x": "folder", "y": "folder"}, personas=PERSONAS).resolve(PAD(**asked))


def test_unknown_persona_names_the_closest():
    with pytest.raises(ValueError, match="pad_persona='alise': no such persona; did you mean 'alice'"):
        config(personas={"alice": {"beta": 1}}).resolve(PAD(persona="alise"))


@pytest.mark.parametrize(
    "arguments",
    [
        {"pad_" + "x" * 9000: 1},
        {"pad_persona": "x" * 9000, "pad_beta": "y" * 9000},
        {"pad_preference": [["a" * 50] * 50] * 8},
        {"pad_preference": "a" * 40_000},
        {"pad_weights": [0.5] * 100_000},
        {"pad_weights": {"a" * 9000: [[["b"] * 99] * 99] * 99}},
        {"pad_top_k": -(10**5000)},
        {"pad_beta": -(10**4000)},
        {"pad_reference": ["base"] * 5000},
    ],
)
def test_a_refusal_is_short(arguments):
    """Whatever was sent: it repeats no more than a line of it, and is found without reading all of it."""
    with pytest.raises(ValueError, match="pad_") as error:
        PAD.from_extra_args(arguments)
    assert len(str(error.value)) < 300


def test_an_unknown_name_is_compared_to_few():
    personas = [f"user-{i:06d}" for i in range(20_000)]
    message = did_you_mean("user-012345x", personas)
    assert message.startswith("did you mean 'user-012345'? known: user-000000, ")
    assert message.endswith("and 19980 more")


def test_a_request_brings_a_page_along_and_a_persona_a_book():
    check_num_chars(["a" * 4096] * 2)
    with pytest.raises(
        ValueError, match="8193 characters, at most 8192 are allowed in a request; longer texts are for"
    ):
        check_num_chars(["a" * 4096, "a" * 4097])
    assert config(personas={"a": {"preference": "a" * 30_000}}).personas["a"].preference == "a" * 30_000
