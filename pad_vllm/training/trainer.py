"""The trainers: transformers' Trainer on answers (supervised), and on comparisons (PAD).

Everything here works on token ids. A preference is already in them, put there by
:class:`~pad_vllm.reward.template.PromptTemplate` as in serving.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from tqdm import trange
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pad_vllm.training.data import DataError, Example, PairExample
from pad_vllm.training.objective import pad_loss, sequence_sums, token_logprobs

NUM_BATCHES_SORTED = 16
COMPLETE = "complete"
"""A file written last into a checkpoint: one without it was being written when training was killed."""


def pad_examples(examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, torch.Tensor]:
    """Prompts and answers as one batch.

    Rows are padded on the right, where causal attention never looks, so no mask is needed.

    Returns:
        ids: (num_examples, max_length) int64.
        is_answer: (num_examples, max_length) bool, the tokens of the answers.
    """
    lengths = [len(prompt) + len(answer) for prompt, answer in examples]
    ids = torch.zeros(len(examples), max(lengths), dtype=torch.long)
    is_answer = torch.zeros_like(ids, dtype=torch.bool)
    for row, ((prompt, answer), length) in enumerate(zip(examples, lengths, strict=True)):
        ids[row, :length] = torch.tensor([*prompt, *answer])
        is_answer[row, len(prompt) : length] = True
    return {"ids": ids, "is_answer": is_answer}


def answer_logprob_sums(
    model: nn.Module, ids: torch.Tensor, is_answer: torch.Tensor, **inputs: torch.Tensor
) -> torch.Tensor:
    """Log-probability of each answer of a padded batch, summed over its tokens: (num_examples,) float32."""
    first = int(is_answer.any(0).nonzero()[0])
    # The lm_head runs from the first token that predicts one of an answer, in whichever row.
    kept = ids.shape[1] - first
    logits = model(input_ids=ids[:, :-1], use_cache=False, logits_to_keep=kept, **inputs).logits
    ids, is_answer = ids[:, first:], is_answer[:, first:]
    return sequence_sums(token_logprobs(logits[is_answer], ids[is_answer]), is_answer.nonzero()[:, 0], len(ids))


@torch.no_grad()
def score_answers(
    model: nn.Module, examples: Sequence[Example], weights: torch.Tensor | None = None, batch_size: int = 32
) -> torch.Tensor:
    """Log-probability of each answer, summed over its tokens: (num_examples,) float32, on the CPU.

    Args:
        weights: for a model with heads, those of each example: (num_examples, num_heads) float32.
    """
    if weights is None:  # answers are compared more than once
        numbers: dict[tuple, int] = {}
        which = [numbers.setdefault((tuple(prompt), tuple(answer)), len(numbers)) for prompt, answer in examples]
        if len(numbers) < len(examples):
            return score_answers(model, [Example(*map(list, key)) for key in numbers], None, batch_size)[which]
    by_length = sorted(range(len(examples)), key=lambda i: sum(map(len, examples[i])))
    scores = torch.empty(len(examples))
    device = next(model.parameters()).device
    for start in trange(0, len(examples), batch_size, desc="scoring", disable=None if len(examples) > 10_000 else True):
        rows = by_length[start : start + batch_size]
        batch = pad_examples([examples[i] for i in rows])
        if weights is not None:
            batch["weights"] = weights[rows]
        scores[rows] = answer_logprob_sums(model, **{name: t.to(device) for name, t in batch.items()}).float().cpu()
    return scores


def reward_margins(
    model: nn.Module, reference: nn.Module | None, pairs: Sequence[PairExample], weights: torch.Tensor | None = None
) -> torch.Tensor:
    """By how much each pair's chosen answer is rewarded above its rejected one: (num_pairs,) float32, in nats.

    Without a reference: by how much it is likelier, which is the same where margins of opposites are added.
    """
    both = None if weights is None else weights.repeat(2, 1)
    chosen, rejected = score_answers(model, answers_of(pairs), both).chunk(2)
    if reference is None:
        return chosen - rejected
    ref_chosen, ref_rejected = score_answers(reference, answers_of(pairs, ref=True)).chunk(2)
    return pad_loss(chosen, rejected, ref_chosen, ref_rejected, beta=1.0)[1]


def answers_of(pairs: Sequence[PairExample], ref: bool = False) -> list[Example]:
    """Chosen answers, then rejected ones, each with what the model, or the reference, reads before it."""
    read = [(pair.ref_prompt if ref else pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    if ref:
        read = [pair.reference or same for pair, same in zip(pairs, read, strict=True)]
    return [Example(prompt, chosen) for prompt, chosen, _ in read] + [Example(p, rejected) for p, _, rejected in read]


class FixedOrderTrainer(Trainer):
    """transformers' Trainer over ``examples`` in an order fixed beforehand, so that resuming needs only to count.

    Args:
        sizes: tokens of each example; those of similar size come into one batch.
        together: groups of as many examples each, whose number divides the batch size: a group comes into one batch.
    """

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        collate: Callable[[list[Any]], dict[str, torch.Tensor]],
        args: TrainingArguments,
        sizes: Sequence[int],
        together: Sequence[Sequence[int]] | None = None,
    ) -> None:
        batch_size = args.train_batch_size * args.gradient_accumulation_steps
        groups = together or [(i,) for i in range(len(examples))]
        largest = [max(sizes[i] for i in group) for group in groups]
        batches = _order(largest, batch_size // len(groups[0]), args.max_steps, random.Random(args.seed))
        order = [i for number in batches for i in groups[number]]
        super().__init__(
            model,
            args,
            collate,
            train_dataset=[examples[i] for i in order],
            eval_dataset=examples,  # read by nobody: asked for by the Trainer
            callbacks=[_MarkComplete()],
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch
        self._stats: dict[str, list[float]] = defaultdict(list)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def note(self, **stats: torch.Tensor) -> None:
        """Means of these since the last line go into the next line of the log."""
        for name, value in stats.items():
            self._stats[name].append(float(value.detach()))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        means = {name: round(sum(values) / len(values), 4) for name, values in self._stats.items() if values}
        self._stats.clear()
        super().log(logs | means, *args, **kwargs)


class SFTTrainer(FixedOrderTrainer):
    """Maximum likelihood of the answers of ``examples``."""

    def __init__(self, model: nn.Module, examples: Sequence[Example], args: TrainingArguments) -> None:
        # Not the mean over a batch's tokens: batches are of one length, and it would favor short answers.
        self._mean_length = sum(len(example.answer) for example in examples) / len(examples)
        super().__init__(model, examples, pad_examples, args, [sum(map(len, e)) for e in examples])

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        return -answer_logprob_sums(model, **inputs).mean() / self._mean_length


class PADTrainer(FixedOrderTrainer):
    """The PAD objective over ``pairs``.

    Args:
        model: pi_theta, reads the preference.
        reference: pi_ref, reads the plain prompt; its log-probabilities are computed once, here. It should be the model
            that will be served as the base: serving scores a token by its log-ratio to the base's logits, the very
            quantity that is learned here.
        beta: scale of the reward in :func:`~pad_vllm.training.objective.pad_loss`.
        nll_weight: weight of the chosen answers' negative log-likelihood per token. The PAD loss sees differences
            only, and is as content when both answers become unlikely; their text then falls apart.
        opposites: every pair has its opposite (:func:`opposites_of`), and their margins are added, as
            :func:`~pad_vllm.training.objective.pad_loss` says. What makes an answer likely for everybody then cancels
            out of the gradient: with few comparisons, the difference between learning to read preferences and learning
            to sound like the answers. Takes an even batch size.
        weights: for a model with heads, the user of each pair: (num_pairs, num_heads) float32.
        measure: what :meth:`evaluate` reports.
    """

    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
        reference: PreTrainedModel,
        pairs: Sequence[PairExample],
        args: TrainingArguments,
        *,
        beta: float,
        nll_weight: float,
        opposites: bool = False,
        weights: torch.Tensor | None = None,
        measure: Callable[[nn.Module], dict[str, float]] | None = None,
    ) -> None:
        self._measure = measure
        self._beta, self._nll_weight, self._opposites = beta, nll_weight, opposites
        self._mean_length = sum(len(pair.chosen) for pair in pairs) / len(pairs)
        if opposites:  # where it cancels
            ref = torch.zeros(len(pairs), 2)
        else:
            ref = score_answers(reference.to(args.device).eval(), answers_of(pairs, ref=True)).view(2, -1).T
        items = [(pair, ref[i], None if weights is None else weights[i]) for i, pair in enumerate(pairs)]
        sizes = [len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in pairs]
        together = opposites_of(pairs) if opposites else None
        super().__init__(model, items, _collate_pairs, args, sizes, together)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        self.model.eval()
        metrics = {f"eval_{name}": value for name, value in self._measure(self.model).items()} if self._measure else {}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train()
        return metrics

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        inputs = dict(inputs)
        ref_chosen, ref_rejected = inputs.pop("ref").T
        chosen, rejected = answer_logprob_sums(model, **inputs).chunk(2)
        loss, margins = pad_loss(chosen, rejected, ref_chosen, ref_rejected, self._beta, self._opposites)
        nll = -chosen.mean() / self._mean_length
        self.note(pad=loss, nll=nll, accuracy=(margins > 0).float().mean())
        return loss + self._nll_weight * nll


def opposites_of(pairs: Sequence[PairExample]) -> list[tuple[int, int]]:
    """Each comparison with that of the same two answers in which a user of another preference chose the other one.

    Returns:
        Indices, every one of them once.

    Raises:
        DataError: a comparison has none.
    """
    waiting: dict[tuple, list[int]] = defaultdict(list)
    found = []
    for i, pair in enumerate(pairs):
        prompt, chosen, rejected = (tuple(ids) for ids in (pair.ref_prompt, pair.chosen, pair.rejected))
        if same := waiting[prompt, rejected, chosen]:
            found.append((same.pop(0), i))
        else:
            waiting[prompt, chosen, rejected].append(i)
    if alone := [i for same in waiting.values() for i in same]:
        raise DataError(f"opposites: {len(alone)} of {len(pairs)} comparisons have none, such as number {alone[0]}")
    return found


def _collate_pairs(items: Sequence[tuple[PairExample, torch.Tensor, torch.Tensor | None]]) -> dict[str, torch.Tensor]:
    """A batch of twice as many rows as pairs, and (num_pairs, 2) log-probabilities under the reference."""
    pairs, ref, weights = zip(*items, strict=True)
    batch = pad_examples(answers_of(pairs)) | {"ref": torch.stack(ref)}
    if weights[0] is not None:
        batch["weights"] = torch.stack(weights).repeat(2, 1)
    return batch


def training_arguments(
    folder: str | Path, *, steps: int, batch_size: int, lr: float, seed: int, **settings: Any
) -> TrainingArguments:
    """AdamW with a linear warmup over a twentieth of ``steps``, then a cosine to zero; any other setting of
    transformers' ``TrainingArguments`` by its name. No checkpoints unless ``save_strategy`` is given."""
    defaults = {
        "adam_beta2": 0.95,
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "logging_steps": max(1, steps // 20),
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        defaults["bf16"] = True
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=lr,
        seed=seed,
        **(defaults | settings),
    )
    args._n_gpu = min(args.n_gpu, 1)  # or the Trainer copies the model to all of them, and splits every batch
    return args


class _MarkComplete(TrainerCallback):
    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", COMPLETE).touch()


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in ``folder`` that was written to its end."""
    complete = [path.parent for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    return str(max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]))) if complete else None


def _order(sizes: Sequence[int], batch_size: int, num_batches: int, rng: random.Random) -> Iterator[int]:
    """Indices of ``num_batches`` batches of examples of similar size, so that little is padding: in passes over all,
    each shuffled anew. The last batch of a pass takes from the next one what it lacks."""
    rest: list[int] = []
    while num_batches > 0:
        shuffled = list(range(len(sizes)))
        rng.shuffle(shuffled)
        rest += shuffled
        while len(rest) >= batch_size and num_batches > 0:
            window = min(len(rest) // batch_size, NUM_BATCHES_SORTED) * batch_size
            bucket, rest = sorted(rest[:window], key=sizes.__getitem__), rest[window:]
            batches = [bucket[i : i + batch_size] for i in range(0, window, batch_size)]
            rng.shuffle(batches)
            for batch in batches[:num_batches]:
                yield from batch
            num_batches -= len(batches)
