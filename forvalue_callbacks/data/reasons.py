"""Why a row cannot be scored: text for logs and files, in which nothing of the row itself is quoted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from traceback import walk_tb

LONGEST = 400


class UnscorableError(Exception):
    """Why one row cannot be scored; never leaves this package."""


class SetUpError(UnscorableError):
    """A reason that is one of the whole data set where all its rows have such."""


class NotFiniteError(ValueError):
    """Rows of which the model's hidden states or logits are not finite.

    Args:
        rows: their places; none: it was said of one row alone.
    """

    def __init__(self, text: str, rows: Iterable[int] = ()):
        super().__init__(text)
        self.rows = sorted(rows)


def printable(reason: str) -> str:
    """A reason without control characters and halves of characters, which logs and files do not bear."""
    text = "".join(letter if letter.isprintable() else "?" for letter in reason)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def place_of(error: BaseException) -> str:
    """Type of an exception and where it comes from; not its text, which may quote the row.

    The place is the line of a chat template, or else of the innermost code that is in no installed package, if any is.
    """
    frames = [(frame.f_code, line) for frame, line in walk_tb(error.__traceback__)][1:]  # without who caught it
    name = type(error).__name__
    templates = [line for code, line in frames if code.co_filename == "<template>"]
    if templates:
        return f"{name} in line {templates[-1]} of the chat template"
    own = [(code, line) for code, line in frames if "site-packages" not in code.co_filename]
    if not frames:
        return name
    code, line = (own or frames)[-1]
    return f"{name} in {code.co_name} ({Path(code.co_filename).name}, line {line})"
