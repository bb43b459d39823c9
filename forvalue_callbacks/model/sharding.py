"""Weights that lie on several ranks, each with a share of them: who has them, and whole for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel


def unwrapped(model: nn.Module) -> Any:
    """Without DDP, FSDP1, DeepSpeed's engine and compilation, however they are nested."""
    while (inner := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inner
    return model


def holder_of(model: nn.Module) -> nn.Module:
    """What holds the weights of a model: FSDP1's wrapper around all of it, or else the model without wrappers."""
    inner = unwrapped(model)
    wrappers = (module for module in model.modules() if isinstance(module, FullyShardedDataParallel))
    return next((wrapper for wrapper in wrappers if unwrapped(wrapper) is inner), inner)


def is_sharded(holder: nn.Module) -> bool:
    """Whether a forward pass needs all ranks: FSDP, ZeRO-3, tensor parallelism."""
    if any(isinstance(module, (FullyShardedDataParallel, FSDPModule)) for module in holder.modules()):
        return True
    return any(hasattr(p, "placements") or hasattr(p, "ds_id") for p in holder.parameters())


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Weights that FSDP1 keeps for a module, but for those of wrappers inside it, are whole: parts of the module can
    be run by themselves, and read. To be entered on all ranks alike."""
    if not isinstance(module, FullyShardedDataParallel):
        yield
        return
    with FullyShardedDataParallel.summon_full_params(module, recurse=False, writeback=False):
        yield


def whole(tensor: Any) -> Tensor:
    """The tensor itself, gathered first where FSDP2 has sharded it (a DTensor)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def named_parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of a module by the names that they have without FSDP1, "" for what a wrapper wraps."""
    if isinstance(module, FullyShardedDataParallel):
        return [("", module.module)]
    return list(module.named_children())
