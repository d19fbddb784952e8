"""Whether a reward model fits a base model: configuration, tokenizer, vocabulary, positions.

What does not fit stops the start, in one paragraph that says what to change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vllm.config import ModelConfig

from pad_vllm.config import PADConfig
from pad_vllm.reward.backend import reward_model_config
from pad_vllm.reward.folder import DEFAULTS_FILE
from pad_vllm.reward.template import PromptTemplate

MAX_PREFERENCE_TOKENS = 1024
"""No longer than this, whatever the reward model could hold: a preference is a text, not a document."""
MIN_PREFERENCE_TOKENS = 16
MUCH_SMALLER = 8
"""How many times smaller than the base a reward model is that should not choose alone."""


def load_model_config(config: PADConfig, base: ModelConfig) -> ModelConfig:
    """The reward model's ModelConfig.

    Raises:
        ValueError: it cannot be found or read, or its architecture cannot be a reward model.
    """
    try:
        model_config = reward_model_config(
            base,
            model=config.reward_model,
            revision=config.revision,
            quantization=config.quantization,
            trust_remote_code=config.trust_remote_code,
            **({"dtype": config.dtype} if config.dtype else {}),
        )
    except Exception as error:
        raise ValueError(
            f"pad.reward_model={config.reward_model!r} cannot be loaded: {one_paragraph(error)}"
        ) from error
    check_architecture(config.reward_model, model_config)
    return model_config


def check_architecture(reward_model: str, model_config: ModelConfig) -> None:
    """Raise ValueError for an architecture that cannot be a reward model. docs/reward-models.md lists them."""
    refused = {
        "its layers, or some, keep a recurrent state, which cannot be shared by blocks of tokens": (
            model_config.is_attention_free or model_config.is_hybrid
        ),
        "it has an encoder beside its decoder, and the reward model reads one sequence": (
            model_config.is_encoder_decoder
        ),
        "it attends within chunks of a sequence, and PAD's block table has no such layers": (
            model_config.attention_chunk_size is not None
        ),
    }
    for reason, holds in refused.items():
        if holds:
            raise ValueError(
                f"pad.reward_model={reward_model!r}: {', '.join(model_config.architectures)} cannot be a reward model: "
                f"{reason}"
            )


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
        raise ValueError(f"pad.reward_model={config.reward_model!r}: no tokenizer: {one_paragraph(error)}") from error
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
            f"{one_paragraph(error)}"
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


def fit_context(
    config: PADConfig, model_config: ModelConfig, base_max_model_len: int, template: PromptTemplate | None
) -> int:
    """Size the reward model's context, and return how many tokens a preference may take of it.

    Raises:
        ValueError: it has too few positions; with the numbers.
    """
    added = template.num_added_tokens("") + template.num_seam_tokens if template else 0
    room = model_config.max_model_len - base_max_model_len - added
    if room < (MIN_PREFERENCE_TOKENS if template else 0):
        raise ValueError(
            f"pad.reward_model={config.reward_model!r}: its {model_config.max_model_len} positions do not "
            f"hold the engine's max_model_len of {base_max_model_len}, {added} tokens of prompt_template and "
            f"{MIN_PREFERENCE_TOKENS} or more of a preference; lower --max-model-len to "
            f"{max(model_config.max_model_len - added - MIN_PREFERENCE_TOKENS, 0)} or less"
        )
    preference = min(room, MAX_PREFERENCE_TOKENS) if template else 0
    model_config.max_model_len = base_max_model_len + added + preference
    return preference


def beta_warning(config: PADConfig, reward: ModelConfig, base: ModelConfig, is_trained: bool) -> str | None:
    """What to tell an operator whose default beta leaves too much to the reward model; None where it does not.

    ``is_trained``: something beside the reward model says that it was trained for this.
    """
    if config.reference != "base" or config.beta < 1:
        return None
    doubts = [] if is_trained else [f"nothing beside it says that it was trained for this ({DEFAULTS_FILE}, heads)"]
    sizes = [_body_size(model) for model in (base, reward)]
    if min(sizes) > 0 and sizes[0] >= MUCH_SMALLER * sizes[1]:
        doubts.append(f"it is about {sizes[0] / sizes[1]:.0f} times smaller than the base model")
    if not doubts:
        return None
    return (
        f"With pad.reference 'base' and pad.beta {config.beta:g} the reward model alone, {config.reward_model!r}, "
        f"chooses among the base model's candidates, and {' and '.join(doubts)}: answers may lose what the base model "
        "knows. Compare them with those at a pad.beta of 0.3 to 0.8."
    )


def _body_size(model: ModelConfig) -> int:
    """What the number of a transformer's weights grows with, embeddings apart."""
    layers = getattr(model.hf_text_config, "num_hidden_layers", None)
    return layers * model.get_hidden_size() ** 2 if isinstance(layers, int) else 0


def one_paragraph(error: Exception) -> str:
    """An error's own words, without the frame that pydantic puts around them."""
    words = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    return " ".join(words.split())
