"""An error in one line."""

from __future__ import annotations


def one_line(error: BaseException) -> str:
    """An error's own words without line breaks, and without the frame that pydantic puts around them."""
    errors = getattr(error, "errors", None)
    words = errors()[0]["msg"] if type(error).__name__ == "ValidationError" and callable(errors) else str(error)
    return " ".join(words.split()) or type(error).__name__
