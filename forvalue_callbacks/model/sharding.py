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


def dtype_of(holder: nn.Module) -> str | None:
    """The dtype that FSDP1 gives weights for a forward pass, as `torch` calls it; None: they stay what they are."""
    if not isinstance(holder, FullyShardedDataParallel) or holder.mixed_precision.param_dtype is None:
        return None
    return str(holder.mixed_precision.param_dtype).removeprefix("torch.")


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Weights that FSDP1 keeps for a module, but for those of wrappers inside it, are whole: parts of the module can
    be run by themselves, and read. To be entered on all ranks alike."""
    if not isinstance(module, FullyShardedDataParallel):
        yield
        return
    with FullyShardedDataParallel.summon_full_params(module, recurse=False, writeback=False):
        yield


@contextmanager
def readable(module: nn.Module, recurse: bool = False) -> Iterator[None]:
    """As `gathered`, and what ZeRO-3 keeps of a module's weights, with `recurse` of all in it, is whole too: it
    gathers by itself what is run, and not what is read."""
    partitioned = [p for p in module.parameters(recurse) if hasattr(p, "ds_id")]
    with gathered(module):
        if not partitioned:
            yield
            return
        import deepspeed  # where there are such weights, there it is

        with deepspeed.zero.GatheredParameters(partitioned):
            yield


def goes_again(holder: nn.Module) -> bool:
    """Whether weights that are whole for a while lie elsewhere after it."""
    if any(isinstance(module, FullyShardedDataParallel) for module in holder.modules()):
        return True
    return any(hasattr(p, "ds_id") for p in holder.parameters())


def refuse_shares(name: str, holder: nn.Module, head: nn.Module) -> None:
    """Raises ValueError for a model that cannot run for one rank's rows: each has its own.

    Args:
        name: the model's.
        head: its output head.
    """
    by_fsdp2 = any(isinstance(module, FSDPModule) for module in holder.modules())
    split = not by_fsdp2 and any(hasattr(p, "placements") for p in holder.parameters())
    if split or (getattr(holder, "tp_size", None) or 1) > 1:
        raise ValueError(
            f"{name} is split by tensor parallelism, where all ranks run the same rows, and For-Value gives each rank "
            "its own: load it without tp_plan, in one process with device_map='auto' or sharded by FSDP."
        )
    weight: Any = getattr(head, "weight", None)
    if hasattr(weight, "ds_id") and not hasattr(head, "ds_id"):  # engines mark the modules that they gather for
        raise ValueError(
            f"{name}: DeepSpeed ZeRO-3 has shared its weights out, and no engine gathers them yet. Use "
            "ForValueCallback, which scores once the trainer has made the engine, or load the model whole."
        )
    if isinstance(holder, FullyShardedDataParallel) or not isinstance(weight, Tensor):
        return
    inside = any(isinstance(module, FullyShardedDataParallel) for module in holder.modules())
    if inside and (weight.ndim != 2 or weight.untyped_storage().nbytes() == 0):
        raise ValueError(
            f"{name} is what FSDP has wrapped, and its weights are here in part: give the wrapper (what "
            "accelerator.prepare returns, trainer.model_wrapped) in place of the model in it."
        )


def whole(tensor: Any) -> Tensor:
    """The tensor itself, gathered first where FSDP2 has sharded it (a DTensor)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def named_parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of a module by the names that they have without FSDP1, "" for what a wrapper wraps."""
    if isinstance(module, FullyShardedDataParallel):
        return [("", module.module)]
    return list(module.named_children())
