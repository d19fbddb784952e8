"""Value heads: the linear maps on the hidden state that carry a user's weights, R = w_p . phi.

With phi(s, a) = h(s) * e_a, elementwise, w_p . phi is (w_p * h) . e_a: a map on the hidden state before lm_head. The
released PAD checkpoint has one, a matrix and a bias under ``v_head.summary``. Linear in w, so a user can be a mix of
several: sum_i a_i (W_i h + b_i).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from pad_vllm.reward.folder import files_beside

HEAD_FILES = ("value_head.safetensors", "heads.safetensors")
"""Where heads are looked for beside a model, in this order."""

RELEASED_HEAD = "v_head.summary"
BACKBONE_HEAD = "backbone"
"""The name of training's identity head; weight 1 leaves the backbone's hidden state as it is."""


@dataclass(frozen=True)
class ValueHeads:
    """Named heads, in the order of their file.

    ``weight`` is [num_heads, hidden_size, hidden_size], or [num_heads, hidden_size] where every head is diagonal;
    ``bias`` is [num_heads, hidden_size]; both float32.
    """

    names: tuple[str, ...]
    weight: torch.Tensor
    bias: torch.Tensor

    @property
    def default_weights(self) -> tuple[float, ...] | None:
        """What applies to a request without weights: a single head; of several, none."""
        return (1.0,) if len(self.names) == 1 else None


def locate_heads(heads: str | None, reward_model: str, revision: str | None) -> Path | None:
    """The file of value heads: the one named, or the one found beside the model, or None.

    Raises:
        ValueError: the one named does not exist.
    """
    if heads is not None:
        if not Path(heads).is_file():
            raise ValueError(f"pad.heads={heads!r}: no such file")
        return Path(heads)
    return next(iter(files_beside(reward_model, revision, HEAD_FILES)), None)


def tensor_names_beside(reward_model: str, revision: str | None) -> frozenset[str]:
    """Names of all tensors in value-head files beside a model: vLLM's loader would take them for the backbone's."""
    names: set[str] = set()
    for path in files_beside(reward_model, revision, HEAD_FILES):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return frozenset(names)


def load_heads(path: Path, hidden_size: int, device: torch.device | str = "cpu") -> ValueHeads:
    """Read ``<name>.weight`` ([hidden_size, hidden_size], or [hidden_size] for w_p of the paper's elementwise form)
    and the optional ``<name>.bias`` ([hidden_size]) of every head in a safetensors file.

    Raises:
        ValueError: the file cannot be read, holds no head, or a tensor does not fit; the message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).to(torch.float32) for key in file.offset_keys()}
    except Exception as error:
        raise ValueError(f"heads {str(path)!r}: not a readable safetensors file ({error})") from None
    names = [key.removesuffix(".weight") for key in tensors if key.endswith(".weight")]
    strays = set(tensors) - {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    if not names or strays:
        raise ValueError(
            f"heads {str(path)!r}: expected pairs '<name>.weight', '<name>.bias', found {sorted(strays or tensors)}"
        )
    diagonal = all(tensors[f"{name}.weight"].dim() == 1 for name in names)
    weight = torch.empty(len(names), *[hidden_size] * (1 if diagonal else 2))
    bias = torch.zeros(len(names), hidden_size)
    for i, name in enumerate(names):
        w = tensors[f"{name}.weight"]
        w = torch.diag(w) if w.dim() == 1 and not diagonal else w
        b = tensors.get(f"{name}.bias", bias[i])
        if w.shape != weight.shape[1:] or b.shape != (hidden_size,) or not (w.isfinite().all() and b.isfinite().all()):
            raise ValueError(
                f"heads {str(path)!r}: head {name!r} has weight {list(w.shape)} and bias {list(b.shape)}; the reward "
                f"model's hidden size is {hidden_size}, so finite [{hidden_size}, {hidden_size}] and [{hidden_size}] "
                "are expected"
            )
        weight[i], bias[i] = w, b
    public = tuple(map(public_name, names))
    if twice := next((name for name in public if public.count(name) > 1), None):
        both = [repr(name) for name, shown in zip(names, public, strict=True) if shown == twice]
        raise ValueError(
            f"heads {str(path)!r}: {' and '.join(both)} both mean the head {twice!r} in a request; rename one"
        )
    return ValueHeads(public, weight.to(device), bias.to(device))


def public_name(name: str) -> str:
    """What requests and users call a head of a file."""
    return "summary" if name == RELEASED_HEAD else name.removeprefix("heads.")


def check_head_name(name: str) -> None:
    """Raise ValueError for the name of a dimension that a file of heads, and who reads it, would not keep apart."""
    if not name or name == BACKBONE_HEAD or public_name(name) != name or name.endswith((".weight", ".bias")):
        raise ValueError(
            f"no dimension can have this name: {BACKBONE_HEAD!r} is the head of the backbone, {RELEASED_HEAD!r} and "
            "'heads.' have a meaning in files of heads, and '.weight' and '.bias' end the names of tensors"
        )
