"""Reads of the device by our own code: every way in which it could look at a tensor's values on the host."""

from __future__ import annotations

import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READERS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
READING_OPS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal")


def is_ours(frame) -> bool:
    return frame.f_globals.get("__name__", "").startswith("pad_vllm")


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        frame = sys._getframe(1)
        if func._schema.name in READING_OPS and is_ours(frame):
            self.reads.append(f"{func} at {frame.f_code.co_qualname}")
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self._originals = {name: getattr(torch.Tensor, name) for name in READERS}
        for name, original in self._originals.items():

            def read(tensor, *args, _name=name, _original=original, **kwargs):
                frame = sys._getframe(1)
                if is_ours(frame):
                    self.reads.append(f"{_name} at {frame.f_code.co_qualname}")
                return _original(tensor, *args, **kwargs)

            setattr(torch.Tensor, name, read)
        return super().__enter__()

    def __exit__(self, *exception):
        for name, original in self._originals.items():
            setattr(torch.Tensor, name, original)
        return super().__exit__(*exception)
