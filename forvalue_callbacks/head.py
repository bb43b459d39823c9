"""Any Hugging Face causal LM, VLM or PEFT model -> the inputs of its output head, and what that head computes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .core import Head, working_dtype

# Largest |rebuilt - own logits| over the largest |logit|. Half precision: the model rounds its own logits to 8 (bf16)
# or 11 bits and accumulates in that dtype, we do not.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


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


class Backbone:
    """A causal model without its head: batches in, inputs of the output head out.

    TRL never calls the head while it trains, and hooks would change the model, so the backbone is run by itself: for a
    `PreTrainedModel`, `model.base_model(...).last_hidden_state` is the input of the head, after the final norm and,
    for a VLM, after the images are merged.

    Args:
        model: `PreTrainedModel`, or a `PeftModel` around one; DDP and compiled wrappers are looked through.
        dtype: run the forward under autocast in this dtype ("bfloat16", "float16"); None: in the model's own.

    Raises:
        ValueError: the model has no output head, or one that is not a plain linear map (named in the message).
    """

    def __init__(self, model: nn.Module, dtype: str | None = None):
        self.model = extract_model_from_parallel(model)
        self.causal: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self.dtype = dtype
        self.head()  # refuse before any work is done

    @property
    def device(self) -> torch.device:
        return self.causal.get_input_embeddings().weight.device

    @property
    def max_positions(self) -> int | None:
        """Largest number of tokens that the model was made for, None where the config does not say."""
        return getattr(self.causal.config.get_text_config(), "max_position_embeddings", None)

    @property
    def bos(self) -> int:
        """The token that a text starts with: BOS, or EOS where the model has none."""
        config = self.causal.config.get_text_config()
        for tokens in (config.bos_token_id, config.eos_token_id):
            token = tokens[0] if isinstance(tokens, list) else tokens
            if token is not None and token < config.vocab_size:  # a default of the config may lie beyond
                return token
        return 0

    def head(self) -> Head:
        """The head as it is now, adapters on it included (the score is the gradient in its whole weight)."""
        name = type(self.causal).__name__
        module = getattr(self.causal, "get_output_embeddings", lambda: None)()
        if module is None:
            raise ValueError(f"{name} has no output embeddings: For-Value scores causal language models with a head.")
        weight, bias = _linear(module, name)
        config = self.causal.config.get_text_config()
        return Head(weight.detach(), None if bias is None else bias.detach(), _logit_scale(config), _softcap(config))

    def _autocast(self) -> Any:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.dtype))

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
        mask = inputs.get("attention_mask")
        takes_positions = "position_ids" in inspect.signature(self.causal.base_model.forward).parameters
        padded_left = isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, 0] == 0).any())
        if padded_left and takes_positions and "position_ids" not in inputs:
            # Learned positions count from the first real token.
            inputs["position_ids"] = (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
        return inputs

    def hidden_states(self, batch: Mapping[str, Any]) -> Tensor:
        """Inputs of the head, (B, L, D), for a batch of model inputs (`input_ids` (B, L), ...); `labels` go unread."""
        with self._autocast():
            return self.causal.base_model(**self._inputs(batch), use_cache=False).last_hidden_state

    @cached_property
    def shares_prefixes(self) -> bool:
        """Whether rows can go on from a beginning that was run once: every layer attends to all that came before."""
        parameters = inspect.signature(self.causal.base_model.forward).parameters
        layers = DynamicCache(config=self.causal.config.get_text_config()).layers
        return {"position_ids", "past_key_values"} <= set(parameters) and all(type(x) is DynamicLayer for x in layers)

    def hidden_states_after(self, prefixes: Mapping[str, Any], batch: Mapping[str, Any], prefix: Tensor) -> Tensor:
        """Inputs of the head, (B, L, D), of rows that go on from prefixes, each of which is run once.

        Args:
            prefixes: `input_ids`, `attention_mask` (P, K), padded on the right.
            batch: `input_ids` (B, L) and `position_ids` of what follows, `attention_mask` (B, K + L) of both.
            prefix: which of the prefixes each row goes on from, (B,).
        """
        cache = DynamicCache(config=self.causal.config.get_text_config())
        with self._autocast():
            self.causal.base_model(**self._inputs(prefixes), past_key_values=cache, use_cache=True)
            cache.batch_select_indices(prefix.to(self.device))
            inputs = self._inputs(batch)
            return self.causal.base_model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state

    def check(self, batch: Mapping[str, Any]) -> None:
        """Rebuild the model's own logits on a batch; refuse, by name, a model whose head is not what was described.

        Raises:
            ValueError: the logits differ by more than rounding explains.
        """
        with left_as_found(self.model):
            inputs = self._inputs(batch)
            with self._autocast():
                own = self.model(**inputs, use_cache=False).logits
            hidden = self.hidden_states(batch)
            head = self.head()
            tolerance = _TOLERANCE[min((hidden.dtype, own.dtype), key=lambda dtype: torch.finfo(dtype).bits)]
            hidden = hidden.to(head.weight.device, working_dtype(head.weight, hidden))
            name = f"{type(self.model).__name__}({type(self.causal).__name__})"
            if own.shape[:2] != hidden.shape[:2]:
                raise ValueError(
                    f"{name}: the model gives logits for {tuple(own.shape[:2])} positions where its backbone gives "
                    f"{tuple(hidden.shape[:2])}. Prompt-learning adapters (prefix or prompt tuning) cannot be scored: "
                    "score the base model instead."
                )
            rebuilt = head.logits(hidden.flatten(0, 1))
            own = own.flatten(0, 1).to(rebuilt)
            if (mask := inputs.get("attention_mask")) is not None:  # what stands at padding is nobody's business
                own, rebuilt = own[mask.flatten().bool()], rebuilt[mask.flatten().bool()]
            if not torch.isfinite(own).all():
                raise ValueError(
                    f"{name}: the logits of a validation row are not finite: hidden states or logits overflow. Try "
                    "forward_dtype='bfloat16' or float32 weights."
                )
            error = float((rebuilt - own).abs().max() / own.abs().max().clamp(min=1e-6))
        if error > tolerance:
            raise ValueError(
                f"{name}: cannot describe the output head. Logits rebuilt from the last hidden states are off by "
                f"{error:.2g} of the largest logit (rounding explains {tolerance:.0e}); scale={head.scale:g}, "
                f"softcap={head.softcap}, bias={head.bias is not None}. The model does something else between its "
                "last hidden state and its logits, so its scores would be wrong."
            )


def _linear(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the linear map that a head module computes now, (V, D) and (V,) or None."""
    if isinstance(module, ModulesToSaveWrapper):
        active = module.active_adapters
        if module.disable_adapters or not active:
            return _linear(module.original_module, name)
        return _linear(module.modules_to_save[active[0]], name)
    if isinstance(module, BaseTunerLayer):
        weight, bias = _linear(module.get_base_layer(), name)
        active = [] if module.disable_adapters or module.merged else _adapters_on(module)
        for adapter in active:
            if not isinstance(module, LoraLayer) or module.use_dora.get(adapter, False):
                raise ValueError(
                    f"{name}: adapter {adapter!r} on the output head is a {type(module).__name__}"
                    f"{' with DoRA' if isinstance(module, LoraLayer) else ''}, which does not just add to its weight. "
                    "Merge it first (merge_and_unload) or keep adapters off the head."
                )
            weight = weight + module.get_delta_weight(adapter).to(weight)
        return weight, bias
    dense: Any = getattr(module, "weight", None)
    if not isinstance(dense, Tensor) or dense.ndim != 2 or not dense.is_floating_point() or dense.numel() == 0:
        raise ValueError(
            f"{name}: the output head {type(module).__name__} has no dense floating-point weight here (quantised, or "
            "sharded by ZeRO-3). Score before sharding, or load the model with an unquantised head."
        )
    offset = getattr(module, "bias", None)
    return whole(dense), None if offset is None else whole(offset)


def whole(tensor: Any) -> Tensor:
    """The tensor itself, gathered first where FSDP2 has sharded it (a DTensor)."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _adapters_on(module: BaseTunerLayer) -> list[str]:
    """Active adapters that this layer has weights of."""
    known = {name for names in module.adapter_layer_names for name in getattr(module, names)}
    return [adapter for adapter in module.active_adapters if adapter in known]


def _softcap(config: Any) -> float | None:
    return getattr(config, "final_logit_softcapping", None)


def _logit_scale(config: Any) -> float:
    """Factor between W h and the logits; the names are those of TRL's fused head (trl/trainer/utils.py)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)
