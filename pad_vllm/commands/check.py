"""``pad-vllm check``: check whether this installation can guide and a configuration can start. It needs no GPU."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pad_vllm import __version__, internals, releases
from pad_vllm.checks import shown
from pad_vllm.config import PADConfig
from pad_vllm.errors import one_line
from pad_vllm.reading import json_object, read_json
from pad_vllm.reward.source import SERVED

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="the server's pad configuration: a JSON or YAML file, or JSON itself")
    parser.add_argument("--model", help="a base model; checks that the configured reward model fits it")
    parser.add_argument("--max-model-len", type=int, help="of the engine, as vLLM's option")
    parser.add_argument("--engine-args", metavar="JSON", help="further arguments of vLLM's engine")


def run(engine_args: str | None, **settings) -> int:
    arguments = None if engine_args is None else json_object("--engine-args", engine_args)
    return print_report(**settings, engine_args=arguments)


def print_report(
    config: str | None, model: str | None, max_model_len: int | None, engine_args: Mapping[str, Any] | None = None
) -> int:
    """Print what is found, a line each.

    Args:
        config: path of a configuration file, or the configuration itself as JSON.
        model: a base model; checks that the reward model fits it.
        max_model_len: of the engine.
        engine_args: further arguments of vLLM's engine.

    Returns:
        Exit status: 0 if guidance can start, 1 if it cannot.

    Raises:
        ValueError: there is a model, and no configuration to hold against it.
    """
    if config is None and model is not None:
        raise ValueError(f"--model={model!r}: checks that a configuration fits a model; give the configuration too")
    for key, value in {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}.items():
        os.environ.setdefault(key, value)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    report = Report()
    report.line("pad-vllm", lambda: f"{__version__}; Python {platform.python_version()}")
    report.line("vLLM", check_vllm)
    report.line("internals", check_internals)
    report.line("device", describe_device)
    report.line("runner", describe_runner)
    if config is None:
        return report.status
    engine: VllmConfig | ValueError | None = None
    if model is not None:
        try:
            engine = base_engine(model, max_model_len, engine_args or {})
        except ValueError as error:
            engine = error
    base = None if engine is None or isinstance(engine, ValueError) else engine.model_config
    if read := report.line("configuration", lambda: read_pad_config(config, base)):
        report.line("reward model", lambda: check_files(read))
        if engine is not None:
            report.line("base model", lambda: check_base(read, engine))
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
            print(f"FAILED  {topic}: {error if known else one_line(error)}")
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
        words = f"{number}, but pad-vllm is tested with {' and '.join(releases.TESTED)}"
        if not allowed:
            raise ValueError(f"{words}; set {internals.ALLOW_UNTESTED}=1 to start anyway")
        return f"{words}; allowed by {internals.ALLOW_UNTESTED}"
    return number


def check_internals() -> str:
    if lost := list(internals.moved()):
        raise ValueError("moved: " + "".join(f"\n          {line}" for line in lost))
    return f"all {len(internals.names())} names that pad-vllm uses are there"


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
    return "V2, unless the engine uses something that V2 does not support yet (vLLM's log then names it)"


def read_pad_config(config: str, base: ModelConfig | None = None) -> PADConfig:
    """The configuration for a server of ``base``, if that is known; the reward model may be ``base`` itself."""
    pad: Any = config
    if config.lstrip().startswith("{"):
        try:
            pad = read_json(config)
        except ValueError as error:
            raise ValueError(f"{shown(config)} is not JSON: {error}") from None
    read = PADConfig.from_additional_config({"pad": pad}, base)
    if read is None:
        raise ValueError("the configuration is empty, so pad would not be active")
    return read


def describe_config(config: PADConfig) -> str:
    apart = ("personas", "prompt_template", "reference", "why_reference", "source", "personas_file")
    given = {k: v for k, v in asdict(config).items() if v not in (None, {}) and k not in apart}
    given["reference"] = f"{config.reference} ({config.why_reference})"
    personas = "".join(
        f"\n          persona {name!r}: {', '.join(f'{k}={v!r}' for k, v in persona.extra_args().items())}"
        for name, persona in config.personas.items()
    )
    return ", ".join(f"{k}={v!r}" for k, v in given.items()) + personas


def check_files(config: PADConfig) -> str:
    """Check the reward model and its adapters as if beside a base model of the same kind; loads no weights."""
    from transformers import AutoConfig, AutoTokenizer

    from pad_vllm.reward.kind import check_causal_lm
    from pad_vllm.worker.compatibility import check_fit, read_weights

    source, adapters = config.source, f"; adapters: {', '.join(config.adapters)}" if config.adapters else ""
    if source.is_served:
        read_weights(config)
        own = f", through the adapter {config.reward_model}" if source.is_adapter else ""
        more = "; give --model to check it" if source.model == SERVED else ""
        return f"the served model itself{own}{adapters}{more}"
    check_causal_lm(source.model, source.model_revision)
    named = f"pad.reward_model={config.reward_model!r}" + (f", made for {source.model!r}," if source.is_adapter else "")
    where = {"revision": source.model_revision, "trust_remote_code": config.trust_remote_code}
    tokenizer, revision = source.tokenizer
    try:
        model_config = AutoConfig.from_pretrained(source.model, **where).get_text_config()
        AutoTokenizer.from_pretrained(tokenizer, **where | {"revision": revision})
    except Exception as error:
        raise ValueError(f"{named} cannot be read: {one_line(error)}") from None
    for folder in {config.reward_model, source.model}:
        check_weights_are_there(folder)
    try:
        alone = engine_config(source.model, where | {"tokenizer": tokenizer})
    except Exception as error:
        raise ValueError(f"{named} cannot be loaded: {one_line(error)}") from None
    alone.model_config.max_model_len = 1  # all its positions but one are left for a preference
    fits = check_fit(config, alone)
    heads = ", ".join(fits.head_names) or "none"
    kind = f"an adapter for {source.model}: " if source.is_adapter else ""
    return f"{kind}{model_config.model_type}, {model_config.vocab_size:,} tokens; heads: {heads}{adapters}"


def check_weights_are_there(reward_model: str) -> None:
    folder = Path(reward_model)
    if folder.is_dir() and not any(any(folder.glob(f"*.{kind}")) for kind in ("safetensors", "bin", "pt")):
        raise ValueError(f"pad.reward_model={reward_model!r}: no weights in this folder")


def engine_config(model: str, arguments: Mapping[str, Any]) -> VllmConfig:
    from vllm.engine.arg_utils import EngineArgs

    with contextlib.redirect_stdout(None):
        return EngineArgs(model=model, **arguments).create_engine_config()


def base_engine(model: str, max_model_len: int | None, engine_args: Mapping[str, Any]) -> VllmConfig:
    """The configuration of an engine that serves a model. Raises ValueError if there is no such model."""
    arguments = {"logits_processors": ["pad_vllm:PADLogitsProcessor"], "max_model_len": max_model_len, **engine_args}
    try:
        return engine_config(model, arguments)
    except Exception as error:
        raise ValueError(f"{model!r} cannot be read: {one_line(error)}") from None


def check_base(config: PADConfig, engine: VllmConfig | ValueError) -> str:
    """Run the checks that an engine's start runs before it loads weights, by the same function."""
    from pad_vllm.worker.compatibility import check_fit
    from pad_vllm.worker.engine_checks import check_engine

    if isinstance(engine, ValueError):
        raise engine
    model = engine.model_config.model
    check_engine(engine, engine.use_v2_model_runner)
    fits = check_fit(config, engine)
    example = fits.example()
    shares = "the reward model shares its weights; " if config.source.is_served else ""
    return (
        f"{Path(model).name}: {shares}{fits.tokens}; runner V{1 + engine.use_v2_model_runner}; "
        f"{engine.model_config.max_model_len:,} tokens of context, and preferences of up to "
        f"{fits.max_preference_tokens:,}"
        + (
            f"; a guided request has room for {fits.shortage:,} fewer, and for its preference fewer again"
            if fits.shortage
            else ""
        )
        + (f"\n          the reward model reads: {example!r}" if example else "")
        + (f"\n          warning: {fits.warning}" if fits.warning else "")
    )
