"""Whether base and reward model have the same tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vllm.config import ModelConfig

from pad_vllm.config import PADConfig
from pad_vllm.errors import one_line


@dataclass(frozen=True)
class SharedTokens:
    """The reward model's tokenizer, and what it does not share with the base model's."""

    tokenizer: PreTrainedTokenizerBase | None
    """None where the engine runs without one (skip_tokenizer_init) and there is none."""
    foreign: dict[int, str] = field(default_factory=dict)
    """Added and special tokens of the base model without a counterpart: never candidates."""
    chat_tokenizer: PreTrainedTokenizerBase | None = None
    """The one whose chat template renders the prompts: the base's, where it has a template."""

    def __str__(self) -> str:
        shown = ", ".join(f"{token!r} ({i})" for i, token in list(self.foreign.items())[:20])
        more = f" and {len(self.foreign) - 20} more" if len(self.foreign) > 20 else ""
        return f"same tokens but {shown}{more}" if shown else "same tokens"


def load_tokenizer(config: PADConfig, tokenizer_args: dict[str, Any], base: ModelConfig, num_rows: int) -> SharedTokens:
    """The reward model's tokenizer, once it is known to be the base model's.

    Ordinary tokens must be the same. Added and special ones differ between members of a family, and a token that the
    reward model does not know is no candidate.

    Args:
        num_rows: of the reward model's output head.

    Raises:
        ValueError: there is none, it is another, or guided requests could never end.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(**tokenizer_args)
    except Exception as error:
        if base.skip_tokenizer_init:
            return SharedTokens(None)
        raise ValueError(f"pad.reward_model={config.reward_model!r}: no tokenizer: {one_line(error)}") from error
    if base.skip_tokenizer_init:
        return SharedTokens(tokenizer, chat_tokenizer=tokenizer)
    try:
        theirs = AutoTokenizer.from_pretrained(
            base.tokenizer, revision=base.tokenizer_revision, trust_remote_code=base.trust_remote_code
        )
        vocabulary = theirs.get_vocab()
    except Exception as error:
        raise ValueError(
            f"pad: the base model's tokenizer {base.tokenizer!r} cannot be compared with the reward model's: "
            f"{one_line(error)}"
        ) from error
    ours, added = tokenizer.get_vocab(), added_ids(theirs)
    if missing := [token for token, i in vocabulary.items() if i not in added and ours.get(token) != i]:
        token = min(missing)
        raise ValueError(
            f"pad.reward_model={config.reward_model!r}: its tokenizer is not that of the base model "
            f"{base.model!r}: {token!r} is {vocabulary[token]} there and {ours.get(token)} here. PAD scores the "
            "base model's own tokens; take a reward model trained with the same tokenizer"
        )
    roles, their_roles = token_roles(tokenizer), token_roles(theirs)
    foreign = {
        i: token
        for token, i in sorted(vocabulary.items(), key=lambda item: item[1])
        if i in added
        and (i >= num_rows or not (ours.get(token) == i or roles.get(i, set()) & their_roles.get(i, set())))
    }
    ends = end_ids(base, theirs)
    if ends and ends <= foreign.keys():
        raise ValueError(
            f"pad.reward_model={config.reward_model!r}: it has none of the base model's end tokens "
            f"({', '.join(f'{foreign[i]!r} ({i})' for i in sorted(ends))}), so a guided request would never end; take "
            "a reward model with the same end of turn"
        )
    has_template = bool(getattr(theirs, "chat_template", None))
    return SharedTokens(tokenizer, foreign, theirs if has_template else tokenizer)


def added_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of a tokenizer's added and special tokens."""
    return set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)


def token_roles(tokenizer: PreTrainedTokenizerBase) -> dict[int, set[str]]:
    """What special tokens are for: id -> ``eos_token``, ``pad_token`` and the like."""
    roles: dict[int, set[str]] = {}
    for role, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str):  # extra special tokens are a list, and for anything
            roles.setdefault(tokenizer.convert_tokens_to_ids(token), set()).add(role)
    return roles


def end_ids(base: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end the base model's answers: its tokenizer's, and its generation config's."""
    configured = (base.try_get_generation_config() or {}).get("eos_token_id")
    configured = configured if isinstance(configured, list) else [configured]
    return {i for i in (*configured, tokenizer.eos_token_id) if isinstance(i, int)}


def check_vocabulary(reward_model: str, reward: int, base: int, tokens: SharedTokens) -> int:
    """How many token ids base and reward model share; of these, ``tokens.foreign`` are not the same.

    The two may pad their embeddings differently; what lies beyond the tokenizer stands for no token.

    Raises:
        ValueError: the reward model has no row for some ordinary token.
    """
    needed = base
    if tokens.tokenizer is not None:
        added = added_ids(tokens.tokenizer)
        needed = 1 + max((i for i in tokens.tokenizer.get_vocab().values() if i not in added), default=-1)
    if reward < needed:
        raise ValueError(
            f"pad.reward_model={reward_model!r}: a vocabulary of {reward}, and {needed} tokens to score; PAD scores "
            "the base model's own tokens, so the reward model needs a row for each"
        )
    return min(reward, base)
