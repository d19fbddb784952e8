"""One step of PAD for a batch: the guided requests' contexts, through the reward engine, into the guidance kernel.

Knows no runner: :mod:`pad_vllm.worker.adapters` says which rows are guided and where a request's tokens are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from pad_vllm import kernels
from pad_vllm.channel import Announcement
from pad_vllm.config import PADConfig
from pad_vllm.kernels import Controls, OutputTokens
from pad_vllm.params import MAX_LOGIT_BIAS, PAD, GuidanceParams, check_logit_bias, check_weights
from pad_vllm.reward.backend import PagedModel, to_device
from pad_vllm.reward.block_manager import Context
from pad_vllm.reward.engine import ContextRows, RewardEngine
from pad_vllm.reward.folder import locate_defaults
from pad_vllm.reward.heads import load_heads, locate_heads, tensor_names_beside
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.stats import Stats
from pad_vllm.worker.board import Board
from pad_vllm.worker.compatibility import beta_warning, check_vocabulary, fit_context, load_model_config, load_tokenizer

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

logger = init_logger(f"vllm.{__name__}")

NO_PENALTIES = (0.0, 0.0, 1.0)
DEFAULT_MAX_NUM_BATCHED_TOKENS = 2048
LOGITS_BYTES = 2**30
"""vLLM verifies drafts by pieces of the batch whose float32 logits take no more."""


@dataclass(frozen=True)
class SamplingControls:
    """What a request does to the base logits: the reward is about the models, so it must not see this."""

    penalties: tuple[float, float, float] = NO_PENALTIES
    """presence, frequency, repetition"""
    logit_bias: Mapping[int, float] | None = None

    @classmethod
    def of(cls, params: SamplingParams) -> SamplingControls:
        return cls(
            (params.presence_penalty, params.frequency_penalty, params.repetition_penalty), params.logit_bias or None
        )

    @property
    def penalizes(self) -> bool:
        return self.penalties != NO_PENALTIES


@dataclass(eq=False)
class Layout:
    """Which requests are guided, and in which rows of the logits. The same object from step to step as long as that is
    the same: what follows from it is then not computed again."""

    slots: np.ndarray
    """[C] int64, distinct"""
    rows: torch.Tensor
    """[R] int64, on the device: rows of the logits, distinct"""
    row_slots: torch.Tensor
    """[R] int64, on the device: each row's slot; ``Guidance.no_slot`` for a row that is to be left alone"""


@dataclass
class GuidedBatch:
    """The guided rows of one step of the engine: C requests, each in its slot, and R rows of logits.

    Without drafts R = C, in the same order. Under speculative decoding a request has a row for each token that is
    being verified, and how many that is may be known on the device only.
    """

    layout: Layout
    num_tokens: np.ndarray
    """[C] int64: tokens of the request, this step's drafts among them, at most"""
    exact: bool
    """Whether ``num_tokens`` is what the request's one row sees; else it is an upper bound."""
    positions: torch.Tensor
    """[R] int64, on the device: where in its request the last token is that the row sees"""
    token_ids: torch.Tensor
    """[R] int32, on the device: that token"""
    output_ids: Callable[[int], Sequence[int]]
    """Slot -> the request's generated tokens that are settled: no drafts. May synchronize; called only when the reward
    model has to read them again."""
    output_tokens: Callable[[], OutputTokens]
    """The generated tokens that the rows see, on the device; called only when one of the requests has penalties."""


class RowParams:
    """What the rows of a layout ask for: gathered from their slots, once for a layout."""

    def __init__(self, layout: Layout, slots: Slots) -> None:
        self.layout = layout
        self.offset, self.prompt_len, self.last_prompt_id, self.top_k, self.end_ids = (
            column.contiguous() for column in slots.ints[layout.row_slots].unbind(1)
        )
        floats = slots.floats[layout.row_slots]
        self.beta, self.reference = floats[:, 0].contiguous(), floats[:, 1].contiguous()
        self.head_weights = floats[:, 2:]
        self.host_offset = slots.host_offset[layout.slots]
        self.host_prompt_len = slots.host_prompt_len[layout.slots]
        self.max_top_k = int(slots.host_top_k[layout.slots].max())
        self.mix_heads = bool(slots.host_uses_heads[layout.slots].any())
        self.penalize = bool(slots.host_penalizes[layout.slots].any())
        self.control = self.penalize or bool(slots.host_biases[layout.slots].any())


class Slots:
    """What the requests in the slots ask for, where the step needs it; the last slot stands for no request."""

    def __init__(self, num_slots: int, num_heads: int, vocab_size: int, device: torch.device) -> None:
        self.ints = torch.zeros(num_slots, 5, dtype=torch.int64, device=device)
        """[slots, 5]: tokens that the composed prompt has more than the base's, length of the base's, last token of
        the composed one, top_k (0: leave the row alone), token that ends the request"""
        self.floats = torch.zeros(num_slots, 3 + num_heads, device=device)
        """[slots, 3 + H]: beta, reference, weight of the backbone's own hidden state, weights of the heads"""
        self.num_bias = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self.bias_ids = torch.zeros(num_slots, MAX_LOGIT_BIAS, dtype=torch.int32, device=device)
        self.bias = torch.zeros(num_slots, MAX_LOGIT_BIAS, device=device)
        self.penalties = torch.tensor(NO_PENALTIES, device=device).repeat(num_slots, 1)
        self.prompt_mask = torch.zeros(num_slots, -(-vocab_size // 32), dtype=torch.int32, device=device)
        self.host_offset = np.zeros(num_slots, np.int64)
        self.host_prompt_len = np.zeros(num_slots, np.int64)
        self.host_top_k = np.zeros(num_slots, np.int64)
        self.host_uses_heads = np.zeros(num_slots, bool)
        self.host_biases = np.zeros(num_slots, bool)
        self.host_penalizes = np.zeros(num_slots, bool)

    def write(self, slot: int, ints: list[int], floats: list[float], uses_heads: bool) -> None:
        self.ints[slot] = to_device(ints, self.ints.device, torch.int64)
        self.floats[slot] = to_device(floats, self.floats.device, torch.float32)
        self.host_offset[slot], self.host_prompt_len[slot], _, self.host_top_k[slot], _ = ints
        self.host_uses_heads[slot] = uses_heads

    def write_controls(self, slot: int, controls: SamplingControls, prompt_ids: list[int]) -> None:
        device, bias = self.ints.device, controls.logit_bias or {}
        if bias or self.host_biases[slot]:
            self.num_bias[slot] = len(bias)
            self.bias_ids[slot, : len(bias)] = to_device(list(bias), device, torch.int32)
            self.bias[slot, : len(bias)] = to_device(list(bias.values()), device, torch.float32)
        if controls.penalizes or self.host_penalizes[slot]:
            self.penalties[slot] = to_device(controls.penalties, device, torch.float32)
            seen = np.zeros(32 * self.prompt_mask.shape[1], bool)
            seen[prompt_ids] = True
            self.prompt_mask[slot] = to_device(np.packbits(seen, bitorder="little").view("<i4"), device, torch.int32)
        self.host_biases[slot], self.host_penalizes[slot] = bool(bias), controls.penalizes

    def controls(self, row_slots: torch.Tensor, output: OutputTokens | None) -> Controls:
        """Of the rows of these slots; ``output`` None: none of them is penalized."""
        return Controls(row_slots, self.num_bias, self.bias_ids, self.bias, self.penalties, self.prompt_mask, output)


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
        self.instance_id = vllm_config.instance_id
        self.labels = (str(base.served_model_name or base.model), str(vllm_config.parallel_config.data_parallel_index))
        model_config = load_model_config(config, base)
        self.tokenizer_args = {
            "pretrained_model_name_or_path": config.reward_model,
            "revision": config.revision,
            "trust_remote_code": config.trust_remote_code,
        }
        self.reward_vocab_size, self.base_vocab_size = model_config.get_vocab_size(), base.get_vocab_size()
        tokens = load_tokenizer(config, self.tokenizer_args, base, self.reward_vocab_size)
        tokenizer = tokens.tokenizer
        self.vocab_size = check_vocabulary(config.reward_model, self.reward_vocab_size, self.base_vocab_size, tokens)
        if tokens.foreign:
            logger.warning("Guided requests never generate what the reward model does not know: %s.", tokens)
        foreign = [i for i in tokens.foreign if i < self.vocab_size]
        self.foreign_ids = to_device(foreign, device, torch.int64) if foreign else None
        """tokens below ``vocab_size`` that are no candidates"""
        self.template = None
        if tokenizer is not None:
            self.template = PromptTemplate(
                tokenizer, config.prompt_template, config.insert_after, tokens.chat_tokenizer
            )
        self.max_preference_tokens = fit_context(config, model_config, base.max_model_len, self.template)
        if self.template is not None:
            self.template.max_preference_tokens = self.max_preference_tokens

        heads_path = locate_heads(config.heads, config.reward_model, config.revision)
        self.heads = load_heads(heads_path, model_config.get_hidden_size(), device) if heads_path else None
        self.head_names = self.heads.names if self.heads else ()
        is_trained = self.heads is not None or locate_defaults(config.reward_model, config.revision) is not None
        if (warning := beta_warning(config, model_config, base, is_trained)) is not None:
            logger.warning(warning)
        scheduler = vllm_config.scheduler_config
        max_num_batched_tokens = config.max_num_batched_tokens or min(
            DEFAULT_MAX_NUM_BATCHED_TOKENS, scheduler.max_num_batched_tokens
        )
        self.model = PagedModel(
            vllm_config,
            model_config,
            device,
            max_num_batched_tokens,
            config.kv_cache_memory_bytes,
            tensor_names_beside(config.reward_model, config.revision),
        )
        self.kernels = kernels.implementation(device)
        self.guide_ = kernels.load_guide(self.kernels)
        hidden_states = self.model.warm_up(max_num_batched_tokens)
        self.lm_head = self.model.lm_head(hidden_states)
        self._check_logits(hidden_states)
        self.engine = RewardEngine(self.model, max_num_batched_tokens, scheduler.max_num_seqs)
        self.stats = Stats()
        self.no_slot = self.engine.no_context
        self.max_rows_per_request = 1 + vllm_config.num_speculative_tokens
        # Tokens beyond the shared vocabulary: of a drafter with a larger one, or of a base model padded further.
        self.may_be_foreign = self.max_rows_per_request > 1 or self.base_vocab_size > self.reward_vocab_size
        self.slots = Slots(scheduler.max_num_seqs + 1, len(self.head_names), self.base_vocab_size, device)
        self._params: RowParams | None = None
        self._warm_up(hidden_states, scheduler.max_num_seqs * self.max_rows_per_request)
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
            head_names=self.head_names,
            max_top_k=self.config.max_top_k,
            max_preference_tokens=self.max_preference_tokens,
            tokenizer=self.tokenizer_args if self.template else None,
            prompt_template=self.config.prompt_template,
            guides_all=self.config.default_persona is not None,
            instance_id=self.instance_id,
            labels=self.labels,
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
            check_weights(params.weights, self.head_names)
        if params.preference is not None:
            if self.template is None:
                raise ValueError("pad_preference: the engine has no tokenizer (skip_tokenizer_init)")
            self.template.encode_preference(params.preference)
        return params

    def new_request(
        self, slot: int, params: GuidanceParams, controls: SamplingControls, prompt_ids: list[int], end_id: int
    ) -> Context:
        """Begin guiding a request in a slot that is free: its context's index.

        Args:
            slot: of the request.
            params: its guidance.
            controls: what it does to the base logits besides.
            prompt_ids: the base model's prompt.
            end_id: the token that ends it, should guidance fail.

        Raises:
            ValueError: the prompt has a token that the reward model has no row for, or too many tokens are biased.
        """
        composed, shared = prompt_ids, ()
        if params.preference is not None:
            composed, shared = self.template.compose_shared(prompt_ids, params.preference)
        low, high = min(composed), max(composed)
        if low < 0 or high >= self.reward_vocab_size:
            raise ValueError(
                f"its prompt has tokens {low} to {high}, and the reward model a vocabulary of {self.reward_vocab_size}"
            )
        check_logit_bias(controls.logit_bias)
        self._write_slot(slot, params, prompt_ids, composed, end_id)
        self.slots.write_controls(slot, controls, prompt_ids)
        self.stats.guided_requests += 1
        return self.engine.blocks.add(slot, composed, shared)

    def free(self, context: Context) -> None:
        """A request left the batch."""
        self.engine.blocks.remove(context)

    def apply(self, logits: torch.Tensor, batch: GuidedBatch) -> None:
        """Guide the rows of ``batch`` in ``logits``, in place.

        Args:
            logits: [N, V], base logits after bias, penalties and grammar mask.
            batch: which rows, and what they have seen.
        """
        began = time.perf_counter()
        layout, params = batch.layout, self._params_of(batch.layout)
        num_tokens = batch.num_tokens + params.host_offset
        token_ids = batch.token_ids
        if not batch.exact or (batch.num_tokens <= params.host_prompt_len).any():
            # The composed prompt may end otherwise than the base's, from which the base samples its first token.
            token_ids = torch.where(batch.positions < params.prompt_len, params.last_prompt_id, token_ids)
        if self.may_be_foreign:
            # Such a draft or token is no candidate, so what follows it is void.
            token_ids = token_ids.clamp(0, self.reward_vocab_size - 1)
        hidden_states = self.engine.step(
            ContextRows(
                contexts=layout.slots,
                num_tokens=num_tokens,
                lengths=num_tokens if batch.exact else None,
                index=layout.row_slots,
                positions=batch.positions + params.offset,
                token_ids=token_ids.int(),
                history=batch.output_ids,
            )
        )
        controls = None
        if params.control:
            controls = self.slots.controls(layout.row_slots, batch.output_tokens() if params.penalize else None)
        self._guide(logits, hidden_states, layout.rows, params, controls)
        self.stats.guided_tokens += len(layout.rows)
        self.stats.running_requests = len(layout.slots)
        self.stats.steps += 1
        self.stats.step_seconds += time.perf_counter() - began

    def _params_of(self, layout: Layout) -> RowParams:
        if self._params is None or self._params.layout is not layout:
            self._params = RowParams(layout, self.slots)
        return self._params

    def show_stats(self, board: Board) -> None:
        """Bring a board up to date."""
        stats, engine, blocks = self.stats, self.engine.stats, self.engine.blocks
        stats.reward_tokens, stats.recomputed_tokens = engine.num_tokens, engine.num_recomputed_tokens
        stats.prefix_hit_tokens = blocks.stats.num_prefix_hit_tokens
        stats.evicted_contexts = blocks.stats.num_contexts_evicted
        stats.kv_cache_usage_perc = blocks.usage
        board.show(stats)

    def _guide(
        self,
        logits: torch.Tensor,
        hidden_states: torch.Tensor,
        rows: torch.Tensor,
        params: RowParams,
        controls: Controls | None = None,
    ) -> None:
        head = self.lm_head
        if self.foreign_ids is not None:
            places = rows.unsqueeze(1), self.foreign_ids
            logits[places] = logits[places].masked_fill(params.top_k.unsqueeze(1) > 0, float("-inf"))
        self.guide_(
            logits,
            hidden_states,
            head.weight,
            rows=rows,
            top_k=params.top_k,
            beta=params.beta,
            reference=params.reference,
            end_ids=params.end_ids,
            controls=controls,
            max_top_k=params.max_top_k,
            vocab_size=self.vocab_size,
            bias=head.bias,
            heads=(self.heads.weight, self.heads.bias, params.head_weights) if params.mix_heads else None,
            soft_cap=head.soft_cap,
            scale=head.scale,
            vocab_start=head.vocab_start,
            all_reduce=head.all_reduce,
        )

    def _write_slot(
        self, slot: int, params: GuidanceParams, prompt_ids: list[int], composed: list[int], end_id: int
    ) -> None:
        weights = params.weights or (self.heads.default_weights if self.heads else None)
        mix = (0.0, *weights) if weights else (1.0, *[0.0] * len(self.head_names))
        offset = len(composed) - len(prompt_ids)
        ints = [offset, len(prompt_ids), composed[-1], params.top_k, end_id]
        floats = [params.beta, float(self.config.reference == "base"), *mix]
        self.slots.write(slot, ints, floats, weights is not None)

    @torch.inference_mode()
    def _warm_up(self, hidden_states: torch.Tensor, max_rows: int) -> None:
        """Run the largest kernel call once, so that its memory is taken while vLLM still counts; with controls too,
        whose kernels would otherwise be compiled under the first request that has them.

        Args:
            hidden_states: [1, hidden_size].
            max_rows: most rows of logits in a step; vLLM itself takes no more than LOGITS_BYTES of them at a time.
        """
        num_rows = max(1, min(max_rows, LOGITS_BYTES // (4 * self.base_vocab_size)))
        logits = torch.rand(num_rows, self.base_vocab_size, device=self.device)
        rows = torch.arange(num_rows, device=self.device)
        params = RowParams(Layout(np.array([self.no_slot]), rows, torch.full_like(rows, self.no_slot)), self.slots)
        params.top_k.fill_(self.config.max_top_k)
        params.max_top_k, params.mix_heads = self.config.max_top_k, self.heads is not None
        hidden_states = hidden_states.expand(num_rows, -1)
        nowhere = torch.zeros_like(rows)
        tokens = torch.zeros(1, 1, dtype=torch.int32, device=self.device)
        drafts = tokens.expand(num_rows, self.max_rows_per_request - 1).contiguous()
        output = OutputTokens(tokens, nowhere, nowhere, nowhere, drafts)
        for controls in (None, *(self.slots.controls(params.layout.row_slots, seen) for seen in (None, output))):
            self._guide(logits, hidden_states, rows, params, controls)

    @torch.inference_mode()
    def _check_logits(self, hidden_states: torch.Tensor) -> None:
        """Raise ValueError if candidates would be scored otherwise than the reward model scores its vocabulary.

        Args:
            hidden_states: [1, hidden_size].
        """
        head = self.lm_head
        if not bool(hidden_states.isfinite().all()):
            raise ValueError(
                f"pad.reward_model={self.config.reward_model!r}: its hidden states are not finite numbers in "
                f"{str(hidden_states.dtype).removeprefix('torch.')}; set pad.dtype to one that holds them, as "
                "bfloat16 or float32, or see whether the weights are sound"
            )
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

    def _log_summary(self) -> None:
        num_tokens = (self.model.num_blocks - 1) * self.model.block_size
        logger.info(
            "PAD guidance by %s: reference %s, beta %g, top_k %d (at most %d), %d personas, heads: %s, kernels: %s. "
            "Reward model: %.2f GiB of weights, KV cache of %s tokens (%.2f GiB), %.1f requests of the full %d tokens.",
            self.config.reward_model,
            self.config.reference,
            self.config.beta,
            self.config.top_k,
            self.config.max_top_k,
            len(self.config.personas),
            ", ".join(self.head_names) or "none",
            self.kernels,
            self.model.weight_bytes / 2**30,
            f"{num_tokens:,}",
            num_tokens * self.model.bytes_per_token / 2**30,
            num_tokens / self.model.max_model_len,
            self.model.max_model_len,
        )
        if self.template is not None:
            logger.info("PAD: what the reward model reads: %r", self.template.example(self.config.example_preference))
