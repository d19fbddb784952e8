"""``pad-vllm train``: from a causal language model and a preference set to a reward model that the plugin loads.

Two stages (PAD, arXiv 2410.04070, section 3.3). The backbone learns to read preferences, by the PAD objective with unit
weights; then, frozen, it gets one head per labelled dimension.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pad_vllm.errors import one_line, writing
from pad_vllm.reward.byte_tokens import same_ordinary_tokens
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import DataError, PairExample, encode, read_comparisons
from pad_vllm.training.export import export
from pad_vllm.training.heads import HeadedModel, users_of
from pad_vllm.training.loading import adapted, import_peft, load_causal_lm, load_tokenizer
from pad_vllm.training.settings import SAVING, STAGES, Stage, TrainingConfig, check_settings
from pad_vllm.training.trainer import PADTrainer, last_checkpoint, opposites_of, reward_margins, training_arguments

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


def train(config: TrainingConfig, quiet: bool = False) -> dict[str, Any]:
    """Train a reward model and write it. A run that was killed, started again, continues from its last checkpoint.

    Returns:
        For each stage, the accuracy on comparisons that it was not trained on, over all of them and by dimension.

    Raises:
        ValueError: the data (:class:`~pad_vllm.training.data.DataError`) or a setting is wrong, or an unfinished run
            with other settings is at the same place.
        FileExistsError: the output exists.
    """
    output = Path(config.output)
    check_settings(config)
    model = load_causal_lm("model", config.model)
    reference = load_causal_lm("reference", config.reference or config.model).requires_grad_(False)
    tokenizer = load_tokenizer("model", config.model)
    other_tokenizer = another_tokenizer(config.reference, tokenizer) if config.reference else None
    if other_tokenizer is not None and config.max_answer is not None:
        raise ValueError(
            "max_answer: cannot be set, because the reference has another tokenizer, which would cut answers elsewhere"
        )
    template = PromptTemplate(tokenizer, config.prompt_template, config.insert_after)
    positions = [m.config.get_text_config().max_position_embeddings for m in (model, reference)]
    max_length = min(config.max_length or math.inf, *positions)

    def read(path: str) -> list[PairExample]:
        comparisons = read_comparisons(path, config.columns, config.split)
        examples = encode(comparisons, tokenizer, template, max_length, other_tokenizer, config.max_answer)
        if left_out := len(comparisons) - len(examples):
            logger.warning(
                "%s: %d of %d comparisons are longer than %d tokens", path, left_out, len(comparisons), max_length
            )
        if config.backbone.opposites:
            try:
                opposites_of(examples)
            except DataError as error:
                raise DataError(f"{path}: {error}") from None
        return examples

    pairs = read(config.data)
    if config.eval_data is not None:
        eval_pairs = read(config.eval_data)
    else:
        groups = opposites_of(pairs) if config.backbone.opposites else [(i,) for i in range(len(pairs))]
        random.Random(config.seed).shuffle(groups)
        cut = max(1, len(groups) // 20)
        if len(groups) < 2:
            one = "pair of opposites" if config.backbone.opposites else "comparison"
            raise DataError(
                f"{config.data}: only one {one} of at most {max_length} tokens, but one is needed to train on and "
                "another to measure accuracy on; give more, or give --eval-data"
            )
        eval_pairs, pairs = ([pairs[i] for group in part for i in group] for part in (groups[:cut], groups[cut:]))
    names = sorted({name for pair in pairs for name in pair.labels})
    stages = config.stages or (STAGES if names else STAGES[:1])
    if "heads" in stages and not names:
        raise DataError(f"{config.data}: no comparison has labels, which training heads needs")
    trained = _with_lora(model, config) if config.has_lora else model
    work = output.with_name(f"{output.name}.unfinished")
    kept = f"{work} keeps what was trained, up to the last checkpoint; the same command continues from there"
    with writing(work, kept):
        _begin_work(work, config)
        metrics = _learn(
            _Run(config, work, quiet), model, trained, reference, tokenizer, (pairs, eval_pairs), stages, names
        )
        shutil.rmtree(work)
    return metrics


def _learn(
    run: _Run,
    model: PreTrainedModel,
    trained: nn.Module,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[list[PairExample], list[PairExample]],
    stages: Sequence[str],
    names: Sequence[str],
) -> dict[str, Any]:
    """Run the stages on ``data`` (to train on, to measure on), write the reward model, and return what was measured.
    ``trained`` is the model, or that with a LoRA."""
    config, dtype, (pairs, eval_pairs) = run.config, model.dtype, data
    metrics: dict[str, Any] = {}
    if "backbone" in stages:
        if not config.has_lora:
            model.float()  # small updates are lost in half precision; a LoRA has weights of its own
        run.backbone(trained, reference, pairs, eval_pairs)
    adapter = run.work / "adapter"
    if config.has_lora:
        _save_lora(trained, adapter, config.model)
        model = trained.merge_and_unload()
    model.eval()
    if "backbone" in stages:
        metrics["backbone"] = measure_ranking(model, None if config.backbone.opposites else reference, eval_pairs)
    heads = None
    if "heads" in stages:
        headed = run.heads(HeadedModel(model, names), reference, pairs, eval_pairs)
        metrics["heads"] = measure_heads(headed, reference, eval_pairs)
        heads = headed.tensors()
    record = {"settings": dataclasses.asdict(config), "metrics": metrics, "num_comparisons": len(pairs)}
    defaults = {"prompt_template": config.prompt_template, "insert_after": config.insert_after, "reference": "base"}
    defaults = {key: value for key, value in defaults.items() if value is not None}
    export(config.output, adapter if config.has_lora else model.to(dtype), tokenizer, heads, record, defaults)
    return metrics


def another_tokenizer(reference: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a reference, if it differs from the reward model's. A reference without a tokenizer reads the
    reward model's tokens."""
    try:
        theirs = AutoTokenizer.from_pretrained(reference)
    except (OSError, ValueError):
        return None
    return None if same_ordinary_tokens(theirs, tokenizer) else theirs


def measure_ranking(model: nn.Module, reference: nn.Module | None, pairs: Sequence[PairExample]) -> dict[str, float]:
    """How often the chosen answer has the higher reward: over all comparisons, and where a dimension alone decides.

    Without a reference: how often two opposites are told apart, of which each has the sum of their margins.
    """
    margins = reward_margins(model, reference, pairs)
    if reference is None:
        for i, j in opposites_of(pairs):
            margins[[i, j]] = margins[i] + margins[j]
    correct = defaultdict(list)
    for pair, margin in zip(pairs, margins.tolist(), strict=True):
        correct["accuracy"].append(margin > 0)
        if len(pair.labels) == 1:
            correct[f"accuracy_{next(iter(pair.labels))}"].append(margin > 0)
    return {name: sum(values) / len(values) for name, values in sorted(correct.items())}


def measure_heads(model: HeadedModel, reference: nn.Module, pairs: Sequence[PairExample]) -> dict[str, float]:
    """How often each head alone, at weight 1 or -1, rewards the answer that has more, or less, of its dimension."""
    accuracy = {}
    for i, name in enumerate(model.names):
        seen, users = users_of(
            [p._replace(labels={name: p.labels[name]}) for p in pairs if name in p.labels], [name], 0
        )
        if seen:
            weights = torch.zeros(len(seen), len(model.names))
            weights[:, i] = users[:, 0]
            accuracy[f"accuracy_{name}"] = (reward_margins(model, reference, seen, weights) > 0).float().mean().item()
    return accuracy


class _Run:
    """One run's stages, each with checkpoints of its own under ``work``."""

    def __init__(self, config: TrainingConfig, work: Path, quiet: bool) -> None:
        self.config, self.work, self._quiet = config, work, quiet

    def backbone(
        self,
        model: nn.Module,
        reference: PreTrainedModel,
        pairs: list[PairExample],
        eval_pairs: list[PairExample],
    ) -> None:
        """Train all weights of ``model``, or its LoRA."""
        held_against = None if self.config.backbone.opposites else reference
        self._train("backbone", model, reference, pairs, lambda m: measure_ranking(m, held_against, eval_pairs))

    def heads(
        self, model: HeadedModel, reference: PreTrainedModel, pairs: list[PairExample], eval_pairs: list[PairExample]
    ) -> HeadedModel:
        seen, users = users_of(pairs, model.names, self.config.seed)
        self._train("heads", model, reference, seen, lambda m: measure_heads(m, reference, eval_pairs), users)
        return model

    def _train(
        self,
        name: str,
        model: nn.Module,
        reference: PreTrainedModel,
        pairs: list[PairExample],
        measure: Callable[[nn.Module], dict[str, float]],
        weights: torch.Tensor | None = None,
    ) -> None:
        stage: Stage = getattr(self.config, name)
        folder = self.work / name
        parts = int(self.config.trainer.get("gradient_accumulation_steps", 1))  # batches that a step reads
        args = training_arguments(
            folder,
            steps=max(1, round(stage.epochs * len(pairs) / (stage.batch_size * parts))),
            batch_size=stage.batch_size,
            lr=stage.lr,
            seed=self.config.seed,
            save_steps=self.config.save_steps,
            eval_steps=self.config.save_steps,
            **SAVING,
            **({"disable_tqdm": self._quiet} | self.config.trainer),
        )
        trainer = PADTrainer(
            model,
            reference,
            pairs,
            args,
            beta=stage.beta,
            nll_weight=stage.nll_weight,
            opposites=stage.opposites,
            weights=weights,
            measure=measure,
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))


def _with_lora(model: PreTrainedModel, config: TrainingConfig) -> PeftModel:
    peft = import_peft()
    if config.adapter is not None:
        try:
            return adapted(model, config.adapter, is_trainable=True)
        except Exception as error:
            raise ValueError(f"--adapter={config.adapter!r} does not fit {config.model}: {one_line(error)}") from error
    torch.manual_seed(config.seed)
    rank = config.lora_rank
    return peft.get_peft_model(
        model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def _save_lora(model: PeftModel, folder: Path, base: str) -> None:
    """The adapter, which names its base so that it is found from everywhere: by hub id, or by the whole path."""
    (config,) = model.peft_config.values()
    config.base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    model.save_pretrained(str(folder))


def _begin_work(work: Path, config: TrainingConfig) -> None:
    """Make the folder of this run's checkpoints; ValueError if those of another run are there."""
    settings = dataclasses.asdict(config)
    for name in ("data", "eval_data"):
        path = Path(settings[name] or "")
        if path.is_file():
            settings[name] = [settings[name], hashlib.sha256(path.read_bytes()).hexdigest()]
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    work.mkdir(parents=True, exist_ok=True)
    file = work / "settings.json"
    if file.exists() and file.read_text() != text:
        raise ValueError(
            f"{work} holds an unfinished run with other settings or data: remove it, or name another output"
        )
    if not file.exists():
        part = file.with_suffix(".part")
        part.write_text(text)
        part.rename(file)
