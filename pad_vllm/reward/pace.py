"""Which steps are the step before, a token further: what was made for that one is then counted up, not made again."""

from __future__ import annotations

import numpy as np

ALONE = -1
"""The number of a step, or a part of one, that no other follows."""


class Pace:
    """Numbers the steps of an engine.

    A step has the number that follows its predecessor's where the same requests are guided in the same rows, each with
    one row and one token more; any other skips a number. Only the runners' adapters give numbers, since only they see
    requests come, go and move.

    So whoever keeps what it made for step n (a batch's rows, the blocks' owners, the decoder's buffers) keeps n beside
    it, and may count it up by one for step n + 1 if nothing else that it was made of has changed: positions left in
    the context; for the decoder the blocks, whose ``BlockManager.version`` is another one whenever a context's are.
    Whatever is done for a part of a step, or over again, is numbered ALONE.
    """

    def __init__(self) -> None:
        self.number = 0

    def further(self) -> int:
        """The step is the last one, a token further."""
        self.number += 1
        return self.number

    def changed(self) -> int:
        """It is another one."""
        self.number += 2
        return self.number


class Lengths:
    """Tokens of sequences, of which each gets one more in a step that follows the last one.

    Their array is made where it is read. A step that only counts up reads none: on a CPU a forward has emptied the
    caches, so numpy's first addition after it is slow.

    Args:
        tokens: [N] int64.
    """

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens, self._further = tokens, 0

    def advance(self) -> None:
        """Each sequence is a token longer."""
        self._further += 1

    def array(self) -> np.ndarray:
        """[N] int64"""
        if self._further:
            self._tokens, self._further = self._tokens + self._further, 0
        return self._tokens
