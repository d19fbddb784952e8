"""Whether a reward model fits a base model: configuration, tokens, positions, heads, personas.

:func:`check_fit` is the one definition: the start loads what it returns, and ``pad-vllm check`` prints it. What does
not fit stops the start, in one paragraph that says what to change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from vllm.config import LoRAConfig, ModelConfig, VllmConfig

from pad_vllm.checks import shown
from pad_vllm.config import PADConfig
from pad_vllm.errors import one_line
from pad_vllm.params import MAX_PREFERENCE_TOKENS, PAD, GuidanceParams, check_adapters, check_weights
from pad_vllm.personas import Personas
from pad_vllm.reward.adapters import NO_ADAPTER, AdapterFolder, lora_config, read_folder
from pad_vllm.reward.derive import derive_vllm_config, reward_model_config, served_model_config
from pad_vllm.reward.folder import DEFAULTS_FILE, locate_defaults
from pad_vllm.reward.heads import ValueHeads, load_heads, locate_heads, tensor_names_beside
from pad_vllm.reward.kind import check_causal_lm
from pad_vllm.reward.memory import TYPICAL_PREFERENCE, TypicalContext
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.worker.tokens import SharedTokens, check_vocabulary, load_shared_tokens

DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
MIN_PREFERENCE_TOKENS = 16
MUCH_SMALLER = 8
"""A reward model so many times smaller than the base should not choose the token alone."""


class Weights(NamedTuple):
    """What is loaded of a reward model."""

    not_backbone: frozenset[str]
    """Tensors in its folder that are not its backbone's."""
    adapters: tuple[AdapterFolder, ...]
    """That contexts are read through: those that requests name, or the one that the reward model is, over the served
    model."""
    merged: AdapterFolder | None = None
    """The adapter that the reward model is, merged into the model that it was made for."""


@dataclass(frozen=True)
class Fit:
    """A reward model that fits an engine's base model."""

    config: PADConfig
    vllm_config: VllmConfig
    """The reward model's own, its ``max_model_len`` the longest context that it must hold."""
    tokens: SharedTokens
    tokenizer_args: dict[str, Any]
    """Of ``AutoTokenizer.from_pretrained``."""
    vocab_size: int
    """Of :func:`~pad_vllm.worker.tokens.check_vocabulary`."""
    template: PromptTemplate | None
    """None where the engine runs without a tokenizer: then there are no text preferences."""
    shortage: int
    """Tokens, those of its preference apart, that a guided request has less than the engine's ``max_model_len``."""
    heads: ValueHeads | None
    """On the host."""
    weights: Weights
    warning: str | None
    neutral_is_base: bool = False
    """Whether the reward model without a preference gives the base model's logits: the two are one model, and read the
    same tokens. The neutral reference then takes no context."""

    @property
    def model_config(self) -> ModelConfig:
        return self.vllm_config.model_config

    @property
    def max_preference_tokens(self) -> int:
        return 0 if self.template is None else self.template.max_preference_tokens or 0

    @property
    def head_names(self) -> tuple[str, ...]:
        return self.heads.names if self.heads else ()

    def adapter_number(self, name: str | None) -> int:
        """Which adapter a context is read through. Raises ValueError for a name that there is not."""
        if name is None:
            return 0 if self.config.source.is_adapter and self.weights.adapters else NO_ADAPTER
        check_adapters((name,), self.config.adapters)
        return list(self.config.adapters).index(name)

    def example(self) -> str | None:
        """What the reward model reads of a question under a preference, as text; with its translation, where it has
        another tokenizer."""
        if self.template is None:
            return None
        pair, preference = self.tokens.pair, self.config.example_preference
        return self.template.example(preference, None if pair is None else pair.translator)

    def typical_context(self, base_max_model_len: int) -> TypicalContext:
        """Of most requests. Those that ask for nothing share the default persona's preference."""
        num_own = 0
        if self.template is not None and self.config.default_persona is None:
            num_own = self.template.num_added_tokens("") + min(TYPICAL_PREFERENCE, self.max_preference_tokens)
        pair = self.tokens.pair
        return TypicalContext(base_max_model_len, 1.0 if pair is None else pair.stretch, num_own)

    def resolve(self, asked: PAD | None, admitted: PAD | None = None) -> GuidanceParams | None:
        """A request's guidance, or None where it asks for none. As :meth:`PADConfig.resolve`.

        Raises:
            ValueError: this engine cannot do it; the frontend refuses such a request before it gets to an engine.
        """
        params = self.config.resolve(asked, admitted)
        if params is None:
            return None
        if params.weights is not None:
            check_weights(params.weights, self.head_names)
        if params.preferences:
            if self.template is None:
                raise ValueError("pad_preference: the engine has no tokenizer (skip_tokenizer_init)")
            self.template.check_preferences(tuple(dict.fromkeys(params.preferences)))
        if self.neutral_is_base and params.reference == "neutral":
            params = replace(params, reference="base")
        return params.as_read()

    def check_personas(self) -> None:
        """Raise ValueError for a persona that this engine cannot guide by."""
        for name in self.config.personas:
            try:
                self.resolve(PAD(persona=name))
            except ValueError as error:
                raise ValueError(f"pad.personas[{name!r}]: {error}") from None

    def personas(self) -> Personas:
        """As frontends are shown them."""
        return Personas.of(self.config.personas)

    def on_another_thread(self) -> Fit:
        """The same, with a tokenizer of its own to check personas by."""
        return self if self.template is None else replace(self, template=self.template.on_another_thread())

    def with_personas(self, personas: Any) -> Fit:
        """The same with other personas, as a file says them. Raises ValueError for what cannot be."""
        if not isinstance(personas, Mapping):
            raise ValueError(f"pad.personas={shown(personas)}: must be an object of name -> request arguments")
        config = replace(self.config, personas=personas)
        fits = replace(self, config=config)
        fits.check_personas()
        return fits


def check_fit(config: PADConfig, vllm_config: VllmConfig, sees_base_logits: bool = False) -> Fit:
    """Hold a configured reward model against an engine; reads its files, and no weights but the value heads.

    Args:
        sees_base_logits: nothing but the request's own controls has changed the logits that PAD sees.

    Raises:
        ValueError: what does not fit, and what to change.
    """
    base, source = vllm_config.model_config, config.source
    model_config = load_model_config(config, base)
    tokenizer, revision = (base.tokenizer, base.tokenizer_revision) if source.is_served else source.tokenizer
    tokenizer_args = {
        "pretrained_model_name_or_path": tokenizer,
        "revision": revision,
        "trust_remote_code": config.trust_remote_code,
    }
    num_rows = model_config.get_vocab_size()
    reasoning = reasoning_ids(vllm_config)
    tokens = load_shared_tokens(config, tokenizer_args, base, model_config, num_rows, reasoning)
    vocab_size = check_vocabulary(config.reward_model, num_rows, base.get_vocab_size(), tokens)
    template = None
    if tokens.tokenizer is not None:
        template = PromptTemplate(tokens.tokenizer, config.prompt_template, config.insert_after, tokens.chat_tokenizer)
        if config.chat == "strict":
            check_chat(config, template, tokens)
    stretch = 1.0 if tokens.pair is None else tokens.pair.stretch
    max_preference_tokens, shortage = fit_context(config, model_config, base.max_model_len, template, stretch)
    if template is not None:
        template.max_preference_tokens = max_preference_tokens
    heads, weights = read_heads(config, model_config), read_weights(config)
    lora = lora_config(weights.adapters, model_config)
    is_trained = heads is not None or locate_defaults(source.reward_model, source.revision) is not None
    fits = Fit(
        config,
        derive(config, vllm_config, model_config, tokens, lora),
        tokens,
        tokenizer_args,
        vocab_size,
        template,
        shortage,
        heads,
        weights,
        beta_warning(config, model_config, base, is_trained),
        source.is_served and not source.is_adapter and sees_base_logits and vllm_config.lora_config is None,
    )
    check_kv_cache(fits)
    fits.check_personas()
    return fits


def read_weights(config: PADConfig) -> Weights:
    """Read which there are. Raises ValueError for an adapter that vLLM refuses."""
    source = config.source
    not_backbone = tensor_names_beside(source.model, source.model_revision)
    named = tuple(read_folder(f"pad.adapters[{name!r}]", path) for name, path in config.adapters.items())
    if not source.is_adapter:
        return Weights(not_backbone, named)
    own = read_folder("pad.reward_model", source.reward_model, is_merged=not source.is_served)
    return Weights(not_backbone, (own,)) if source.is_served else Weights(not_backbone, named, own)


def check_chat(config: PADConfig, template: PromptTemplate, tokens: SharedTokens) -> None:
    """Raise ValueError if prompts must be understood (``strict``), but the chat template's messages cannot be found."""
    tokenizers = [tokens.chat_tokenizer] if tokens.pair is None else [tokens.pair.translator.base.tokenizer]
    has_template = any(getattr(tokenizer, "chat_template", None) for tokenizer in tokenizers)
    is_lost = template.chat is None if tokens.pair is None else tokens.pair.translator.structure is None
    if has_template and is_lost and not config.insert_after:
        raise ValueError(
            "pad.chat='strict': PAD cannot find where the base model's chat template puts messages; set "
            "pad.insert_after, or set pad.chat to 'auto'"
        )


def reasoning_ids(vllm_config: VllmConfig) -> set[int]:
    """The tokens with which vLLM begins and ends the base's reasoning, where its configuration says so."""
    reasoning = vllm_config.reasoning_config
    if reasoning is None:
        return set()
    parts = (
        reasoning.reasoning_start_token_ids,
        reasoning.reasoning_end_token_ids,
        reasoning.natural_reasoning_end_token_ids,
    )
    return {i for ids in parts for i in ids or ()}


def load_model_config(config: PADConfig, base: ModelConfig) -> ModelConfig:
    """The reward model's ModelConfig.

    Raises:
        ValueError: it cannot be found or read, is no causal language model, or its architecture cannot be a reward
            model.
    """
    source = config.source
    if source.is_served:
        model_config = served_model_config(base)
        check_architecture(config.reward_model, model_config)
        return model_config
    check_causal_lm(source.model, source.model_revision)
    try:
        model_config = reward_model_config(
            base,
            model=source.model,
            revision=source.model_revision,
            quantization=config.quantization,
            trust_remote_code=config.trust_remote_code,
            **({"dtype": config.dtype} if config.dtype else {}),
        )
    except Exception as error:
        raise ValueError(f"pad.reward_model={config.reward_model!r} cannot be loaded: {one_line(error)}") from error
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


def derive(
    config: PADConfig,
    vllm_config: VllmConfig,
    model_config: ModelConfig,
    tokens: SharedTokens,
    lora: LoRAConfig | None = None,
) -> VllmConfig:
    """The reward model's VllmConfig. Raises ValueError for what vLLM refuses."""
    most = min(DEFAULT_MAX_NUM_BATCHED_TOKENS, vllm_config.scheduler_config.max_num_batched_tokens)
    try:
        num_tokens = config.max_num_batched_tokens or most
        is_served = config.source.is_served
        return derive_vllm_config(vllm_config, model_config, num_tokens, tokens.max_pieces, is_served, lora)
    except Exception as error:
        raise ValueError(f"pad.reward_model={config.reward_model!r} cannot be loaded: {one_line(error)}") from error


def read_heads(config: PADConfig, model_config: ModelConfig) -> ValueHeads | None:
    """The value heads, where there are any. Raises ValueError for a file that cannot be read or does not fit."""
    path = locate_heads(config.heads, config.source.reward_model, config.source.revision)
    if path is None:
        return None
    try:
        return load_heads(path, model_config.get_hidden_size())
    except Exception as error:
        raise ValueError(f"pad.heads: {path} cannot be read: {one_line(error)}") from None


def check_kv_cache(fits: Fit) -> None:
    """Raise ValueError for a configured KV cache that cannot hold one context."""
    model_config, parallel = fits.model_config, fits.vllm_config.parallel_config
    if model_config.use_mla:
        return  # the KV cache itself knows better
    layers = model_config.get_num_layers(parallel) * model_config.get_num_kv_heads(parallel)
    one_context = model_config.max_model_len * layers * model_config.get_head_size() * 2 * model_config.dtype.itemsize
    given = fits.config.kv_cache_memory_bytes
    if given is not None and given < one_context:
        raise ValueError(
            f"pad.kv_cache_memory_bytes={given}: one context of {model_config.max_model_len} tokens takes "
            f"{one_context} bytes of the reward model's KV cache, the least that can work"
        )


def fit_context(
    config: PADConfig,
    model_config: ModelConfig,
    base_max_model_len: int,
    template: PromptTemplate | None,
    stretch: float = 1.0,
) -> tuple[int, int]:
    """Size the reward model's context.

    Where it has too few positions for the engine's longest request and its preference, a guided request whose context
    is full ends, as it would at ``max_model_len``.

    Args:
        stretch: how much longer a text may be in its tokens than in the base's.

    Returns:
        How many tokens a preference may take of it; and how many of the reward model's tokens a guided request has
        less than the engine's ``max_model_len``, those of its preference apart.

    Raises:
        ValueError: no prompt with a preference fits; with the numbers.
    """
    positions = model_config.max_model_len
    added = template.num_added_tokens("") + template.num_seam_tokens if template else 0
    least = MIN_PREFERENCE_TOKENS if template else 0
    if positions <= added + least:
        raise ValueError(
            f"pad.reward_model={config.reward_model!r}: its {positions} positions leave no room for a prompt beside "
            f"{added} tokens of prompt_template and {least} of a preference; shorten pad.prompt_template, or use a "
            "reward model with more positions"
        )
    # What is left beside the longest request, or half of the context: most prompts are far shorter.
    room = max(positions - base_max_model_len - added, (positions - added) // 2, least)
    preference = min(room, MAX_PREFERENCE_TOKENS, positions - added - 1) if template else 0
    longest = math.ceil(stretch * base_max_model_len) + added
    model_config.max_model_len = min(longest + preference, positions)
    return preference, max(longest - positions, 0)


def beta_warning(config: PADConfig, reward: ModelConfig, base: ModelConfig, is_trained: bool) -> str | None:
    """What to tell an operator whose default beta leaves too much to the reward model; None where it does not.

    ``is_trained``: something beside the reward model says that it was trained for this.
    """
    if config.reference != "base" or config.beta < 1:
        return None
    doubts = [] if is_trained else [f"no file beside it ({DEFAULTS_FILE}, heads) says that it was trained for this"]
    sizes = [_body_size(model) for model in (base, reward)]
    if min(sizes) > 0 and sizes[0] >= MUCH_SMALLER * sizes[1]:
        doubts.append(f"it is about {sizes[0] / sizes[1]:.0f} times smaller than the base model")
    if not doubts:
        return None
    return (
        f"With pad.reference 'base' and pad.beta {config.beta:g}, the reward model alone, {config.reward_model!r}, "
        f"chooses among the base model's candidates, but {' and '.join(doubts)}. Answers may lose what the base model "
        "knows. Set pad.reference to 'neutral', which keeps only what the preference changes, or try a pad.beta of "
        "0.3 to 0.8."
    )


def _body_size(model: ModelConfig) -> int:
    """What the number of a transformer's weights grows with, embeddings apart."""
    layers = getattr(model.hf_text_config, "num_hidden_layers", None)
    return layers * model.get_hidden_size() ** 2 if isinstance(layers, int) else 0
