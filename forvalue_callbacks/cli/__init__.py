"""`forvalue`: files of rows in, files of rows out. Commands are in modules of their own."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module

# Name: what it does, module, an example as somebody types it.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "score": (
        "score every row by rows that you trust",
        "scoring",
        "forvalue score train.jsonl --validation trusted.jsonl --model Qwen/Qwen2.5-0.5B --out scores.parquet",
    ),
    "select": (
        "score, then write the rows to keep and the rows to drop, byte for byte",
        "select",
        "forvalue select train.jsonl --validation trusted.jsonl --model Qwen/Qwen2.5-0.5B --policy drop:auto "
        "--out kept.jsonl",
    ),
    "report": (
        "what was found, to look at before anything is deleted",
        "look",
        "forvalue report kept.scores.parquet --data train.jsonl --out report.html",
    ),
    "worst": (
        "print the rows that score worst",
        "look",
        "forvalue worst kept.scores.parquet --data train.jsonl --n 20",
    ),
    "compare": (
        "how far scores of the same rows agree",
        "look",
        "forvalue compare gradient.parquet auto.parquet",
    ),
    "demo": (
        "the whole job on generated rows and a tiny model, of which the truth is known",
        "demo",
        "forvalue demo --out forvalue-demo",
    ),
    "recipes": (
        "list the recipes (fine-tuning, comparisons, benchmarks), or run one",
        "recipes",
        "forvalue recipes prefilter_sft --data train.jsonl --validation_data trusted.jsonl",
    ),
    "replay": (
        "do again what a run file says",
        "replay",
        "forvalue replay kept.run.yaml",
    ),
}
EXIT_CODES = "exit codes: 0 done, 1 something is wrong with what was given, 2 usage, 130 interrupted"
# Commands that go on where they were.
RESUMING = ("score", "select", "demo", "replay")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from .. import __version__

        print(f"forvalue-callbacks {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        return _say(f"there is no command {command!r}: one of {', '.join(COMMANDS)} (forvalue --help).", 2)
    try:
        getattr(import_module(f".{COMMANDS[command][1]}", __name__), command)(rest)
        sys.stdout.flush()
    except SystemExit as ended:  # argparse: help, or usage
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else _say(str(ended.code), 1)
    except KeyboardInterrupt:
        on = ": what has been scored is kept, the same command goes on from there" if command in RESUMING else ""
        return _say(f"interrupted{on}.", 130)
    except BrokenPipeError:  # `forvalue worst ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        return _say(explained(error), 1)
    return 0


def explained(error: BaseException) -> str:
    """One line for people."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{text}: the disk is full. Make room and give the same command again: it goes on where it was."
    if isinstance(error, (ValueError, OSError, ImportError)):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"


def usage() -> str:
    """What `forvalue --help` prints."""
    lines = ["forvalue: find the bad rows of a fine-tuning set by forward passes, before training starts", ""]
    lines += [f"  forvalue {name:8s}  {what}" for name, (what, _, _) in COMMANDS.items()]
    lines += ["", "For example:", f"  {COMMANDS['select'][2]}", ""]
    lines += ["forvalue COMMAND --help says more; --debug shows a traceback.", EXIT_CODES]
    return "\n".join(lines)


def _say(text: str, code: int) -> int:
    print(f"forvalue: {text}", file=sys.stderr, flush=True)
    return code
