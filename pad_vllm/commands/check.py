"""``pad-vllm check``: whether this installation could guide, and whether a configuration could start; without a GPU."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pad_vllm import internals, releases
from pad_vllm.channel import Announcement
from pad_vllm.config import PADConfig
from pad_vllm.frontend import admission


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a configuration: the path of a JSON or YAML file, or JSON")
    parser.add_argument("--model", help="a base model to hold the configured reward model against")
    parser.add_argument("--max-model-len", type=int, help="that the engine would have")
    parser.add_argument("--engine-args", type=json.loads, metavar="JSON", help="other arguments of the engine")


def run(**settings) -> int:
    return check(**settings)


def check(
    config: str | None, model: str | None, max_model_len: int | None, engine_args: Mapping[str, Any] | None = None
) -> int:
    """Print what is found, a line each.

    Args:
        config: path of a configuration file, or the configuration itself as JSON.
        model: a base model to hold the reward model against.
        max_model_len: that the engine would have.
        engine_args: other arguments of vLLM's engine.

    Returns:
        Exit status: 0 where guidance could start, 1 where it could not.
    """
    for key, value in {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}.items():
        os.environ.setdefault(key, value)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    report = Report()
    report.line("vLLM", check_vllm)
    report.line("internals", check_internals)
    report.line("device", describe_device)
    report.line("runner", describe_runner)
    if config is not None and (read := report.line("configuration", lambda: read_config(config))):
        report.line("reward model", lambda: check_files(read))
        if model is not None:
            report.line("base model", lambda: check_base(read, model, max_model_len, engine_args or {}))
    return report.status


class Report:
    """Lines of what was found; ``status`` becomes 1 with the first that failed."""

    def __init__(self) -> None:
        self.status = 0

    def line(self, topic: str, find: Callable[[], Any]) -> Any:
        """Print what ``find`` returns, or the error that it raises."""
        try:
            found = find()
        except Exception as error:
            known = isinstance(error, (ValueError, ImportError))
            self.status = 1
            print(f"FAILED  {topic}: {error if known else internals.one_line(error)}")
            return None
        shown = describe_config(found) if isinstance(found, PADConfig) else found
        print(f"ok      {topic}: {shown}")
        return found


def check_vllm() -> str:
    try:
        number = releases.version()
    except ImportError as error:
        raise ValueError(f"not installed ({error})") from None
    if not internals.is_tested(number):
        allowed = os.environ.get(internals.ALLOW_UNTESTED) == "1"
        words = f"{number}, and pad-vllm is tested with {' and '.join(releases.TESTED)}"
        if not allowed:
            raise ValueError(f"{words}; {internals.ALLOW_UNTESTED}=1 starts it all the same")
        return f"{words}; allowed by {internals.ALLOW_UNTESTED}"
    return number


def check_internals() -> str:
    if lost := list(internals.moved()):
        raise ValueError("moved: " + "".join(f"\n          {line}" for line in lost))
    return f"{len(internals.names())} names that pad-vllm binds to, all there"


def describe_device() -> str:
    import torch
    from vllm.platforms import current_platform

    from pad_vllm import kernels

    kind = current_platform.device_type
    name = current_platform.get_device_name() if kind == "cuda" else kind
    implementation = kernels.implementation(torch.device(kind or "cpu"))
    return f"{name}; torch {torch.__version__}; guidance kernels: {implementation}"


def describe_runner() -> str:
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    if envs.VLLM_USE_V2_MODEL_RUNNER is not None:
        return f"V{1 + envs.VLLM_USE_V2_MODEL_RUNNER}, by VLLM_USE_V2_MODEL_RUNNER"
    if not HAS_TRITON:
        return "V1: Triton has no back end for this device"
    return "V2, unless the engine asks for something that V2 does not support yet (vLLM's log then names it)"


def read_config(config: str) -> PADConfig:
    pad: Any = config
    if config.lstrip().startswith("{"):
        try:
            pad = json.loads(config)
        except ValueError as error:
            raise ValueError(f"{config!r} is not JSON: {error}") from None
    read = PADConfig.from_additional_config({"pad": pad})
    if read is None:
        raise ValueError("empty: pad would not be active")
    return read


def describe_config(config: PADConfig) -> str:
    given = {k: v for k, v in asdict(config).items() if v is not None and k not in ("personas", "prompt_template")}
    personas = "".join(
        f"\n          persona {name!r}: {', '.join(f'{k}={v!r}' for k, v in persona.extra_args().items())}"
        for name, persona in config.personas.items()
    )
    return ", ".join(f"{k}={v!r}" for k, v in given.items()) + personas


def check_files(config: PADConfig) -> str:
    """The reward model's configuration, tokenizer and heads, and the personas against them; no weights are loaded."""
    from transformers import AutoConfig, AutoTokenizer

    from pad_vllm.reward.heads import load_heads, locate_heads
    from pad_vllm.worker.compatibility import MAX_PREFERENCE_TOKENS, one_paragraph

    where = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        model_config = AutoConfig.from_pretrained(config.reward_model, **where).get_text_config()
        AutoTokenizer.from_pretrained(config.reward_model, **where)
    except Exception as error:
        raise ValueError(f"pad.reward_model={config.reward_model!r} cannot be read: {one_paragraph(error)}") from None
    check_weights_are_there(config.reward_model)
    check_model_config(config)
    heads_path = locate_heads(config.heads, config.reward_model, config.revision)
    head_names: tuple[str, ...] = ()
    if heads_path:
        import torch

        try:
            head_names = load_heads(heads_path, model_config.hidden_size, torch.device("cpu")).names
        except Exception as error:
            raise ValueError(f"pad.heads: {heads_path} cannot be read: {one_paragraph(error)}") from None
    accepts = Announcement(
        configured=True,
        personas=tuple(config.personas),
        head_names=head_names,
        max_top_k=config.max_top_k,
        max_preference_tokens=MAX_PREFERENCE_TOKENS,
        tokenizer={"pretrained_model_name_or_path": config.reward_model} | where,
        prompt_template=config.prompt_template,
    )
    for name, persona in config.personas.items():
        try:
            admission.check(accepts, persona)
        except ValueError as error:
            raise ValueError(f"pad.personas[{name!r}]: {error}") from None
    return f"{model_config.model_type}, {model_config.vocab_size:,} tokens; heads: {', '.join(head_names) or 'none'}"


def check_weights_are_there(reward_model: str) -> None:
    folder = Path(reward_model)
    if folder.is_dir() and not any(any(folder.glob(f"*.{kind}")) for kind in ("safetensors", "bin", "pt")):
        raise ValueError(f"pad.reward_model={reward_model!r}: no weights in this folder")


def check_model_config(config: PADConfig) -> None:
    """The reward model as vLLM would configure it, whatever base it stands beside."""
    from vllm.engine.arg_utils import EngineArgs

    from pad_vllm.worker.compatibility import load_model_config, one_paragraph

    try:
        with contextlib.redirect_stdout(None):
            alone = EngineArgs(
                config.reward_model, revision=config.revision, trust_remote_code=config.trust_remote_code
            ).create_model_config()
    except Exception as error:
        raise ValueError(f"pad.reward_model={config.reward_model!r} cannot be loaded: {one_paragraph(error)}") from None
    load_model_config(config, alone)


def check_base(config: PADConfig, model: str, max_model_len: int | None, engine_args: Mapping[str, Any]) -> str:
    """What the start of an engine would check before it loads weights."""
    from vllm.engine.arg_utils import EngineArgs

    from pad_vllm.reward.backend import derive_vllm_config
    from pad_vllm.reward.folder import locate_defaults
    from pad_vllm.reward.heads import tensor_names_beside
    from pad_vllm.reward.template import PromptTemplate
    from pad_vllm.worker.compatibility import (
        beta_warning,
        check_vocabulary,
        fit_context,
        load_model_config,
        load_tokenizer,
        one_paragraph,
    )
    from pad_vllm.worker.engine_checks import check_engine

    arguments = {"logits_processors": ["pad_vllm:PADLogitsProcessor"], "max_model_len": max_model_len, **engine_args}
    try:
        with contextlib.redirect_stdout(None):
            engine = EngineArgs(model=model, **arguments).create_engine_config()
    except Exception as error:
        raise ValueError(f"{model!r} cannot be read: {internals.one_line(error)}") from None
    check_engine(engine, engine.use_v2_model_runner)
    base = engine.model_config
    reward = load_model_config(config, base)
    where = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    tokenizer_args = {"pretrained_model_name_or_path": config.reward_model} | where
    tokens = load_tokenizer(config, tokenizer_args, base, reward.get_vocab_size())
    tokenizer = tokens.tokenizer
    check_vocabulary(config.reward_model, reward.get_vocab_size(), base.get_vocab_size(), tokens)
    template = None
    if tokenizer is not None:
        template = PromptTemplate(tokenizer, config.prompt_template, config.insert_after, tokens.chat_tokenizer)
    room = fit_context(config, reward, base.max_model_len, template)
    for name, persona in config.personas.items():
        if template is not None and persona.preference is not None:
            template.max_preference_tokens = room
            try:
                template.encode_preference(persona.preference)
            except ValueError as error:
                raise ValueError(f"pad.personas[{name!r}]: {error}") from None
    try:
        derive_vllm_config(engine, reward, engine.scheduler_config.max_num_batched_tokens)
    except Exception as error:
        raise ValueError(f"pad.reward_model={config.reward_model!r} cannot be loaded: {one_paragraph(error)}") from None
    is_trained = any(find(config.reward_model, config.revision) for find in (locate_defaults, tensor_names_beside))
    warning = beta_warning(config, reward, base, is_trained)
    layers = reward.get_num_layers(engine.parallel_config) * reward.get_num_kv_heads(engine.parallel_config)
    one_context = reward.max_model_len * layers * reward.get_head_size() * 2 * reward.dtype.itemsize
    if config.kv_cache_memory_bytes is not None and config.kv_cache_memory_bytes < one_context:
        raise ValueError(
            f"pad.kv_cache_memory_bytes={config.kv_cache_memory_bytes}: one context of {reward.max_model_len} tokens "
            f"takes {one_context} bytes of the reward model's KV cache"
        )
    return (
        f"{Path(model).name}: {tokens}; runner V{1 + engine.use_v2_model_runner}; {base.max_model_len:,} tokens of "
        f"context, and preferences of up to {room:,}"
        + (f"\n          the reward model reads: {template.example(config.example_preference)!r}" if template else "")
        + (f"\n          warning: {warning}" if warning else "")
    )
