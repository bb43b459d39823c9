"""Several processes that score together: who they are, and failing together instead of waiting for each other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

# Seconds in which ranks that live come where an exchange has failed.
ANSWER = 2.0
_Error = TypeVar("_Error", bound=BaseException)


def world() -> tuple[int, int]:
    """This rank and the number of ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def of_all_ranks(mine: Any, what: str) -> list[Any]:
    """What each rank has, in the order of the ranks, on every rank.

    Args:
        what: what is done, in a few words: ranks that meet over different things have gone different ways.

    Raises:
        RuntimeError: a rank has failed in place of coming here, is doing something else, or is gone; says which and
            why.
    """
    if world()[1] == 1:
        return [mine]
    ranks = _meet((what, None, mine))
    for rank, (doing, failure, _) in enumerate(ranks):
        if failure is not None:
            raise _known(RuntimeError(f"rank {rank} failed while {doing}, so all ranks stop: {failure}"))
    for rank, (doing, _, _) in enumerate(ranks):
        if doing != ranks[0][0]:
            raise _known(
                RuntimeError(
                    f"rank {rank} is {doing} while rank 0 is {ranks[0][0]}: every rank must make the same calls, with "
                    "the same settings."
                )
            )
    return [mine for _, _, mine in ranks]


def of_first_rank(mine: Any, what: str) -> Any:
    """What the first rank has, on every rank.

    Raises:
        RuntimeError: as `of_all_ranks`.
    """
    if world()[1] == 1:
        return mine
    of_all_ranks(None, what)  # where a failure can be told; what the first rank has is sent once, and not by all
    box = [mine]
    with answering(what):
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


class Together:
    """What ranks do each for themselves until they exchange what they have."""

    def __init__(self, what: str):
        self.what = what
        self.met = False

    def exchange(self, mine: Any) -> list[Any]:
        """What each rank has; raises what `of_all_ranks` does."""
        self.met = True
        return of_all_ranks(mine, self.what)


@contextmanager
def together(what: str, sharded: bool = False) -> Iterator[Together]:
    """Where one rank fails all of them raise, at the latest at the end, and none waits for it.

    A rank that fails tells the others where they meet next, in here or in what this is part of.

    Args:
        what: what is done, in a few words.
        sharded: the model's own collectives are in it, so a rank that fails cannot meet the others: it raises, and
            they do once it is gone.
    """
    work = Together(what)
    try:
        yield work
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # a process may live on after any of them
        if world()[1] > 1 and not sharded and not hasattr(error, _KNOWN):
            with suppress(Exception):  # a rank that is gone cannot be told
                _meet((what, f"{type(error).__name__}: {error}", None))
        _known(error)
        raise
    if not work.met:
        work.exchange(None)


# On an exception: the other ranks need not be told of it.
_KNOWN = "known_to_all_ranks"


def _known(error: _Error) -> _Error:
    setattr(error, _KNOWN, True)
    return error


def _meet(mine: tuple[str, str | None, Any]) -> list[tuple[str, str | None, Any]]:
    """What each rank does, why it failed if it has, and what it has."""
    ranks: list[Any] = [None] * world()[1]
    with answering(mine[0]):
        torch.distributed.all_gather_object(ranks, mine)
    return ranks


@contextmanager
def answering(what: str) -> Iterator[None]:
    """Around an exchange among ranks, which fails with the addresses of processes where one is gone.

    Raises:
        RuntimeError: in its place, with the rank's number.
    """
    try:
        yield
    except RuntimeError as error:
        silent = " and ".join(f"rank {rank}" for rank in _silent()) or "a rank"
        raise _known(
            RuntimeError(
                f"no answer from {silent} (killed?) while rank {world()[0]} is {what}, so all ranks stop: look at the "
                "log and the memory there."
            )
        ) from error


def _silent() -> list[int]:
    """Ranks that do not come here within `ANSWER`: those that live do, as an exchange fails on one after the other."""
    me, n_ranks = world()
    silent = [rank for rank in range(n_ranks) if rank != me]
    with suppress(Exception):  # what keeps the answers may have been in the process that is gone
        # There is no public way to what the process group was made with; `tests/attack/test_ranks_broken.py` uses it.
        store = torch.distributed.distributed_c10d._get_default_store()
        store.set(f"forvalue_callbacks/{me}", "here")
        end = time.monotonic() + ANSWER
        while silent and time.monotonic() < end:
            silent = [rank for rank in silent if not store.check([f"forvalue_callbacks/{rank}"])]
            time.sleep(0.05)
    return silent


def refuse_other(what: str, mine: str) -> None:
    """Raises ValueError on every rank unless all of them have the same.

    Args:
        what: what it is that must be the same.
        mine: its digest on this rank.
    """
    ranks = of_all_ranks(mine, f"comparing {what}")
    for rank, other in enumerate(ranks):
        if other != ranks[0]:
            raise ValueError(f"rank {rank} has other {what} than rank 0: every rank must be given the same {what}.")


def refuse_other_settings(mine: Mapping[str, Any]) -> None:
    """Raises ValueError, which names them, on every rank unless all of them have the same settings."""
    ranks = of_all_ranks({name: repr(value) for name, value in mine.items()}, "comparing settings")
    for rank, other in enumerate(ranks):
        differ = [name for name in {**ranks[0], **other} if other.get(name) != ranks[0].get(name)]
        if differ:
            raise ValueError(
                f"rank {rank} has other settings than rank 0 ({', '.join(differ)}): every rank must be given the same."
            )


def refuse_other_rows(ranks: Sequence[list[tuple[str, str | None]] | None], start: int, of: str = "") -> None:
    """Raises ValueError unless all ranks have read the same rows.

    Args:
        ranks: of each the digest and the reason of every row, None where there are no rows left.
        start: place of the first row.
        of: what the rows are for, "validation ".
    """
    first = ranks[0]
    for rank, other in enumerate(ranks):
        for place, (here, there) in enumerate(zip(first or [], other or [], strict=False)):
            if (here[0], here[1] is None) != (there[0], there[1] is None):
                reasons = f" (rank 0: {here[1] or 'fine'}; rank {rank}: {there[1] or 'fine'})"
                why = "" if here[1] == there[1] else reasons
                raise ValueError(
                    f"{of}row {start + place} is another on rank {rank} than on rank 0{why}: every rank must be given "
                    "the same rows in the same order (each takes its share of them)."
                )
        n, n_other = (start + len(rows or []) for rows in (first, other))
        if n != n_other:
            raise ValueError(
                f"rank {rank} has {'more' if n_other > n else 'fewer'} {of}rows than rank 0, from row "
                f"{min(n, n_other)} on: every rank must be given all the rows (each takes its share of them)."
            )
