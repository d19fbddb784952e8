"""Models from folders: whatever is wrong with one is a ValueError that names it."""

from __future__ import annotations

import os
from types import ModuleType
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pad_vllm.errors import one_line
from pad_vllm.reward.kind import check_causal_lm
from pad_vllm.reward.source import SERVED, Source

if TYPE_CHECKING:
    from peft import PeftModel


def load_causal_lm(key: str, path: str) -> PreTrainedModel:
    """A causal language model. Raises ValueError if it cannot be loaded or is another kind of model; transformers
    would give a classifier a new output head with random weights."""
    check_causal_lm(path, key=key)
    try:
        return AutoModelForCausalLM.from_pretrained(path)
    except Exception as error:  # of a damaged or an incomplete folder: libraries raise what they like
        raise ValueError(f"{key}={path!r} cannot be loaded: {one_line(error)}") from error


def load_source(key: str, source: Source) -> PreTrainedModel:
    """A reward model. One that is an adapter is merged into the model that it was made for.

    Raises:
        ValueError: it cannot be loaded, or it is ``base``, the served model, while no model is served here.
    """
    if source.model == SERVED:
        raise ValueError(f"{key}={SERVED!r}: no model is served here; give the path or hub id of the model")
    if not source.is_adapter:
        return load_causal_lm(key, source.model)
    return load_merged(key, source.reward_model, source.model)


def load_merged(key: str, adapter: str, base: str) -> PreTrainedModel:
    """The model ``base`` with a PEFT adapter merged into it.

    Raises:
        ValueError: one of the two cannot be loaded, or they do not fit.
    """
    model = load_causal_lm(f"{key}={adapter!r}: its base_model_name_or_path", base)
    try:
        num_tokens = len(AutoTokenizer.from_pretrained(adapter)) if has_tokenizer(adapter) else 0
        if num_tokens > model.get_input_embeddings().weight.shape[0]:  # training added some
            model.resize_token_embeddings(num_tokens)
        return adapted(model, adapter).merge_and_unload()
    except Exception as error:
        raise ValueError(f"{key}={adapter!r}: the adapter cannot be merged into {base}: {one_line(error)}") from error


def adapted(model: PreTrainedModel, adapter: str, is_trainable: bool = False) -> PeftModel:
    """A model with a PEFT adapter. Raises ValueError unless all that the adapter changes is there, and has its size."""
    found = import_peft().PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable)
    # Once more, since only this says what was left out.
    check_keys(found.load_adapter(adapter, found.active_adapter, is_trainable=is_trainable))
    return found


def check_keys(loaded: Any) -> None:
    """Raise ValueError where an adapter has weights for other layers: PEFT leaves them out."""
    if strange := [*loaded.unexpected_keys, *loaded.missing_keys]:
        raise ValueError(f"it does not have the same layers as the model, for example {strange[0]}")


def import_peft() -> ModuleType:
    """Raises ValueError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise ValueError("a LoRA takes `pip install 'pad-vllm[train]'`") from None
    return peft


def has_tokenizer(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, "tokenizer_config.json"))


def load_tokenizer(key: str, path: str) -> PreTrainedTokenizerBase:
    """Raises ValueError for one that cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise ValueError(f"{key}={path!r}: its tokenizer cannot be loaded: {one_line(error)}") from error
