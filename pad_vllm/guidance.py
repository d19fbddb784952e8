"""One step of PAD for a batch: the guided requests' contexts, through the reward engine, into the guidance kernel.

Knows no runner: the adapters of ``processor`` say which rows are guided and where a request's tokens are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from vllm.config import VllmConfig
from vllm.logger import init_logger

from pad_vllm import kernels
from pad_vllm.admission import Announcement, check_preference, check_weights
from pad_vllm.config import PADConfig
from pad_vllm.params import PAD, GuidanceParams
from pad_vllm.reward.backend import PagedModel, reward_model_config
from pad_vllm.reward.engine import Context, ContextStep, RewardEngine
from pad_vllm.reward.heads import load_heads, locate_heads, tensor_names_beside
from pad_vllm.reward.template import PromptTemplate

logger = init_logger(f"vllm.{__name__}")

MAX_PREFERENCE_TOKENS = 1024
"""No longer than this, whatever the reward model could hold: a preference is a text, not a document."""
MIN_PREFERENCE_TOKENS = 16
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048


@dataclass(eq=False)
class GuidedRequest:
    """A request in the batch that PAD guides."""

    params: GuidanceParams
    context: Context


@dataclass
class GuidedRow:
    """One row of logits of a guided request."""

    row: int
    request: GuidedRequest
    num_output_tokens: int
    """Tokens generated before the one that this row samples."""
    output_ids: Callable[[], Sequence[int]]
    """Those tokens, on the host. May synchronize; called only when the reward model has to read them again."""


class Guidance:
    """The reward model and the rule, for one engine.

    Args:
        config: the engine's PAD configuration.
        vllm_config: the engine's configuration.
        device: where the base model's logits are.

    Raises:
        ValueError: guidance could not work; one paragraph that says what to change.
    """

    def __init__(self, config: PADConfig, vllm_config: VllmConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        base = vllm_config.model_config
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

        self.tokenizer_args = {
            "pretrained_model_name_or_path": config.reward_model,
            "revision": config.revision,
            "trust_remote_code": config.trust_remote_code,
        }
        tokenizer = self._load_tokenizer(vllm_config)
        self.reward_vocab_size = model_config.get_vocab_size()
        self.vocab_size = check_vocabulary(
            config.reward_model, self.reward_vocab_size, base.get_vocab_size(), tokenizer
        )
        self.template = None
        if tokenizer is not None:
            self.template = PromptTemplate(tokenizer, config.prompt_template, config.insert_after)
        self.max_preference_tokens = self._fit_context(model_config, base.max_model_len)

        heads_path = locate_heads(config.heads, config.reward_model, config.revision)
        self.heads = load_heads(heads_path, model_config.get_hidden_size(), device) if heads_path else None
        max_num_batched_tokens = config.max_num_batched_tokens or min(
            DEFAULT_MAX_NUM_BATCHED_TOKENS, vllm_config.scheduler_config.max_num_batched_tokens
        )
        self.model = PagedModel(
            vllm_config,
            model_config,
            device,
            max_num_batched_tokens,
            config.kv_cache_memory_bytes,
            tensor_names_beside(config.reward_model, config.revision),
        )
        self.lm_head = self.model.lm_head()
        self._check_logits(self.model.warm_up(max_num_batched_tokens))
        self.engine = RewardEngine(self.model, max_num_batched_tokens)
        for name in config.personas:
            try:
                self.resolve(PAD(persona=name))
            except ValueError as error:
                raise ValueError(f"pad.personas[{name!r}]: {error}") from None
        self._log_summary()

    def announcement(self) -> Announcement:
        """What the frontend may let through."""
        return Announcement(
            configured=True,
            personas=tuple(self.config.personas),
            head_names=self.heads.names if self.heads else (),
            max_top_k=self.config.max_top_k,
            max_preference_tokens=self.max_preference_tokens,
            tokenizer=self.tokenizer_args if self.template else None,
            prompt_template=self.config.prompt_template,
        )

    def resolve(self, asked: PAD | None) -> GuidanceParams | None:
        """A request's guidance, or None where it asks for none.

        Raises:
            ValueError: this engine cannot do it; the frontend refuses such a request before it gets here.
        """
        params = self.config.resolve(asked)
        if params is None:
            return None
        if params.weights is not None:
            check_weights(params.weights, self.heads.names if self.heads else ())
        if params.preference is not None:
            if self.template is None:
                raise ValueError("pad_preference: the engine has no tokenizer (skip_tokenizer_init)")
            check_preference(self.template, params.preference, self.max_preference_tokens)
        return params

    def new_request(self, params: GuidanceParams, prompt_ids: Sequence[int]) -> GuidedRequest:
        """Begin guiding a request whose base prompt is ``prompt_ids``.

        Raises:
            ValueError: the prompt has a token that the reward model has no row for.
        """
        low, high = min(prompt_ids), max(prompt_ids)
        if low < 0 or high >= self.reward_vocab_size:
            raise ValueError(
                f"its prompt has tokens {low} to {high}, and the reward model a vocabulary of {self.reward_vocab_size}"
            )
        composed = list(prompt_ids)
        if params.preference is not None:
            composed = self.template.compose(composed, params.preference)
        return GuidedRequest(params, self.engine.new_context(composed))

    def free(self, request: GuidedRequest) -> None:
        """A request left the batch."""
        self.engine.free(request.context)

    def apply(self, logits: torch.Tensor, rows: Sequence[GuidedRow], last_token_ids: torch.Tensor) -> None:
        """Guide ``rows`` of ``logits``, in place.

        Args:
            logits: [N, V], base logits after bias, penalties and grammar mask.
            rows: the guided ones; a request stands in one row at most.
            last_token_ids: [len(rows)] int32 on the device, the last token of each row's sequence.
        """
        steps = [
            ContextStep(r.request.context, len(r.request.context.prompt_ids) + r.num_output_tokens, r.output_ids)
            for r in rows
        ]
        hidden_states = self.engine.step(steps, last_token_ids)
        params = [r.request.params for r in rows]
        top_k = [p.top_k for p in params]
        kernels.guide_(
            logits,
            hidden_states,
            self.lm_head.weight,
            rows=self._tensor([r.row for r in rows], torch.int64),
            top_k=self._tensor(top_k, torch.int64),
            beta=self._tensor([p.beta for p in params], torch.float32),
            reference=torch.full((len(rows),), float(self.config.reference == "base"), device=self.device),
            max_top_k=max(top_k),
            vocab_size=self.vocab_size,
            bias=self.lm_head.bias,
            heads=self._head_map(params),
            soft_cap=self.lm_head.soft_cap,
            scale=self.lm_head.scale,
            vocab_start=self.lm_head.vocab_start,
            all_reduce=self.lm_head.all_reduce,
        )

    def _head_map(self, params: list[GuidanceParams]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        if self.heads is None:
            return None
        weights = [p.weights or self.heads.default_weights for p in params]
        if not any(weights):
            return None
        backbone_alone = (1.0, *[0.0] * len(self.heads.names))
        mix = [(0.0, *w) if w else backbone_alone for w in weights]
        return self.heads.weight, self.heads.bias, self._tensor(mix, torch.float32)

    def _tensor(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device, non_blocking=True)

    def _load_tokenizer(self, vllm_config: VllmConfig) -> PreTrainedTokenizerBase | None:
        """The reward model's tokenizer, once it is known to be the base model's."""
        base = vllm_config.model_config
        try:
            tokenizer = AutoTokenizer.from_pretrained(**self.tokenizer_args)
        except Exception as error:
            if base.skip_tokenizer_init:
                return None
            raise ValueError(
                f"pad.reward_model={self.config.reward_model!r}: no tokenizer: {one_paragraph(error)}"
            ) from error
        if not base.skip_tokenizer_init:
            try:
                theirs = AutoTokenizer.from_pretrained(
                    base.tokenizer, revision=base.tokenizer_revision, trust_remote_code=base.trust_remote_code
                ).get_vocab()
            except Exception as error:
                raise ValueError(
                    f"pad: the base model's tokenizer {base.tokenizer!r} cannot be compared with the reward model's: "
                    f"{one_paragraph(error)}"
                ) from error
            ours = tokenizer.get_vocab()
            if missing := [token for token, i in theirs.items() if ours.get(token) != i]:
                token = min(missing)
                raise ValueError(
                    f"pad.reward_model={self.config.reward_model!r}: its tokenizer is not that of the base model "
                    f"{base.model!r}: {token!r} is {theirs[token]} there and {ours.get(token)} here. PAD scores the "
                    "base model's own tokens; take a reward model trained with the same tokenizer"
                )
        return tokenizer

    @torch.inference_mode()
    def _check_logits(self, hidden_states: torch.Tensor) -> None:
        """Raise ValueError if candidates would be scored otherwise than the reward model scores its vocabulary.

        Args:
            hidden_states: [1, hidden_size].
        """
        head = self.lm_head
        if head.all_reduce is not None:
            return  # a rank has a shard, and the architecture is the same
        ids = torch.arange(0, head.weight.shape[0], max(head.weight.shape[0] // 64, 1), device=self.device)[None]
        scores = kernels.score_candidates(hidden_states, head.weight, ids, head.bias)
        ours = kernels.cap_and_scale(scores, head.soft_cap, head.scale)
        theirs = self.model.model.compute_logits(hidden_states).float().gather(1, ids)
        if not torch.allclose(theirs, ours, rtol=0.05, atol=0.05):
            raise ValueError(
                f"pad.reward_model={self.config.reward_model!r}: its logits are more than an output head, soft cap and "
                "scale, so they cannot be computed for candidates alone"
            )

    def _fit_context(self, model_config, base_max_model_len: int) -> int:
        """Size the reward model's context, and return how many tokens a preference may take of it."""
        added = self.template.num_added_tokens("") if self.template else 0
        room = model_config.max_model_len - base_max_model_len - added
        if room < (MIN_PREFERENCE_TOKENS if self.template else 0):
            raise ValueError(
                f"pad.reward_model={self.config.reward_model!r}: its {model_config.max_model_len} positions do not "
                f"hold the engine's max_model_len of {base_max_model_len}, {added} tokens of prompt_template and "
                f"{MIN_PREFERENCE_TOKENS} or more of a preference; lower --max-model-len to "
                f"{max(model_config.max_model_len - added - MIN_PREFERENCE_TOKENS, 0)} or less"
            )
        preference = min(room, MAX_PREFERENCE_TOKENS) if self.template else 0
        model_config.max_model_len = base_max_model_len + added + preference
        return preference

    def _log_summary(self) -> None:
        num_tokens = (self.model.num_blocks - 1) * self.model.block_size
        logger.info(
            "PAD guidance by %s: reference %s, beta %g, top_k %d (at most %d), %d personas, heads: %s. Reward model: "
            "%.2f GiB of weights, KV cache of %s tokens (%.2f GiB), %.1f contexts of the full %d tokens.",
            self.config.reward_model,
            self.config.reference,
            self.config.beta,
            self.config.top_k,
            self.config.max_top_k,
            len(self.config.personas),
            ", ".join(self.heads.names) if self.heads else "none",
            self.model.weight_bytes / 2**30,
            f"{num_tokens:,}",
            num_tokens * self.model.bytes_per_token / 2**30,
            num_tokens / self.model.max_model_len,
            self.model.max_model_len,
        )


def one_paragraph(error: Exception) -> str:
    """An error's own words, without the frame that pydantic puts around them."""
    words = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    return " ".join(words.split())


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
