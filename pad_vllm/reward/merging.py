"""A PEFT LoRA folder merged into the tensors of the model that it was made for, one by one, while these are loaded.

W + s B A for each matrix with a pair of them, in float32; what ``modules_to_save`` holds takes the place of the
model's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from pad_vllm.reward.adapters import LORA_PARTS, AdapterFolder, module_of

FULL = ".modules_to_save.default"
"""What older releases of PEFT write into the names of tensors that they save whole."""


class Merge:
    """The tensors of one adapter.

    Raises:
        ValueError: they cannot be read.
    """

    def __init__(self, folder: AdapterFolder) -> None:
        self.folder = folder
        self.pairs: dict[str, dict[str, torch.Tensor]] = {}
        self.full: dict[str, torch.Tensor] = {}
        for name, tensor in _read(Path(folder.path)).items():
            target = f"{module_of(name)}.weight"
            part = next((part for part in LORA_PARTS if part in name), "")
            if part:
                self.pairs.setdefault(target, {})[part.removeprefix("lora_")] = tensor
            else:
                self.full[name.removeprefix("base_model.model.").replace(FULL, "")] = tensor

    def apply(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """A checkpoint's tensors by name, with the adapter in them.

        Raises:
            ValueError: the adapter has something for a tensor that is not there, or of another shape; or a tensor is
                quantized, which cannot be added to.
        """
        left, full = set(self.pairs), dict(self.full)
        for name, tensor in weights:
            if name in full:
                tensor = self._fitting(name, full.pop(name), tensor)
            if name in left:
                left.remove(name)
                tensor = self._merged(name, tensor)
            yield name, tensor
        if left:
            raise ValueError(
                f"pad.reward_model={self.folder.path!r}: the adapter changes {', '.join(sorted(left)[:3])}"
                f"{' and others' if len(left) > 3 else ''}, which are not plain matrices of the model that it is "
                "merged into; set pad.adapter_base to that model, unquantized"
            )
        yield from full.items()  # as the output head of a model whose head was its embedding

    def _merged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        pair, (_, scaling) = self.pairs[name], self.folder.peft.get_rank_and_scaling(name.removesuffix(".weight"))
        if "embedding_A" in pair:
            delta = (pair["embedding_B"].float() @ pair["embedding_A"].float()).T
        else:
            delta = pair["B"].float() @ pair["A"].float()
        if tensor.shape != delta.shape and tensor.shape == delta.T.shape:
            delta = delta.T  # fan_in_fan_out
        if not tensor.is_floating_point() or tensor.shape != delta.shape:
            raise ValueError(
                f"pad.reward_model={self.folder.path!r}: the adapter's change to {name} has the shape "
                f"{list(delta.shape)}, but the model that it is merged into has {list(tensor.shape)} in "
                f"{str(tensor.dtype).removeprefix('torch.')} there; set pad.adapter_base to the model that it was made "
                "for, unquantized"
            )
        return (tensor.float() + scaling * delta.to(tensor.device)).to(tensor.dtype)

    def _fitting(self, name: str, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        if ours.shape != theirs.shape:
            raise ValueError(
                f"pad.reward_model={self.folder.path!r}: its own {name} has the shape {list(ours.shape)}, but the "
                f"model's has {list(theirs.shape)}"
            )
        return ours.to(theirs.dtype)


def _read(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "adapter_model.safetensors"
    if file.is_file():
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    if (file := folder / "adapter_model.bin").is_file():
        return torch.load(file, map_location="cpu", weights_only=True)
    raise ValueError(f"pad.reward_model={str(folder)!r}: no adapter_model.safetensors in it")
