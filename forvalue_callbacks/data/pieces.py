"""The text of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What decoders put where bytes are no whole character, as those of a token that is a part of one.
NO_CHARACTER = "\ufffd"


def pieces(processing_class: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Text of each token: all of them, one after the other, are the text of the tokens.

    Where several tokens make one character the last of them has it, and the others nothing.

    Args:
        processing_class: tokenizer or processor; without one that decodes, ids are given as text.
        ids: of the tokens.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)  # a processor's
    if not hasattr(tokenizer, "decode"):
        return tuple(str(token) for token in ids)

    def text(start: int, end: int) -> str:
        return tokenizer.decode(list(ids[start:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # Each is what decoding becomes longer by, behind the piece before it: some tokenizers give no space to the first.
    out: list[str] = []
    before, start = 0, 0  # where the last piece began, and where the next does
    for end in range(1, len(ids) + 1):
        known, found = text(before, start), text(before, end)
        if found.endswith(NO_CHARACTER) and end < len(ids):
            out.append("")
            continue
        out.append(found[len(known) :])
        before, start = start, end
    return tuple(out)
