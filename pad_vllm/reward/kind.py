"""Check by its files, before anything is loaded, whether a reward model is a causal language model.

A sequence classifier, a bare backbone and a causal language model of one architecture have the same layers. What tells
them apart is the output head: in the names of tensors, and in what the configuration calls the model.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pad_vllm.errors import one_line
from pad_vllm.reading import read_json
from pad_vllm.reward.folder import files_beside
from pad_vllm.reward.heads import HEAD_FILES, RELEASED_HEAD

ADAPTER_CONFIG = "adapter_config.json"
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "consolidated.safetensors")
_OUTPUT_HEADS = re.compile(r"(^|\.)(\w*head|embed_out|output|output_layer)\.(\w*weight\w*|linear\.weight)$")
"""What architectures call the matrix from a hidden state to the vocabulary. Quantized ones have a ``qweight``."""
_SCORES = re.compile(r"(^|\.)(scores?|classifier|classification_head|regression_\w+|(value|reward|v)_head)\.")


def check_causal_lm(reward_model: str, revision: str | None = None, key: str = "pad.reward_model") -> None:
    """Raise ValueError for a folder or repository that is not a causal language model. The message says what it is and
    what to do. A model that cannot be found is left to the loader to report.

    Args:
        key: the setting that names it.
    """
    found = _what_it_is(reward_model, revision)
    if found is not None:
        raise ValueError(f"{key}={reward_model!r} is {found}")


def _what_it_is(reward_model: str, revision: str | None) -> str | None:
    folder = Path(reward_model)
    if _is_gguf(folder):
        return (
            "in GGUF, which is not read here. transformers reads it: AutoModelForCausalLM.from_pretrained(FOLDER, "
            "gguf_file=FILE), and the tokenizer in the same way; take quantization_config out of the model's config, "
            "save both into a folder with save_pretrained, and name that"
        )
    if folder.is_file():
        return "a file; name the folder in which the model, its config.json and its tokenizer are"
    config = _read(reward_model, revision, "config.json")
    adapter = adapter_config(reward_model, revision)
    if config is None and adapter is None:
        return None
    names = tensor_names(reward_model, revision)
    if adapter is not None and _is_adapter(config, names):
        base = adapter.get("base_model_name_or_path") or "the model it was trained on"
        return (
            f"an adapter ({ADAPTER_CONFIG}), which holds what training added to {base} and not that model itself; "
            f"`pad-vllm convert {reward_model} TARGET` merges the two into a reward model: name TARGET"
        )
    config = config or {}
    architectures = [str(name) for name in config.get("architectures") or ()]
    called = f" ({', '.join(architectures)})" if architectures else ""
    if any(name.startswith(RELEASED_HEAD) for name in names or ()):
        return (
            f"a checkpoint with a value head among its weights ({RELEASED_HEAD}); "
            f"`pad-vllm convert {reward_model} TARGET` splits it into the backbone and heads.safetensors: name TARGET"
        )
    classifies = any(re.search(r"Classification|RewardModel|Regression", name) for name in architectures)
    is_causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    scores = sorted(filter(_SCORES.search, names or ()))
    has_head = names is None or any(_OUTPUT_HEADS.search(name) for name in names.difference(scores))
    if classifies or (scores and not (has_head or is_causal)):
        seen = f", and its weights hold {scores[0]!r}" if scores else ""
        return (
            f"a classifier{called}{seen}: it gives a whole answer one score, and PAD needs a model that gives every "
            f"next token one. {_REMEDY}"
        )
    bare = architectures and all(re.search(r"(?<!LMHead)Model$", name) for name in architectures)
    if not has_head and (bare or not _is_tied(config)):
        return (
            f"a backbone without an output head{called}: none of its {len(names or ())} tensors is one, such as "
            f"lm_head.weight, so it gives no token a probability. {_REMEDY}"
        )
    return None


def adapter_config(model: str, revision: str | None = None) -> dict[str, Any] | None:
    """The configuration of a PEFT folder or repository; None if it is not one. Raises ValueError if the file is
    damaged."""
    return _read(model, revision, ADAPTER_CONFIG)


def is_adapter(model: str, revision: str | None = None) -> bool:
    """Whether a folder or repository is a PEFT adapter rather than a model."""
    if not isinstance(model, str) or adapter_config(model, revision) is None:
        return False
    config = _read(model, revision, "config.json")
    return _is_adapter(config, None if config is None else tensor_names(model, revision))


def _is_adapter(config: dict[str, Any] | None, names: frozenset[str] | None) -> bool:
    return config is None or (names is not None and all("lora_" in name for name in names))


_REMEDY = (
    "Name a causal language model, as AutoModelForCausalLM saves it: one tuned by DPO or by `pad-vllm train`, or any "
    "that reads preferences"
)


def tensor_names(model: str, revision: str | None) -> frozenset[str] | None:
    """Names of a model's tensors, but for those in files of value heads: by its index, or by its files. None where
    these do not say, or are not here: a repository's are not fetched for this.

    Raises:
        ValueError: a file is damaged.
    """
    if index := next(iter(files_beside(model, revision, _INDICES)), None):
        return frozenset(read_object(index).get("weight_map", {}))
    folder = Path(model)
    if folder.is_dir():
        files = [path for kind in ("safetensors", "bin") for path in sorted(folder.glob(f"*.{kind}"))]
    else:
        files = files_beside(model, revision, _WEIGHTS, local_files_only=True)
    files = [path for path in files if path.name not in (*HEAD_FILES, "training_args.bin")]
    try:
        return frozenset(name for path in files for name in _names_in(path)) if files else None
    except pickle.UnpicklingError:
        return None


def _names_in(path: Path) -> Iterator[str]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                yield from file.keys()
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read ({one_line(error)})") from None
        return
    try:
        yield from torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception as error:  # torch's older formats have no names without their tensors
        raise pickle.UnpicklingError(path) from error


def _is_gguf(path: Path) -> bool:
    if path.is_dir():
        return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors")) and not any(path.glob("*.bin"))
    return path.suffix == ".gguf"


def _is_tied(config: dict[str, Any]) -> bool:
    """Whether the output head is the embedding, and so in no file; where the file does not say, by the architecture."""
    for part in (config, config.get("text_config") or {}):
        if isinstance(tied := part.get("tie_word_embeddings"), bool):
            return tied
    return True


def _read(model: str, revision: str | None, name: str) -> dict[str, Any] | None:
    try:
        path = next(iter(files_beside(model, revision, (name,))), None)
    except (OSError, ValueError):  # no such model: loading it says so better
        return None
    return None if path is None else read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """What a JSON file says. Raises ValueError for a file that holds no JSON object."""
    try:
        read = read_json(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path}: must be an object, not {type(read).__name__}")
    return read
