"""Results that are kept, as many as fit into a number of bytes."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

ENTRY_BYTES = 512
"""Of an entry beside its texts and ids, about."""


class Memo:
    """A function of hashable arguments whose results are kept, the least recently used leaving first. What raises is
    not kept.

    Args:
        function: what gives a result.
        max_bytes: of all arguments and results.
        size: bytes of a call's arguments and its result.
    """

    def __init__(self, function: Callable[..., Any], max_bytes: int, size: Callable[[tuple, Any], int]) -> None:
        self.function, self.max_bytes, self.size = function, max_bytes, size
        self.num_bytes = 0
        self._kept: OrderedDict[tuple, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0

    def __call__(self, *args: Any) -> Any:
        with self._lock:
            if (kept := self._kept.get(args)) is not None:
                self._kept.move_to_end(args)
                return kept[0]
        result = self.function(*args)
        num_bytes = self.size(args, result)
        with self._lock:
            if args not in self._kept and num_bytes <= self.max_bytes:
                self._kept[args] = result, num_bytes
                self.num_bytes += num_bytes
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._kept.popitem(last=False)[1][1]
        return result


def size_of(args: tuple, result: Any) -> int:
    """Bytes of texts and token ids, which may stand in tuples; an id is an object of its own."""
    return ENTRY_BYTES + _size((args, result))


def _size(value: Any) -> int:
    return 8 + sys.getsizeof(value) + (sum(map(_size, value)) if isinstance(value, tuple) else 0)
