"""Which groups have programs of their own: those of hundreds and thousands of members, found once for two tokenizers.

:mod:`.fused_large_groups` scores them; :mod:`.groups` finds its own in each step.
"""

from __future__ import annotations

import torch

from .types import LargeGroups

LARGE_ON_DEVICE = 512
"""Members of a group that has programs of its own."""
BLOCK_M = 64
"""Members of a program."""


def find_large(starts: torch.Tensor, most: int = LARGE_ON_DEVICE) -> LargeGroups | None:
    """Of the ``starts`` of :class:`.types.Groups`, those of more than ``most`` members; reads them. None: there are
    none."""
    bounds = starts.tolist()
    sizes = starts[1:] - starts[:-1]
    large = (sizes > most).nonzero().flatten().tolist()
    if not large:
        return None
    index = torch.full((len(sizes),), -1, dtype=torch.int32)
    blocks, first = [], [0]
    for i, group in enumerate(large):
        index[group] = i
        begins = range(bounds[group], bounds[group + 1], BLOCK_M)
        blocks += [(group, i, begin, min(begin + BLOCK_M, bounds[group + 1])) for begin in begins]
        first.append(len(blocks))
    parts = (index, torch.tensor(blocks, dtype=torch.int32), torch.tensor(first, dtype=torch.int32))
    return LargeGroups(*(part.to(starts.device) for part in parts))
