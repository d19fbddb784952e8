"""What the frontend knows of its engines, and what it refuses."""

from __future__ import annotations

import copy
import gc
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import vllm

from pad_vllm import PADLogitsProcessor, channel, plugin
from pad_vllm.channel import ANNOUNCE_DIR, Announcement
from pad_vllm.frontend import collector, engines, patches, prompts
from pad_vllm.params import ADMITTED, PAD
from pad_vllm.personas import Admitted, Personas, admitted_persona, show_personas
from pad_vllm.reward.byte_tokens import ByteTokens
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.reward.translation import PromptTranslator
from pad_vllm.stats import NAMES
from tests.support.chats import CHATML_DEFAULT, tokenizer_of
from tests.support.malformed import GOOD, malformed
from tests.support.tokenizers import CHATML, TURNS, like_gemma, like_qwen, make

pytestmark = pytest.mark.every_release

PERSONAS = {"alice": PAD(preference=("brief", "kind")), "ben": PAD(adapter=("warm", "dry"))}
GUIDED = Announcement(
    True,
    head_names=("a", "b"),
    max_top_k=20,
    max_preference_tokens=8,
    adapters=("warm", "dry"),
)


class Owner:
    """Something that announcements live as long as."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(ANNOUNCE_DIR, str(tmp_path))
    return tmp_path


def validate(**extra_args) -> PAD | None:
    """The persona that goes along with the request."""
    params = vllm.SamplingParams(extra_args=extra_args or None)
    PADLogitsProcessor.validate_params(params)
    return admitted_persona(params.extra_args)


def show(owner: Owner, announcement: Announcement, **personas: PAD) -> Path:
    """Announce an engine with personas."""
    path = channel.announce(announcement, owner)
    show_personas(path, Personas.of(personas))
    return path


def test_an_announcement_lives_as_long_as_its_engine():
    owner = Owner()
    channel.announce(GUIDED, owner)
    assert list(channel.announced().values()) == [GUIDED]
    del owner
    gc.collect()
    assert channel.announced() == {}


def test_an_engine_that_was_killed_announces_nothing(folder):
    code = """if True:
        import time
        from pad_vllm.channel import Announcement, announce
        owner = type("Owner", (), {})()
        announce(Announcement(True, launch="bob"), owner)
        print("announced", flush=True)
        time.sleep(60)
    """
    engine = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert engine.stdout.readline() == "announced\n"
    assert len(channel.announced()) == 1
    engine.kill()
    engine.wait()
    assert len(list(folder.glob("*.json"))) == 1
    assert channel.announced() == {}


def test_the_hook_makes_one_folder_for_all_processes(monkeypatch):
    monkeypatch.delenv(ANNOUNCE_DIR)
    plugin.register()
    folder = os.environ[ANNOUNCE_DIR]
    assert os.stat(folder).st_mode & 0o077 == 0
    plugin.register()
    assert os.environ[ANNOUNCE_DIR] == folder
    owner = Owner()
    channel.announce(GUIDED, owner)
    code = "from pad_vllm.channel import announced; print(len(announced()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"


def test_an_id_for_traces_takes_a_server_that_keeps_them():
    """Guided or not: whoever gives one counts on a line."""
    refused = r"pad_trace='ticket 1': this server keeps no traces; .* set pad.trace"
    owner, another = Owner(), Owner()
    channel.announce(GUIDED, owner)
    for more in ({}, {"pad_beta": 1.0}):
        with pytest.raises(ValueError, match=refused):
            validate(pad_trace="ticket 1", **more)
    channel.announce(replace(GUIDED, traces=True), another)
    for more in ({}, {"pad_beta": 1.0}):
        validate(pad_trace="ticket 1", **more)
    with pytest.raises(ValueError, match="pad_trace='': must not be empty"):
        validate(pad_trace="")
    del owner, another


def test_a_request_that_no_engine_would_guide_is_refused():
    validate()
    validate(other_plugin=1)
    validate(pad_cache_salt="by itself it asks for nothing")
    with pytest.raises(ValueError, match="pad_cache_salt=7: must be a string"):
        validate(pad_cache_salt=7)
    with pytest.raises(ValueError, match="no engine has announced PAD guidance"):
        validate(pad_beta=1.0)
    owner = Owner()
    channel.announce(Announcement(configured=False), owner)
    with pytest.raises(ValueError, match="runs without a reward model"):
        validate(pad_beta=1.0)


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"pad_persona": "alise"}, "did you mean 'alice'"),
        ({"pad_top_k": 21}, "pad_top_k=21: must be between 1 and 20"),
        ({"pad_weights": [1.0, 2.0, 3.0]}, "3 weights for 2 value heads .a, b."),
        ({"pad_preference": "x"}, "no tokenizer"),
        ({"pad_beta": "x"}, "must be a number"),
    ],
)
def test_refused_by_what_the_engine_announced(extra_args, message):
    owner = Owner()
    show(owner, GUIDED, **PERSONAS)
    validate(pad_persona="alice", pad_top_k=20, pad_weights=[1, 2])
    with pytest.raises(ValueError, match=message):
        validate(**extra_args)


def test_too_many_biased_tokens_are_refused():
    """Model Runner V2 has room for 1024, and would raise in its worker, for everybody."""
    house = Announcement(True, default_persona="house")
    for announcement, guided in ((GUIDED, {"extra_args": {"pad_beta": 1.0}}), (house, {})):
        owner = Owner()
        channel.announce(announcement, owner)
        fits, too_many = (dict.fromkeys(range(n), 1.0) for n in (1024, 1025))
        PADLogitsProcessor.validate_params(vllm.SamplingParams(logit_bias=fits, **guided))
        with pytest.raises(ValueError, match="logit_bias: 1025 tokens; a guided request may bias at most 1024"):
            PADLogitsProcessor.validate_params(vllm.SamplingParams(logit_bias=too_many, **guided))


def test_preferences_are_bounded_in_the_reward_models_tokens(models):
    owner = Owner()
    tokenizer = {"pretrained_model_name_or_path": str(models.reward)}
    template = "a {preference} b {prompt}"
    announcement = Announcement(True, max_preference_tokens=8, tokenizer=tokenizer, prompt_template=template)
    channel.announce(announcement, owner)
    validate(pad_preference="be concise")
    with pytest.raises(ValueError, match=r"pad_preference: \d+ tokens, at most 8 are allowed"):
        validate(pad_preference="be concise and 12345678")


def test_weights_are_held_against_the_preferences_that_a_persona_has():
    owner = Owner()
    show(owner, GUIDED, **PERSONAS)
    validate(pad_persona="alice", pad_preference_weights=[1, -0.5])
    validate(pad_adapter="warm")
    # This persona has a list of two preferences, and another a list of two adapters.
    validate(pad_persona="alice", pad_adapter=["warm", "dry"])
    validate(pad_persona="ben", pad_preference_weights=[1, -0.5])
    for persona, arguments, words in (
        ("alice", {"pad_adapter": ["warm", "dry", "dry"]}, "3 adapters for 2 preferences"),
        ("ben", {"pad_preference_weights": [1]}, "1 weights for 2 contexts"),
    ):
        with pytest.raises(ValueError, match=words):
            validate(pad_persona=persona, **arguments)
    validate(pad_adapter=["warm", "dry"], pad_preference_weights=[1, -0.5])
    for name in ("wram", ["dry", "wram"]):
        with pytest.raises(ValueError, match=r"pad_adapter='wram': no such adapter; did you mean 'warm'\?"):
            validate(pad_adapter=name)
    for arguments in ({"pad_persona": "alice", "pad_preference_weights": [1]}, {"pad_preference_weights": [1, 2]}):
        with pytest.raises(ValueError, match="pad_preference_weights: "):
            validate(**arguments)


def test_preferences_are_bounded_together(models):
    owner = Owner()
    tokenizer, template = {"pretrained_model_name_or_path": str(models.reward)}, "a {preference} b {prompt}"
    announcement = Announcement(True, max_preference_tokens=900, tokenizer=tokenizer, prompt_template=template)
    channel.announce(announcement, owner)
    text = "12345678 " * 25
    validate(pad_preference=[text] * 2)
    with pytest.raises(ValueError, match=r"pad_preference: \d+ tokens in 8 preferences, at most 1024 are allowed"):
        validate(pad_preference=[text] * 8)


def test_several_engines_behind_one_frontend_accept_what_one_of_them_accepts():
    first, second = Owner(), Owner()
    show(first, GUIDED, **PERSONAS)
    show(second, Announcement(True, max_top_k=5), bob=PAD(beta=2))
    validate(pad_persona="bob")
    validate(pad_persona="alice")
    with pytest.raises(ValueError, match="pad_persona='carol'"):
        validate(pad_persona="carol")


@pytest.mark.one_release
def test_ten_thousand_malformed_requests_are_refused(models):
    owner, rng = Owner(), random.Random(0)
    tokenizer = {"pretrained_model_name_or_path": str(models.reward)}
    template = "a {preference} b {prompt}"
    announcement = Announcement(True, ("a", "b", "c"), 20, 200, tokenizer, template)
    show(owner, announcement, terse=PAD(beta=2))
    validate(pad_persona="terse", pad_weights=[1, 2, 3.0], **GOOD)
    for _ in range(10_000):
        arguments = malformed(rng, num_heads=3, max_top_k=20)
        with pytest.raises(ValueError, match=r"(?i)pad"):
            validate(**arguments)
    validate(pad_persona="terse", pad_weights=[1, 2, 3.0], **GOOD)


def test_preferences_that_were_refused_are_not_kept(models):
    template = PromptTemplate(models.tokenizer, "{preference} {prompt}")
    template.max_preference_tokens = 8
    for i in range(20):
        with pytest.raises(ValueError, match="at most 8 are allowed"):
            template.encode_preference("one two three four five " * (9 + i))
    template.encode_preference("be brief")
    assert len(template.encode_preference) == 1


def engine_config(instance_id: str, address: str = "127.0.0.1", data_parallel_size: int = 1, **more) -> SimpleNamespace:
    """What the frontend reads of its VllmConfig."""
    parallel = {"data_parallel_master_ip": address, "data_parallel_rpc_port": 1, "local_engines_only": False}
    model = {"trust_remote_code": False, "model": "b", "revision": None, "tokenizer": "b", "tokenizer_revision": None}
    model |= {"skip_tokenizer_init": False, "max_model_len": 512} | more.pop("model", {})
    return SimpleNamespace(
        instance_id=instance_id,
        parallel_config=SimpleNamespace(data_parallel_size=data_parallel_size, **parallel),
        model_config=SimpleNamespace(**model),
        **{"speculative_config": None, "use_v2_model_runner": False, "additional_config": {}, **more},
    )


def announce(announcement: Announcement, config: SimpleNamespace, **personas: PAD) -> Owner:
    owner = Owner()
    owner.vllm_config = config
    show(owner, announcement, **personas)
    return owner


@pytest.fixture
def serves(monkeypatch):
    """Makes this process the frontend of an engine, as a request or the start of an API server does."""
    monkeypatch.setattr(engines, "_servers", set())

    def serve(config: SimpleNamespace, path: str = "") -> None:
        client = SimpleNamespace(vllm_config=config)
        engines.enter({"path": path, "app": SimpleNamespace(state=SimpleNamespace(engine_client=client))})

    yield serve
    engines.enter({})


def test_servers_that_share_a_folder_are_kept_apart(serves):
    """What they accept, and their numbers."""
    mine, other = engine_config("mine"), engine_config("other")
    bob = Announcement(True, labels=("model", "0"))
    owners = announce(GUIDED, other, **PERSONAS), announce(bob, engine_config("mine_dp1"), bob=PAD(beta=2))
    for path, engine in channel.announced().items():
        channel.make_stats(path, 0).write_bytes(np.full(len(NAMES), 1.0 if engine.labels[0] else 5.0).tobytes())
    serves(mine)
    validate(pad_persona="bob")
    with pytest.raises(ValueError, match="no such persona"):
        validate(pad_persona="alice")
    samples = {s.labels["model_name"]: s.value for m in collector.Collector().collect() for s in m.samples}
    assert samples == {"model": 1.0}
    mine.speculative_config = object()
    with pytest.raises(ValueError, match="speculative decoding on the V1 runner drops logits processors"):
        validate(pad_persona="bob")
    del owners


def test_several_api_servers_know_their_engines_by_the_launch(serves, monkeypatch):
    """Each has a configuration, and an id, that no engine knows; another server has such, too, in the same folder."""
    owners = []
    for launch, persona in (("theirs", "alice"), ("ours", "bob")):
        monkeypatch.setenv(channel.LAUNCH, launch)
        owners.append(announce(Announcement(True), engine_config(f"an engine of {launch}"), **{persona: PAD(beta=2)}))
    serves(engine_config("an API server"))
    validate(pad_persona="bob")
    with pytest.raises(ValueError, match="no such persona"):
        validate(pad_persona="alice")
    del owners


def test_engines_on_other_machines_are_known_by_where_the_server_meets(serves):
    """A frontend of another machine than its engines' does not know their ids; and an engine of a dense model does not
    know that it is one of several."""
    owners = (
        announce(Announcement(True), engine_config("there", "10.0.0.1"), bob=PAD(beta=2)),
        announce(GUIDED, engine_config("elsewhere", "10.0.0.2"), **PERSONAS),
    )
    serves(engine_config("here", "10.0.0.1", 2))
    validate(pad_persona="bob")
    with pytest.raises(ValueError, match="no such persona"):
        validate(pad_persona="alice")
    serves(engine_config("alone", "10.0.0.3", 2))
    with pytest.raises(ValueError, match="no engine has announced"):
        validate(pad_persona="bob")
    del owners


def save(tokenizer, folder) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["the same", "another", "insert_after"])
def test_prompts_that_a_strict_engine_would_not_understand_are_refused(kind, serves, tmp_path, monkeypatch):
    """By the served model's chat template, which the frontend's own configuration names; also of long prompts."""
    base = tokenizer_of("chatml")
    served = save(base, tmp_path / "base")
    untold = copy.deepcopy(base)
    untold.chat_template = None
    reward = save(like_gemma() if kind == "another" else untold, tmp_path / "reward")
    both = {"tokenizer": {"pretrained_model_name_or_path": reward}, "base_tokenizer": {"anything": "else"}}
    announcement = Announcement(
        True,
        **(both if kind == "another" else {"tokenizer": both["tokenizer"]}),
        head_names=("a",),
        max_preference_tokens=100,
        prompt_template="{preference} {prompt}",
        chat="strict",
        insert_after="<|im_start|>system\n" if kind == "insert_after" else None,
    )
    config = engine_config("strict", model={"tokenizer": served})
    personas = {"house": PAD(preference="formal"), "mute": PAD(weights=[2])}
    owners = [announce(announcement, config, **personas)]
    serves(config)

    def ask(text: str, **arguments) -> None:
        prompt = {"prompt_token_ids": base.encode(text, add_special_tokens=False)}
        validate(**arguments)
        assert prompt

    def refused(text: str, **arguments) -> None:
        with pytest.raises(ValueError, match=r"the prompt begins as a chat.*pad\.chat='strict'"):
            ask(text, **arguments)

    refuse_plain = refused if kind == "insert_after" else ask
    critic, chat = "<|im_start|>critic\nsay", "<|im_start|>system\nsay<|im_end|>\n<|im_start|>user\nsay<|im_end|>\n"
    for tail in ("", " why" * 3000):
        refused(critic + tail, pad_preference="formal")
        refused(critic + tail, pad_persona="house")
        refused(critic + tail, pad_preference=["formal", "brief"], pad_preference_weights=[0, 1])
        ask(chat + tail, pad_preference="formal")
        refuse_plain("say" + tail, pad_preference="formal")
    ask(critic)
    # A preference that is not read has no place in the prompt. What is translated must be understood all the same.
    unread = refused if kind == "another" else ask
    unread(critic, pad_persona="mute", pad_weights=[1])
    unread(critic, pad_preference=["a", "b"], pad_preference_weights=[0, 0])
    unread(critic, pad_persona="house", pad_preference_weights=[0])
    owners = [announce(replace(announcement, default_persona="house"), config, **personas)]
    refused(critic)
    ask(chat)
    owners = [announce(replace(announcement, chat="auto"), config)]
    ask(critic, pad_preference="formal")
    monkeypatch.setattr(prompts, "chat_format", pytest.fail)  # what was read at the start is kept
    owners = [announce(announcement, config)]
    refused(critic, pad_preference="formal")
    del owners


def test_where_the_frontend_cannot_tell_the_engine_does(serves, tmp_path):
    reward = {"pretrained_model_name_or_path": save(tokenizer_of("chatml"), tmp_path / "reward")}
    config, template = engine_config("strict", model={"tokenizer": str(tmp_path / "nowhere")}), "{preference} {prompt}"
    owner = announce(Announcement(True, (), 1, 100, reward, template, chat="strict"), config)
    serves(config)
    prompt = {"prompt_token_ids": tokenizer_of("chatml").encode("<|im_end|>say")}
    validate(pad_preference="formal")
    assert prompt
    del owner


@pytest.fixture
def foreign_code(models, tmp_path):
    """A tokenizer that brings code, and the file that the code would write."""
    folder, ran = tmp_path / "foreign", tmp_path / "ran"
    shutil.copytree(models.reward, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "code.Foreign"]}, "tokenizer_class": "Foreign"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(ran)!r}).touch()\n\n\nclass Foreign(PreTrainedTokenizerFast):\n    pass\n"
    )
    return folder, ran


def test_an_announcement_does_not_say_whose_code_runs(foreign_code, serves, monkeypatch, tmp_path):
    """What does is the frontend's own configuration."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, ran = foreign_code
    tokenizer = {"pretrained_model_name_or_path": str(folder), "revision": None, "trust_remote_code": True}
    announcement = Announcement(
        True, max_preference_tokens=8, tokenizer=tokenizer, prompt_template="{preference} {prompt}"
    )
    pad = {"reward_model": str(folder)}
    for i, own in enumerate(({}, {"pad": pad}, {"pad": {"reward_model": "another", "trust_remote_code": True}})):
        config = engine_config(f"engine{i}", additional_config=own)
        owner = announce(announcement, config)
        serves(config)
        with pytest.raises(ValueError, match="the frontend cannot read the reward model's tokenizer"):
            validate(pad_preference="brief")
        assert not ran.exists()
        del owner
    config = engine_config("trusting", additional_config={"pad": pad | {"trust_remote_code": True}})
    owner = announce(announcement, config)
    serves(config)
    validate(pad_preference="brief")
    assert ran.exists()
    del owner


def test_a_chat_is_counted_without_its_markers_spelled(tmp_path):
    """What cannot fit is refused here; what may fit is the worker's to count."""
    names, lengths = [], []
    talk = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}] * 6
    for name, tokenizer in (("base", like_qwen()), ("reward", like_gemma())):
        tokenizer.save_pretrained(tmp_path / name)
        names.append(json.dumps({"pretrained_model_name_or_path": str(tmp_path / name)}))
        ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        lengths.append(ids)
    theirs, own = lengths
    spelled = like_gemma().encode(like_qwen().decode(theirs), add_special_tokens=False)
    assert prompts._num_translated(*names, theirs) <= len(own) < len(spelled)
    text = like_qwen().encode("the rain keeps falling " * 20)
    assert prompts._num_translated(*names, text) > 40


TALK = [{"role": "user", "content": "why"}]
SYSTEM = [{"role": "system", "content": "Be kind."}, *TALK]


def test_a_system_message_that_a_template_writes_by_itself_is_not_counted(tmp_path):
    """The reward model's template has its own, or none."""
    base, reward = make("byte-level", 600, CHATML_DEFAULT), make("replace", 900, TURNS)
    names = [
        json.dumps({"pretrained_model_name_or_path": save(one, tmp_path / name)})
        for name, one in (("base", base), ("reward", reward))
    ]
    for talk in (TALK, SYSTEM):
        ids = base.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        translated = PromptTranslator(ByteTokens(base, "base"), ByteTokens(reward, "reward"), {}).translate(ids)
        assert prompts._num_translated(*names, ids) <= len(translated)


@pytest.mark.parametrize("talk", [TALK, SYSTEM], ids=["user", "system"])
@pytest.mark.parametrize("template", ["{preference}\n\n{prompt}", "Guidelines: {preference} {prompt}"])
def test_a_chat_is_counted_as_the_engine_composes_it(template, talk, serves, tmp_path):
    """With the blank line after a system message. Of several preferences those count that are read."""
    tokenizer = make("byte-level", 600, CHATML)
    served = save(tokenizer, tmp_path / "base")
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    prompt = {"prompt_token_ids": ids}
    config, reward = engine_config("chat", model={"tokenizer": served}), {"pretrained_model_name_or_path": served}
    serves(config)
    long, short = "Be concise, and formal.", "x"
    composed = PromptTemplate(tokenizer, template)
    for text, asked in (
        (long, {"pad_preference": long}),
        (long, {"pad_preference": [short, long]}),
        (short, {"pad_preference": [short, long], "pad_preference_weights": [1, 0]}),
        (short, {"pad_preference": [short, long, long], "pad_preference_weights": [1, 0.5, -0.5]}),
        (long, {"pad_persona": "long"}),
        (short, {"pad_persona": "short"}),
        (short, {"pad_persona": "short", "pad_beta": 2}),
        (long, {"pad_persona": "short", "pad_preference_weights": [0, 1]}),
    ):
        for room in (0, -1):
            most = len(composed.compose(ids, text)) + room
            personas = {
                "long": PAD(preference=long),
                "short": PAD(preference=(short, long), preference_weights=(1.0, 0.0)),
            }
            owner = announce(Announcement(True, (), 1, 100, reward, template, max_context_len=most), config, **personas)
            if room < 0:
                with pytest.raises(ValueError, match=f"1 more than the reward model's {most} positions"):
                    validate(**asked)
                del owner
                continue
            validate(**asked)
            # An API server's request has as many tokens as there is room for, and the last of them is not read.
            cases = ((0, 40, 1), (3, 40, 4), (3, 4, 4), (3, 2, 2), (3, None, 4), (600, 40, 40))
            for left, max_tokens, expected in cases:
                owner = announce(
                    Announcement(True, (), 1, 100, reward, template, max_context_len=most + left), config, **personas
                )
                params = vllm.SamplingParams(extra_args=asked, max_tokens=max_tokens, min_tokens=2)
                PADLogitsProcessor.validate_params(params)
                assert (params.max_tokens, params.min_tokens) == (expected, min(2, expected))
            del owner
    assert prompt


def test_a_request_goes_by_the_personas_of_its_admission(monkeypatch):
    """An API server's second look changes nothing; a caller's own parameters are looked at anew."""
    owner = Owner()
    path = show(owner, replace(GUIDED, default_persona="ben"), **PERSONAS)
    params, unasked, other = (
        vllm.SamplingParams(extra_args={"pad_persona": "alice"}),
        vllm.SamplingParams(),
        PAD(beta=2),
    )
    for one in (params, unasked):
        PADLogitsProcessor.validate_params(one)
    sent = params.clone()
    assert isinstance(sent.extra_args[ADMITTED], Admitted)
    assert admitted_persona(sent.extra_args) == PERSONAS["alice"]
    assert admitted_persona(unasked.extra_args) == PERSONAS["ben"]
    version = params.extra_args[ADMITTED]["version"]
    show_personas(path, Personas.of({"alice": other, "ben": other}))
    with monkeypatch.context() as served:
        served.setattr(engines, "is_serving", lambda: True)
        for one in (params, unasked):
            PADLogitsProcessor.validate_params(one)
    assert admitted_persona(params.extra_args) == PERSONAS["alice"]
    for one in (params, unasked):
        PADLogitsProcessor.validate_params(one)
        assert admitted_persona(one.extra_args) == other
    assert params.extra_args[ADMITTED]["version"] != version
    assert admitted_persona(sent.extra_args) == PERSONAS["alice"]
    show_personas(path, Personas.of({"ben": other}))
    with pytest.raises(ValueError, match="pad_persona='alice': no such persona"):
        PADLogitsProcessor.validate_params(params)
    for fake in ({"name": "alice", "arguments": {"pad_beta": 3}}, "alice"):
        with pytest.raises(ValueError, match=r"pad_admitted=.*: no such argument; a persona is named by pad_persona"):
            validate(pad_persona="ben", pad_admitted=fake)


def test_a_rendered_request_shows_nothing_of_its_persona_and_can_be_sent(serves):
    """An API server renders a request and gives it back, for its client to send as tokens."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    patches.install()
    config = engine_config("a")
    owner = announce(GUIDED, config, terse=PAD(beta=3.0, cache_salt="its operator's secret"))
    serves(config, path="/v1/completions/render")
    named = {"pad_persona": "terse"}
    request = CompletionRequest(model="base", prompt="a", vllm_xargs=named)
    assert request.to_sampling_params(8, {}).extra_args == named
    with pytest.raises(ValueError, match="no such persona"):
        CompletionRequest(model="base", prompt="a", vllm_xargs={"pad_persona": "bob"}).to_sampling_params(8, {})
    serves(config, path="/v1/completions")
    params = request.to_sampling_params(8, {})
    assert admitted_persona(params.extra_args) == PAD(beta=3.0, cache_salt="its operator's secret")
    del owner


def test_frontends_go_by_the_first_of_a_servers_engines():
    """Whose versions are its own; two servers that nobody tells apart have two."""
    owners, paths = [], []
    for rank, persona in enumerate((PAD(beta=1), PAD(beta=2))):
        announcement = Announcement(True, labels=("m", str(rank)))
        owner = Owner()
        owner.vllm_config = engine_config(f"server_dp{rank}")
        owners.append(owner)
        paths.append(show(owner, announcement, a=persona))
    own = channel.announced()
    assert [engines.personas_of(own)[path].arguments["a"] for path in paths] == [{"pad_beta": 1.0}] * 2
    assert validate(pad_persona="a") == PAD(beta=1)
    show_personas(paths[0], Personas.of({"a": PAD(beta=5)}))
    assert validate(pad_persona="a") == PAD(beta=5)
    del owners[0], owner
    gc.collect()
    assert validate(pad_persona="a") == PAD(beta=2)
