"""Several processes that score together: who they are, and failing together instead of waiting for each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel


def world() -> tuple[int, int]:
    """This rank and the number of ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def of_all_ranks(mine: Any) -> list[Any]:
    """What each rank has, in the order of the ranks, on every rank."""
    if world()[1] == 1:
        return [mine]
    parts: list[Any] = [None] * world()[1]
    torch.distributed.all_gather_object(parts, mine)
    return parts


def of_first_rank(mine: Any) -> Any:
    """What the first rank has, on every rank."""
    if world()[1] == 1:
        return mine
    box = [mine]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


class Together:
    """What ranks do each for themselves until they exchange what they have."""

    def __init__(self, what: str):
        self.what = what
        self.met = False

    def exchange(self, mine: Any) -> list[Any]:
        """What each rank has.

        Raises:
            RuntimeError: a rank has failed before it came here; says which and why.
        """
        self.met = True
        parts = of_all_ranks((None, mine))
        for rank, (failure, _) in enumerate(parts):
            if failure is not None:
                raise RuntimeError(f"rank {rank} failed while {self.what}, so all ranks stop: {failure}")
        return [part for _, part in parts]


@contextmanager
def together(what: str, sharded: bool = False) -> Iterator[Together]:
    """Where one rank fails before it has exchanged what it has, all of them raise, and none waits for it.

    Args:
        what: what is done, in a few words.
        sharded: the model's own collectives are in it, so a rank that fails cannot meet the others: it raises, and
            they do once it is gone.
    """
    work = Together(what)
    try:
        yield work
    except Exception as error:
        if not sharded and not work.met:
            of_all_ranks((f"{type(error).__name__}: {error}", None))
        raise
    if not work.met:
        work.exchange(None)


def refuse_other(what: str, mine: str) -> None:
    """Raises ValueError on every rank unless all of them have the same.

    Args:
        what: what it is that must be the same.
        mine: its digest on this rank.
    """
    parts = of_all_ranks(mine)
    for rank, other in enumerate(parts):
        if other != parts[0]:
            raise ValueError(
                f"rank {rank} has other {what} than rank 0: every rank must be given the same {what}, in the same "
                "order (each takes its share of them)."
            )


def refuse_other_rows(ranks: Sequence[list[tuple[str, str | None]] | None], start: int) -> None:
    """Raises ValueError unless all ranks have read the same window of rows.

    Args:
        ranks: of each the digest and the reason of every row, None where there are no rows left.
        start: place of the window's first row.
    """
    first = ranks[0]
    for rank, other in enumerate(ranks):
        if (first is None) != (other is None) or (first and other and len(first) != len(other)):
            raise ValueError(f"rank {rank} has more or fewer rows than rank 0: every rank must be given all the rows.")
        for place, (here, there) in enumerate(zip(first or [], other or [], strict=True)):
            if here != there:
                reasons = f" (rank 0: {here[1] or 'fine'}; rank {rank}: {there[1] or 'fine'})"
                why = "" if here[1] == there[1] else reasons
                raise ValueError(
                    f"row {start + place} is another on rank {rank} than on rank 0{why}: every rank must be given the "
                    "same rows in the same order (each takes its share of them)."
                )


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass needs all ranks: FSDP, ZeRO-3, tensor parallelism."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(hasattr(p, "placements") or hasattr(p, "ds_id") for p in model.parameters())
