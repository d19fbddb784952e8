"""Models from folders: whatever is wrong with one is a ValueError that names it."""

from __future__ import annotations

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pad_vllm.errors import one_line
from pad_vllm.reward.kind import check_causal_lm


def load_causal_lm(key: str, path: str) -> PreTrainedModel:
    """A causal language model. Raises ValueError for one that cannot be loaded, or is none: transformers would give a
    classifier a new output head, of random numbers."""
    check_causal_lm(path, key=key)
    try:
        return AutoModelForCausalLM.from_pretrained(path)
    except Exception as error:  # of a damaged or an incomplete folder: libraries raise what they like
        raise ValueError(f"{key}={path!r} cannot be loaded: {one_line(error)}") from error


def load_tokenizer(key: str, path: str) -> PreTrainedTokenizerBase:
    """Raises ValueError for one that cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:
        raise ValueError(f"{key}={path!r}: its tokenizer cannot be loaded: {one_line(error)}") from error
