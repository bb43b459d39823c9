"""Hashes of what scores are made of: the weights of a model, where they lie, and texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
import xxhash
from accelerate.utils import align_module_device, named_module_tensors
from torch import Tensor, nn

from .sharding import named_parts, readable, whole

# A tensor is read as 32-bit integers, a chunk at a time: 256 KB as int64, which stay in the cache of a CPU core.
CHUNK = 2**15
# Chunks in one operation on an accelerator, where a launch must be outweighed: 32 MB as int64.
ACCELERATOR_CHUNKS = 128
# What a trainer, a tokenizer or another version of the stack writes into a config, and no forward pass depends on.
_UNREAD = {"architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id", "torch_dtype"}
_UNREAD |= {"transformers_version", "use_cache"}


def digest(text: str) -> str:
    """Hash of a text, 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(text.encode())


def hash_weights(holder: nn.Module) -> str:
    """Hash of what a model computes: its parameters, buffers and config, and which adapters are on, how much.

    The same in every process and wherever the weights lie, also sharded, or offloaded by accelerate. Tensors are read
    one by one: `state_dict()` would change the weights of bitsandbytes' layers on a CPU.

    Raises:
        ValueError: a tensor that cannot be read, by its name.
    """
    parts = [(name, _hash_tensor(name, tensor)) for name, tensor in _tensors(holder)]
    return digest(repr((sorted(parts), _settings(holder))))


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Parameters and persistent buffers by name; those that are sharded or offloaded are there until the next one."""
    # accelerate's hook loads what it holds, and whole modules where it was set up so
    with readable(module), align_module_device(module):
        for name, tensor in named_module_tensors(module, remove_non_persistent=True):
            yield prefix + name, tensor
            for key, value in _beside(module, tensor).items():
                yield f"{prefix}{name}.{key}", value
        for name, child in named_parts(module):
            yield from _tensors(child, f"{prefix}{name}." if name else prefix)


def _named(module: nn.Module, name: str = "") -> Iterator[tuple[str, Any]]:
    """The module and all in it by the names that they have without FSDP1's wrappers."""
    yield name, module
    for part, child in named_parts(module):
        yield from _named(child, f"{name}.{part}".strip("."))


def _beside(module: nn.Module, tensor: Any) -> dict[str, Any]:
    """What bitsandbytes keeps beside a quantised weight: the scales, and in 4 bits how they are to be read."""
    state = getattr(tensor, "quant_state", None)
    scale = getattr(tensor, "SCB", None)
    if scale is None:  # after the first forward pass it lies in the module
        scale = getattr(getattr(module, "state", None), "SCB", None)
    return (state.as_dict() if state is not None else {}) | ({"SCB": scale} if scale is not None else {})


def _hash_tensor(name: str, tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return digest(repr(tensor))
    try:
        return _hash_values(tensor.detach())
    except Exception as error:  # each library of quantised or sharded tensors refuses in its own way
        raise ValueError(
            f"cannot read the weights of {name} ({type(tensor).__name__}, {tensor.dtype}, on {tensor.device}): "
            f"{error}. Load the model onto a device, or offloaded by accelerate, and not quantised in a way that "
            "keeps its values from being read."
        ) from error


def _hash_values(tensor: Any) -> str:
    tensor = whole(tensor)
    header = f"{tuple(tensor.shape)}|{tensor.dtype}"
    if hasattr(tensor, "__tensor_flatten__"):  # torchao and the like: tensors inside a tensor
        inner = tensor.__tensor_flatten__()[0]
        return digest(header + "".join(_hash_values(getattr(tensor, key)) for key in inner))
    if tensor.is_meta:
        raise ValueError("it lies on the meta device, without values")
    return xxhash.xxh3_64_hexdigest(header.encode() + _sums(tensor).cpu().numpy().tobytes())


def _sums(tensor: Tensor) -> Tensor:
    """Two sums over each chunk of a tensor's bits, (chunks, 2) int64: 32-bit integers times random keys by place.

    Naive, for the i-th chunk x of the tensor's bytes as int32: `[(x * keys[0]).sum(), (x * keys[1]).sum()]`, modulo
    2^64. Keys are odd, so any change of one integer changes both sums. Any other given change goes unseen with a
    chance of 2^-64 at most: integers differ by a multiple of 2^31 at most, which leaves 32 random bits of each key.

    Computed where the tensor lies: reading a model back from an accelerator takes a second per 3 GB. What is left of
    integers that overflow is the same on every device.
    """
    data = tensor.contiguous().flatten().view(torch.uint8)
    if len(data) % 4 or data.storage_offset() % 4:
        data = nn.functional.pad(data, (0, -len(data) % 4))  # also copies to where 32-bit integers may begin
    bits = data.view(torch.int32)
    n, rows = len(bits) // CHUNK * CHUNK, 1 if bits.device.type == "cpu" else ACCELERATOR_CHUNKS
    keys, out = _keys(bits.device), []
    for chunks in (*bits[:n].view(-1, CHUNK).split(rows), bits[n:].view(1, -1)):
        chunks = chunks.long()
        out.append(torch.stack([(chunks * key[: chunks.shape[1]]).sum(1) for key in keys], 1))
    return torch.cat(out)


@cache
def _keys(device: torch.device) -> Tensor:
    """Odd random numbers, (2, CHUNK) int64: raw output of a generator that numpy promises to keep."""
    raw = np.random.PCG64(0).random_raw(2 * CHUNK) | np.uint64(1)
    return torch.from_numpy(raw.view(np.int64).reshape(2, CHUNK)).to(device)


def _settings(model: nn.Module) -> str:
    """What turns the same weights into another function: the config, and the adapters that are on."""
    config: Any = getattr(model, "config", None)
    adapters = []
    for name, module in _named(model):
        if hasattr(module, "merged_adapters"):  # a layer of PEFT's, or a module that it has wrapped
            on = [] if module.disable_adapters else list(module.active_adapters)
            scaling: Any = getattr(module, "scaling", None)
            factors = [scaling.get(adapter) for adapter in on] if isinstance(scaling, dict) else []
            adapters.append((name, on, list(module.merged_adapters), factors))
    config = _read(config.to_dict()) if hasattr(config, "to_dict") else None
    return json.dumps([config, adapters], default=lambda value: type(value).__name__)


def _read(value: Any) -> Any:
    """A config without what no forward pass depends on, in one order."""
    if isinstance(value, dict):
        kept = {str(key): v for key, v in value.items() if not str(key).startswith("_") and key not in _UNREAD}
        return {key: _read(kept[key]) for key in sorted(kept)}
    return [_read(v) for v in value] if isinstance(value, (list, tuple)) else value
