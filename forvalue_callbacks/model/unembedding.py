"""What an output head computes: a linear map, read from weights and adapters, and what follows, seen in logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..core import Head
from .sharding import whole

# Unit vectors, or entries of the vocabulary, that are looked at at once.
BLOCK = 4096
# Logits may differ from the exact ones by so many times what rounding was seen to make, and by such a share of the
# largest besides: adapters round several times.
ROUNDINGS = 4
FLOOR = {torch.float64: 1e-12}
FLOOR_ELSE = 1e-5
# Names of config fields that may hold a factor on the logits, or a cap.
_FACTORS, _CAPS = ("scal", "multiplier"), ("cap",)


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def active_module(module: ModulesToSaveWrapper) -> nn.Module:
    """The copy that runs of a module that is trained whole beside adapters, or the original."""
    active = module.active_adapters
    return module.original_module if module.disable_adapters or not active else module.modules_to_save[active[0]]


def linear_map(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight (V, D) and bias (V,), or None, of the linear map that a head module computes now.

    Raises:
        ValueError: no dense floating-point weight, or an adapter that makes the map not linear; `name` is the model's.
    """
    if isinstance(module, FullyShardedDataParallel):  # a head wrapped by itself
        return linear_map(module.module, name)
    if isinstance(module, ModulesToSaveWrapper):
        return linear_map(active_module(module), name)
    if isinstance(module, BaseTunerLayer):
        weight, bias = linear_map(module.get_base_layer(), name)
        active = [] if module.disable_adapters or module.merged else _adapters_on(module)
        offloaded = any(parameter.is_meta for parameter in module.parameters())
        if offloaded or not all(_adds_to_weight(module, adapter) for adapter in active):
            return _probed(module, weight, f"{name}: adapter {active!r} on the output head")
        for adapter in active:
            assert isinstance(module, LoraLayer)
            weight = weight + module.get_delta_weight(adapter).to(weight)
        return weight, bias
    with align_module_device(module):  # accelerate keeps offloaded weights elsewhere
        dense: Any = getattr(module, "weight", None)
        if (
            not isinstance(dense, Tensor)
            or dense.is_meta
            or dense.ndim != 2
            or not dense.is_floating_point()
            or dense.numel() == 0
            or not _is_plain(dense)
        ):
            raise ValueError(
                f"{name}: the output head {type(module).__name__} has no dense floating-point weight here (quantised "
                "or offloaded). Load the model with an unquantised head."
            )
        found = [whole(x) for x in (dense, getattr(module, "bias", None)) if x is not None]
        if has_offloaded_params(module):
            found = [x.detach().clone() for x in found]
    return found[0], found[1] if len(found) > 1 else None


def _is_plain(tensor: Tensor) -> bool:
    """Not of a class that holds its values in another way (torchao, quanto), though it calls itself floating-point."""
    return type(tensor) in (Tensor, nn.Parameter) or hasattr(tensor, "full_tensor")


def _adapters_on(module: BaseTunerLayer) -> list[str]:
    """Active adapters that this layer has weights of."""
    known = {name for names in module.adapter_layer_names for name in getattr(module, names)}
    return [adapter for adapter in module.active_adapters if adapter in known]


def _adds_to_weight(module: BaseTunerLayer, adapter: str) -> bool:
    """Whether an adapter is plain LoRA, which adds a product to the weight and nothing else."""
    others = ("use_dora", "lora_bias", "lora_variant")
    return isinstance(module, LoraLayer) and not any(getattr(module, x, {}).get(adapter, False) for x in others)


def _probed(module: nn.Module, weight: Tensor, name: str) -> tuple[Tensor, Tensor | None]:
    """The map of a module, read off its outputs on the unit vectors: as many positions through the head as it has D.

    Raises:
        ValueError: what it computes is not linear.
    """
    n = weight.shape[1]
    with left_as_found(module), torch.autocast(weight.device.type, enabled=False):
        bias = module(weight.new_zeros(1, 1, n))[0, 0]
        columns = [
            module(torch.eye(n, dtype=weight.dtype, device=weight.device)[None, lo : lo + BLOCK])[0] - bias
            for lo in range(0, n, BLOCK)
        ]
        probed = torch.cat(columns).T.contiguous()
        generator = torch.Generator().manual_seed(0)
        some = torch.randn(3, n, generator=generator, dtype=torch.float64).to(weight)
        found, expected = module(some[None])[0], some @ probed.T + bias
        error = (found - expected).abs().max() / expected.abs().max()
    if not error <= 64 * torch.finfo(weight.dtype).eps:
        raise ValueError(
            f"{name} makes it something else than a linear map. Merge it first (merge_and_unload) or keep adapters "
            "off the head."
        )
    return probed, bias if bias.any() else None


def named_transforms(config: Any) -> list[tuple[float, float | None]]:
    """Factors and soft-caps between `W h` and the logits that a config may mean, the likeliest first.

    Which of them a model applies is seen in its logits: a model around another one (Aya Vision around Cohere, Llava
    around Gemma 2) often has the field and leaves the factor or the cap away, and the names differ.
    """
    likeliest = _logit_scale(config), getattr(config.get_text_config(), "final_logit_softcapping", None)
    fields = {**config.to_dict(), **config.get_text_config().to_dict()}
    numbers = {k: float(v) for k, v in fields.items() if isinstance(v, (int, float)) and not isinstance(v, bool) and v}
    factors = [v for k, v in numbers.items() if any(part in k for part in _FACTORS)]
    caps = [v for k, v in numbers.items() if any(part in k for part in _CAPS) and v > 0]
    scales = [1.0, *factors, *(1 / v for v in factors)]
    return list(dict.fromkeys([likeliest, *product(dict.fromkeys(scales), [None, *dict.fromkeys(caps)])]))


def seen_transform(
    candidates: list[tuple[float, float | None]], pairs: list[tuple[Tensor, Tensor]]
) -> tuple[float, float | None]:
    """The first of the candidates that turns a head's outputs into the logits, or else what fits them best.

    Args:
        candidates: factor and soft-cap.
        pairs: outputs of the head and logits, (T, V) each: as they are, and, if need be, of inputs so large that a
            soft-cap saturates.
    """
    eps = max(torch.finfo(x.dtype).eps for x in pairs[0])
    values = [(o.double().cpu(), f.double().cpu()) for o, f in pairs]
    linear, logits = values[0]
    caps: list[float | None] = [None]
    if len(values) > 1:  # a cap that no config names is the largest logit there
        caps.append(float(values[1][1].abs().max()))
    fits: list[tuple[float, float | None]] = []
    for cap in caps:
        before = logits if cap is None else cap * (logits / cap).clamp(-1 + 1e-15, 1 - 1e-15).atanh()
        fits.append((float((linear * before).sum() / linear.square().sum().clamp(min=1e-300)), cap))

    def error(transform: tuple[float, float | None]) -> float:
        head = Head(linear, None, *transform)
        errors = [
            float((head.transform(o.clone()) - f).abs().max() / f.abs().max().clamp(min=1e-9)) for o, f in values
        ]
        return max(errors)

    errors = {transform: error(transform) for transform in [*candidates, *fits]}
    exact = [transform for transform in candidates if errors[transform] <= 2 * eps]
    return exact[0] if exact else min(errors, key=lambda transform: errors[transform])


def excess(head: Head, hidden_TD: Tensor, logits_TV: Tensor, ran: torch.dtype) -> tuple[float, float]:
    """How far a model's logits are from those of a head, and how far rounding explains, over the largest logit.

    What rounding explains is measured on the same positions: the head's logits in the arithmetic that ran against the
    exact ones.

    Args:
        hidden_TD: inputs of the head as it got them.
        logits_TV: what the model made of them.
        ran: dtype of the head's own outputs.
    """
    error = rounding = largest = 0.0
    exact = torch.float32 if head.weight.device.type == "mps" else torch.float64
    for block in _blocks(head.vocab_size):
        true = _logits(head, hidden_TD, block, exact)
        rounded = _logits(head, hidden_TD, block, ran).to(exact)
        error = max(error, float((logits_TV[:, block].to(true) - true).abs().max()))
        rounding = max(rounding, float(torch.nan_to_num(rounded - true, posinf=0.0, neginf=0.0).abs().max()))
        largest = max(largest, float(true.abs().max()))
    largest = max(largest, 1e-6)
    return error / largest, ROUNDINGS * rounding / largest + FLOOR.get(ran, FLOOR_ELSE)


def _blocks(n: int) -> Iterator[slice]:
    return (slice(lo, min(lo + BLOCK, n)) for lo in range(0, n, BLOCK))


def _logits(head: Head, hidden_TD: Tensor, block: slice, dtype: torch.dtype) -> Tensor:
    """Logits on a block of the vocabulary with every step in one dtype."""
    bias = None if head.bias is None else head.bias[block].to(dtype)
    with torch.autocast(head.weight.device.type, enabled=False):
        linear = nn.functional.linear(hidden_TD.to(head.weight.device, dtype), head.weight[block].to(dtype), bias)
    return head.transform(linear)


def _logit_scale(config: Any) -> float:
    """Factor between W h and the logits; the names are those of TRL's fused head (trl/trainer/utils.py)."""
    config = config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)
