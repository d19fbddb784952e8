"""Whether a reward model fits a base model: configuration, tokenizer, vocabulary, positions.

What does not fit stops the start, in one paragraph that says what to change.
"""

from __future__ import annotations

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
        ValueError: it cannot be found or read.
    """
    try:
        return reward_model_config(
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


def load_tokenizers(
    config: PADConfig, tokenizer_args: dict[str, Any], base: ModelConfig
) -> tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None]:
    """The reward model's tokenizer, once it is known to be the base model's, and the one whose chat template renders
    the prompts: the base's, where it has a template. None where the engine runs without one (skip_tokenizer_init) and
    there is none.

    Raises:
        ValueError: there is none, or it is another.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(**tokenizer_args)
    except Exception as error:
        if base.skip_tokenizer_init:
            return None, None
        raise ValueError(f"pad.reward_model={config.reward_model!r}: no tokenizer: {one_paragraph(error)}") from error
    if not base.skip_tokenizer_init:
        try:
            renders = AutoTokenizer.from_pretrained(
                base.tokenizer, revision=base.tokenizer_revision, trust_remote_code=base.trust_remote_code
            )
            theirs = renders.get_vocab()
        except Exception as error:
            raise ValueError(
                f"pad: the base model's tokenizer {base.tokenizer!r} cannot be compared with the reward model's: "
                f"{one_paragraph(error)}"
            ) from error
        ours = tokenizer.get_vocab()
        if missing := [token for token, i in theirs.items() if ours.get(token) != i]:
            token = min(missing)
            raise ValueError(
                f"pad.reward_model={config.reward_model!r}: its tokenizer is not that of the base model "
                f"{base.model!r}: {token!r} is {theirs[token]} there and {ours.get(token)} here. PAD scores the "
                "base model's own tokens; take a reward model trained with the same tokenizer"
            )
        if getattr(renders, "chat_template", None):
            return tokenizer, renders
    return tokenizer, tokenizer


def check_vocabulary(reward_model: str, reward: int, base: int, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """How many token ids base and reward model share.

    The two may pad their embeddings differently; what lies beyond the tokenizer stands for no token.

    Raises:
        ValueError: the reward model has no row for some token.
    """
    needed = base if tokenizer is None else len(tokenizer)
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
