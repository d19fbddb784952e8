"""LoRA adapters of the reward model: all resident, each context read through one of them or through none.

Formats, layers and kernels are vLLM's. Its own bookkeeping is by request and on the host; here each token's adapter is
known on the device alone where drafts are verified, so that is where :meth:`Adapters.select` writes what kernels read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from vllm.config import LoRAConfig, ModelConfig, VllmConfig
from vllm.config.lora import MaxLoRARanks
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager, create_lora_manager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.utils import get_adapter_absolute_path
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.platforms import current_platform

from pad_vllm.errors import one_line
from pad_vllm.kernels.types import HeadAdapters, OutputHead
from pad_vllm.reward.kind import ADAPTER_CONFIG, adapter_config, tensor_names
from pad_vllm.reward.rows import ContextSlot

RANKS: tuple[int, ...] = get_args(MaxLoRARanks)
"""The values that vLLM's configuration allows for the largest rank, ascending."""
NOT_APART = {
    "embed_tokens": "the embedding, which may be the output head too",
    "experts": "experts, whose weights vLLM changes in place",
}
"""Modules that an adapter cannot change unless it is merged, and why."""
LORA_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
"""What PEFT calls the two matrices of a linear layer, and of an embedding."""
OUTPUT_HEAD = "lm_head"
"""The last part of the output head's name in an adapter."""
NO_ADAPTER = -1


@dataclass(frozen=True)
class AdapterFolder:
    """A PEFT LoRA folder that vLLM can load."""

    key: str
    """The key of the configuration that names it"""
    path: str
    peft: PEFTHelper
    modules: frozenset[str]
    """Modules for which it has weights, by their names in its base model"""

    @property
    def rank(self) -> int:
        return max([self.peft.r, *self.peft.rank_pattern.values()])


def read_folder(key: str, path: str, is_merged: bool = False) -> AdapterFolder:
    """Read a PEFT folder's own description; its weights are not read.

    Args:
        key: key of the configuration that names the folder, for an error message.
        is_merged: whether the adapter will be merged into its model. It may then change every part of it, and bring
            modules of its own.

    Raises:
        ValueError: the folder cannot be found, vLLM refuses its kind (in vLLM's words), or it changes a module that an
            adapter cannot change.
    """
    try:
        folder = get_adapter_absolute_path(path)
        config = adapter_config(folder)
        if config is None:
            raise ValueError(f"no {ADAPTER_CONFIG} in it" if os.path.isdir(folder) else "no such folder")
        if is_merged:
            config["modules_to_save"] = None
        if config.get("peft_type", "LORA") != "LORA":
            raise ValueError(f"a PEFT adapter of the type {config['peft_type']}; only LORA is supported")
        peft = PEFTHelper.from_dict(config)
        peft.validate_legal(LoRAConfig(max_lora_rank=RANKS[-1]))
        names = tensor_names(folder, None)
        if names is None:
            raise ValueError("no weights in it")
        modules = frozenset(map(module_of, names))
        if not is_merged:
            _check_targets({part for module in modules for part in module.split(".")})
    except Exception as error:
        raise ValueError(f"{key}={path!r} cannot be an adapter: {one_line(error)}") from None
    return AdapterFolder(key, folder, peft, modules)


def _check_targets(parts: set[str]) -> None:
    for part, what in NOT_APART.items():
        if part in parts:
            raise ValueError(
                f"it changes {part}: {what}; merge it into its model (`pad-vllm convert`), and name that as "
                "pad.reward_model"
            )


def lora_config(folders: tuple[AdapterFolder, ...], model_config: ModelConfig) -> LoRAConfig | None:
    """vLLM's configuration for adapters that are all resident; None for none."""
    if not folders:
        return None
    most = max(folder.rank for folder in folders)
    # On a CPU vLLM reads the last slot for a token without an adapter: one stays empty.
    num = len(folders) + current_platform.is_cpu()
    targets = sorted({_last(module) for folder in folders for module in folder.modules} - {OUTPUT_HEAD})
    return LoRAConfig(
        max_lora_rank=min(rank for rank in RANKS if rank >= most),
        max_loras=num,
        max_cpu_loras=num,
        lora_dtype=model_config.dtype,
        target_modules=targets or None,
    )


def _check_finite(lora: LoRAModel) -> None:
    """Raise ValueError for what is no number. Every context multiplies an output head's change, those of other adapters
    by 0, and 0 times NaN is NaN."""
    for name, weights in lora.loras.items():
        matrices = [one for one in (weights.lora_a, weights.lora_b) if one is not None]
        if not (math.isfinite(weights.scaling) and all(one.isfinite().all() for one in matrices)):
            raise ValueError(f"its change to {name} is not finite in {matrices[0].dtype}")


def module_of(tensor_name: str) -> str:
    """``model.layers.0.mlp.up_proj`` of ``base_model.model.model.layers.0.mlp.up_proj.lora_A.weight``."""
    name = tensor_name.removeprefix("base_model.model.")
    for part in (*LORA_PARTS, "weight", "bias"):
        name = name.partition(f".{part}")[0]
    return name


def _last(module: str) -> str:
    return module.rpartition(".")[2]


class Adapters:
    """The adapters of a reward model: in its layers; those of its output head, which candidates are scored by, apart.

    Args:
        model: the reward model's own instance; vLLM's LoRA layers take the place of some of its modules.
        folders: the adapters; one's index is its number.
        vllm_config: the reward model's, vLLM's current one.

    Raises:
        ValueError: one does not fit; in vLLM's words where it has some.
    """

    def __init__(
        self, model: nn.Module, folders: tuple[AdapterFolder, ...], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        self.vocab_size = vllm_config.model_config.get_vocab_size()
        assert vllm_config.lora_config is not None
        try:
            self.manager: LoRAModelManager = create_lora_manager(
                model,
                max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
                max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
                vocab_size=self.vocab_size,
                lora_config=vllm_config.lora_config,
                vllm_config=vllm_config,
                device=device,
            )
        except Exception as error:
            raise ValueError(
                f"pad.adapters: {type(model).__name__} does not support LoRA adapters: {one_line(error)}"
            ) from error
        of_head: list[tuple[int, LoRALayerWeights]] = []
        for number, folder in enumerate(folders, 1):
            try:
                lora = self._load(folder, number, vllm_config.lora_config)
                _check_finite(lora)
                of_head += [(number - 1, lora.loras.pop(name)) for name in [*lora.loras] if _last(name) == OUTPUT_HEAD]
                self._check(lora)
                self._check_head(of_head, vllm_config.model_config.get_hidden_size())
                self.manager.add_adapter(lora)
                self.manager.activate_adapter(number)
            except Exception as error:
                raise ValueError(
                    f"{folder.key}={folder.path!r} does not fit this reward model: {one_line(error)}"
                ) from error
        self.punica: PunicaWrapperBase = next(iter(self.manager.punica_wrapper_mapping.values()))
        self.numbers = torch.arange(-1, vllm_config.lora_config.max_loras, device=device)
        layers = self.manager.modules.values()
        stacks = [stack for layer in layers for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked)]
        self._head = _side_by_side(of_head, device) if of_head else None
        self.num_bytes = sum(tensor.nbytes for tensor in (*stacks, *(self._head or ())))
        self._selected: torch.Tensor | None = None

    def _load(self, folder: AdapterFolder, number: int, config: LoRAConfig) -> LoRAModel:
        """By vLLM's loader, as its worker's manager calls it."""
        manager, model = self.manager, self.manager.model
        packed = manager.packed_modules_mapping
        expected = {name for module in manager.supported_lora_modules for name in packed.get(module, [module])}
        expected.add(OUTPUT_HEAD)
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        return LoRAModel.from_local_checkpoint(
            folder.path,
            expected,
            peft_helper=folder.peft,
            lora_model_id=number,
            device="cpu",
            dtype=config.lora_dtype,
            model_vocab_size=self.vocab_size,
            weights_mapper=mapper and mapper.get_rename_mapper(),
            skip_prefixes=getattr(model, "lora_skip_prefixes", None),
        )

    def _check(self, lora: LoRAModel) -> None:
        """Raise ValueError for a matrix that has no place in the model, or another shape there: vLLM copies a smaller
        one into a part of its own."""
        places = dict(self._places())
        for name, weights in lora.loras.items():
            if name not in places:
                raise ValueError(f"it has weights for {name}, which is not a linear layer of the reward model")
            a, b = weights.lora_a, weights.lora_b
            if a is None or b is None:
                raise ValueError(f"it has only one of the two LoRA matrices for {name}")
            found, wanted = (b.shape[0], a.shape[1]), places[name]
            if found != wanted:
                raise ValueError(f"its change to {name} has the shape {list(found)}, but the layer has {list(wanted)}")

    def _check_head(self, of_head: list[tuple[int, LoRALayerWeights]], hidden_size: int) -> None:
        for _, weights in of_head:
            found = weights.lora_b.shape[0], weights.lora_a.shape[1]
            if found != (self.vocab_size, hidden_size):
                wanted = [self.vocab_size, hidden_size]
                raise ValueError(f"its change to {OUTPUT_HEAD} has the shape {list(found)}, but the layer has {wanted}")

    def of_head(self, head: OutputHead) -> HeadAdapters | None:
        """Those of an output head, or of a rank's shard of it; None: there are none."""
        if self._head is None:
            return None
        mine = self._head.b[head.vocab_start :][: len(head.weight)]
        b = mine.new_zeros(len(head.weight), mine.shape[1])  # the last shard may be padded
        b[: len(mine)] = mine
        return self._head._replace(b=b)

    def _places(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name of a layer as adapters call it -> its [out, in]."""
        for name, module in self.manager.modules.items():
            parent, _, last = name.rpartition(".")
            base = module.base_layer
            names = self.manager.packed_modules_mapping.get(last, [last])
            sizes = _output_sizes(base)
            if len(names) != len(sizes):
                names, sizes = [last], [sum(sizes)]
            for one, size in zip(names, sizes, strict=True):
                yield f"{parent}.{one}" if parent else one, (size, base.input_size)

    def select(self, numbers: torch.Tensor | None) -> None:
        """Which adapter the next forward's tokens are read through.

        Args:
            numbers: [num_tokens] int64, on the device, each from NO_ADAPTER on; the same tensor holds the same numbers.
                None: no token is read through any.
        """
        if numbers is self._selected and numbers is not None:
            return
        self._selected = numbers
        write = _write_cpu if current_platform.is_cpu() else _write_gpu
        write(self.punica, numbers, self.numbers)


class ContextAdapters:
    """Which adapter each context is read through.

    Args:
        adapters: the reward model's; None: it has none.
        max_num_contexts: at one time.
    """

    def __init__(self, adapters: Adapters | None, max_num_contexts: int, device: torch.device) -> None:
        self.is_there = adapters is not None
        self.numbers = torch.full((max_num_contexts + 1,), NO_ADAPTER, dtype=torch.int64, device=device)
        """[max_num_contexts + 1] by slot; the last stands for no context"""
        self._is_read: np.ndarray = np.zeros(max_num_contexts + 1, bool)

    def begin(self, slot: ContextSlot, number: int, cache_salt: str | None) -> str | None:
        """A context begins; returns the salt that keeps its blocks from contexts through other adapters."""
        if not self.is_there:
            return cache_salt
        self.numbers[slot] = number
        self._is_read[slot] = number != NO_ADAPTER
        return f"{number}:{cache_salt or ''}"

    def of(self, slots: Iterable[int], token_slots: torch.Tensor) -> torch.Tensor | None:
        """[num_tokens] int64, the adapter of each token; None where no context in ``slots`` has one.

        Args:
            slots: of all contexts that the tokens are of.
            token_slots: [num_tokens] int64, each token's.
        """
        return self.numbers[token_slots] if self.is_there and self._is_read[[*slots]].any() else None


def _side_by_side(of_head: list[tuple[int, LoRALayerWeights]], device: torch.device) -> HeadAdapters:
    """Of the output head, each with its adapter's number; no context is read through any yet."""
    weights = [one for _, one in of_head]
    ranks = torch.tensor([len(one.lora_a) for one in weights])
    return HeadAdapters(
        torch.cat([one.lora_a for one in weights]).float().to(device),
        torch.cat([one.lora_b * one.scaling for one in weights], 1).to(device),
        torch.tensor([number for number, _ in of_head]).repeat_interleave(ranks).to(device),
        torch.tensor([NO_ADAPTER], device=device),
    )


def _output_sizes(layer: Any) -> list[int]:
    """Of the matrices in a linear layer, over all ranks."""
    if isinstance(layer, QKVParallelLinear):  # ranks may have copies of key and value heads
        heads = layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads
        return [n * size for n, size in zip(heads, (layer.head_size,) * 2 + (layer.v_head_size,), strict=True)]
    return getattr(layer, "output_sizes", None) or [layer.output_size]


def _write_cpu(punica: Any, numbers: torch.Tensor | None, every: torch.Tensor) -> None:
    """PunicaWrapperCPU: by token, as if decoding."""
    punica.is_prefill = punica.no_lora = numbers is None  # only its prefill asks for no_lora
    if numbers is not None:
        punica._token_lora_indices[: len(numbers)] = numbers
        punica.indices_len[0] = len(numbers)


def _write_gpu(punica: Any, numbers: torch.Tensor | None, every: torch.Tensor) -> None:
    """PunicaWrapperGPU: what ``LoRAKernelMeta.prepare_tensors`` makes, without reading anything back: every adapter
    counts as active, with however many tokens it has."""
    meta = punica.token_mapping_meta
    meta.no_lora_flag_cpu[0] = numbers is None
    if numbers is None:
        return
    num_tokens = len(numbers)
    counts = (numbers.unsqueeze(0) == every.unsqueeze(1)).sum(1)
    meta.token_lora_mapping[:num_tokens] = numbers
    meta.token_indices_sorted_by_lora_ids[:num_tokens] = numbers.argsort(stable=True)
    meta.active_lora_ids[:] = every
    meta.num_tokens_per_lora[:] = counts
    meta.lora_token_start_loc[0] = 0
    meta.lora_token_start_loc[1:] = counts.cumsum(0)
    meta.num_active_loras_cpu[0] = len(every)
