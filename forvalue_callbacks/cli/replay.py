"""`forvalue replay`: what a run file says, again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module

from ..data.files import DataError
from . import COMMANDS

FIRST = re.compile(r"# forvalue (\w+) --config ")


def replay(argv: Sequence[str]) -> None:
    """The command: a run file, and flags that replace some of its own."""
    name, *more = argv or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: {COMMANDS['replay'][2]} [--FLAG VALUE ...]\n\n{COMMANDS['replay'][0].capitalize()}. Flags win.")
        return
    with open(name, encoding="utf-8") as file:
        found = FIRST.match(file.readline())
    if found is None or found[1] not in COMMANDS:
        raise DataError(
            f"{name} is no run file: its first line names no command of forvalue. Give one that lies "
            "beside a result, as kept.run.yaml."
        )
    command = import_module(f".{COMMANDS[found[1]][1]}", __package__)
    getattr(command, found[1])(["--config", name, *more])
