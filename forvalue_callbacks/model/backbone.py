"""Any Hugging Face causal LM, VLM or PEFT model -> the inputs of its output head."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import align_module_device, extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..core import Head, working_dtype
from .unembedding import excess, left_as_found, linear_map, named_transforms, seen_transform

# Two runs that do the same may differ by such a share of the largest hidden state, for sums in another order; in half
# precision, where one value may be rounded the other way, by such a share of the mean.
_SAME = {torch.float64: 1e-10, torch.float32: 1e-5}
_SAME_HALF = 3e-4
# Positions whose logits are compared.
_CHECKED = 8
# Outputs of the head at which any soft-cap has saturated; below the largest float16.
_LARGE = 3e4


class _HeadReached(Exception):  # noqa: N818 (it stops a forward pass, nothing went wrong)
    def __init__(self, hidden: Tensor):
        self.hidden = hidden


@dataclass
class _Seen:
    """One forward pass of the whole model: logits, and what its head got and gave."""

    logits: Tensor
    head_input: Tensor
    head_output: Tensor | None  # None where the model multiplies by the head's weight and does not call it
    autocast: torch.dtype | None  # in which the head ran


class Backbone:
    """A causal model without its head: batches in, inputs of the output head out.

    TRL never calls the head while it trains, and hooks would change the model, so the backbone is run by itself. For
    most `PreTrainedModel`s `model.base_model(...).last_hidden_state` is the input of the head, after the final norm
    and, for a VLM, after the images are merged. Where it is not, which `check` sees, the whole model is run up to its
    head.

    Args:
        model: `PreTrainedModel`, or a `PeftModel` around one; DDP and compiled wrappers are looked through.
        dtype: run the forward under autocast in this dtype ("bfloat16", "float16"); None: in the model's own.

    Raises:
        ValueError: an encoder-decoder, a model without an output head, or with one that is not a linear map, a
            prompt-learning adapter (named in the message).
    """

    def __init__(self, model: nn.Module, dtype: str | None = None):
        self.model = _unwrapped(model)
        self.causal: Any = _unwrapped(self.model.get_base_model()) if isinstance(self.model, PeftModel) else self.model
        self.dtype = dtype
        self._transform: tuple[float, float | None] | None = None
        self.runs_whole_model = self.causal.base_model is self.causal
        self._refuse()

    def _refuse(self) -> None:
        """What can be refused before any forward pass."""
        config = self.causal.config
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"{self.name} is an encoder-decoder, whose answers are not predicted from the tokens before them: "
                "For-Value scores decoder-only models here."
            )
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"{self.name}: Prompt-learning adapters (prefix or prompt tuning) cannot be scored: score the base "
                "model instead."
            )
        self.head()

    @property
    def name(self) -> str:
        return type(self.causal).__name__

    @property
    def device(self) -> torch.device:
        embeddings = self.causal.get_input_embeddings()
        with align_module_device(embeddings):  # where accelerate has offloaded weights: where it runs them
            return embeddings.weight.device

    @property
    def max_positions(self) -> int | None:
        """Largest number of tokens that the model can take, None where there is no such number.

        Rotary positions are computed for rows of any length, learned ones lie in a table.
        """
        config = self.causal.config.get_text_config()
        rotary = ("rope_parameters", "rope_scaling", "rope_theta")
        if any(getattr(config, name, None) is not None for name in rotary):
            return None
        return getattr(config, "max_position_embeddings", None)

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
        """The head as it is now, adapters on it included (the score is the gradient in its whole weight).

        Factor and soft-cap are what `check` has seen; before it, what the config says.
        """
        module = self._head_module()
        weight, bias = linear_map(module, self.name)
        scale, softcap = self._transform or named_transforms(self.causal.config)[0]
        return Head(weight.detach(), None if bias is None else bias.detach(), scale, softcap)

    def _head_module(self) -> nn.Module:
        module = getattr(self.causal, "get_output_embeddings", lambda: None)()
        if module is None:
            raise ValueError(
                f"{self.name} has no output embeddings: For-Value scores causal language models with a head."
            )
        return module

    def _autocast(self, dtype: torch.dtype | None = None) -> Any:
        if dtype is None and self.dtype is not None:
            dtype = getattr(torch, self.dtype)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    @property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        """What the forward takes that is run."""
        run = self.causal if self.runs_whole_model else self.causal.base_model
        return inspect.signature(run.forward).parameters

    @cached_property
    def _places_tokens_itself(self) -> bool:
        """Whether the model makes positions of several dimensions of its inputs (M-RoPE: Qwen2-VL, GLM-4V, ...)."""
        rope = getattr(self.causal.config.get_text_config(), "rope_parameters", None)
        rope = rope or getattr(self.causal.config.get_text_config(), "rope_scaling", None) or {}
        return "mrope_section" in rope or any(hasattr(module, "get_rope_index") for module in self.causal.modules())

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        device = self.device
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
        mask = inputs.get("attention_mask")
        takes_positions = "position_ids" in self._parameters and not self._places_tokens_itself
        padded_left = isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, 0] == 0).any())
        if padded_left and takes_positions and "position_ids" not in inputs:
            # Learned positions count from the first real token.
            inputs["position_ids"] = (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
        return inputs

    def _run(self, inputs: dict[str, Any]) -> Tensor:
        if not self.runs_whole_model:
            hidden = getattr(self.causal.base_model(**inputs, use_cache=False), "last_hidden_state", None)
            if hidden is not None:
                return hidden
            self.runs_whole_model = True  # a base model with a head of its own

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _HeadReached(_first(args, kwargs))

        hook = self._head_module().register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.causal(**inputs, **self._without_cache())
        except _HeadReached as reached:
            return reached.hidden
        finally:
            hook.remove()
        raise ValueError(
            f"{self.name} does not call its output embeddings, and its base_model does not give their input: "
            "For-Value cannot see the last hidden states."
        )

    def _without_cache(self) -> dict[str, bool]:
        parameters = inspect.signature(self.causal.forward).parameters
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        return {"use_cache": False} if anything or "use_cache" in parameters else {}

    def hidden_states(self, batch: Mapping[str, Any]) -> Tensor:
        """Inputs of the head, (B, L, D), for a batch of model inputs (`input_ids` (B, L), ...); `labels` go unread."""
        with self._autocast():
            return self._run(self._inputs(batch))

    @property
    def shares_prefixes(self) -> bool:
        """Whether rows can go on from a beginning that was run once: every layer attends to all that came before."""
        if self.runs_whole_model or self._places_tokens_itself:
            return False
        layers = DynamicCache(config=self.causal.config.get_text_config()).layers
        return {"position_ids", "past_key_values"} <= set(self._parameters) and all(
            type(x) is DynamicLayer for x in layers
        )

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

    # ---- is the model what was described? ----

    def check(self, batch: Mapping[str, Any], predicted_BL: Tensor | None = None) -> None:
        """Run the whole model on a batch, see where its head gets its input and what becomes of it, and rebuild its
        logits; refuse, by name, a model that is not understood or that reads later tokens.

        Args:
            predicted_BL: the token that each position predicts, -1 where it predicts none; None: the next one.

        Raises:
            ValueError: the logits differ by more than rounding explains, or are not finite; a later token changes
                what came before it.
        """
        with left_as_found(self.model):
            inputs = self._inputs(batch)
            seen = self._observe(inputs)
            mask = inputs.get("attention_mask")
            real = torch.ones(seen.logits.shape[:2], dtype=torch.bool, device=seen.logits.device)
            if isinstance(mask, Tensor) and mask.shape == real.shape:  # what stands at padding is nobody's business
                real = mask.bool().to(real.device)
            if not torch.isfinite(seen.logits[real]).all():
                raise ValueError(
                    f"{self.name}: the logits of a validation row are not finite: hidden states or logits overflow. "
                    "Try forward_dtype='bfloat16' or float32 weights."
                )
            self._check_head(inputs, seen, real)
            hidden = self._check_body(inputs, seen, real)
            self._check_causal(predicted_BL, inputs, seen.autocast, hidden, real)

    def _observe(self, inputs: dict[str, Any], gain: float = 1.0) -> _Seen:
        """The model's own forward pass; with a gain the input of the head is made so much larger."""
        seen: dict[str, Any] = {}
        kind = self.device.type

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            seen["head_input"] = _first(args, kwargs)
            seen["autocast"] = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            if gain == 1.0:
                return None
            larger = seen["head_input"] * gain
            return ((larger, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): larger})

        def after(module: nn.Module, args: Any, output: Any) -> None:
            seen["head_output"] = output

        head = self._head_module()
        hooks = [head.register_forward_pre_hook(before, with_kwargs=True), head.register_forward_hook(after)]
        try:
            with self._autocast():
                output = self.model(**inputs, **self._without_cache())
        finally:
            for hook in hooks:
                hook.remove()
        logits = output.logits if hasattr(output, "logits") else output[0]
        if "head_input" not in seen:
            with self._autocast():
                seen["head_input"] = self._run(inputs)
        if seen["head_input"].shape[:2] != logits.shape[:2]:
            raise ValueError(
                f"{self.name}: the model gives logits for {tuple(logits.shape[:2])} positions, and its head does not "
                "get as many hidden states: it does something else between them, so its scores would be wrong."
            )
        return _Seen(logits, seen["head_input"], seen.get("head_output"), seen.get("autocast"))

    def _check_head(self, inputs: dict[str, Any], seen: _Seen, real: Tensor) -> None:
        """Find the factor and the soft-cap, and rebuild the logits."""
        places = real.flatten().nonzero()[:, 0]
        places = places[:: max(1, len(places) // _CHECKED)][:_CHECKED]

        def at(states: Tensor) -> Tensor:
            return states.flatten(0, 1)[places.to(states.device)]

        if seen.head_output is not None:
            candidates = named_transforms(self.causal.config)
            pairs = [(at(seen.head_output), at(seen.logits))]
            if any(cap is not None for _, cap in candidates) or not _equal(*pairs[0]):
                large = self._observe(inputs, gain=_LARGE / max(1.0, float(pairs[0][0].abs().max())))
                assert large.head_output is not None
                pairs.append((at(large.head_output), at(large.logits)))
            self._transform = seen_transform(candidates, pairs)
        head = self.head()
        ran = seen.logits.dtype if seen.head_output is None else _coarser(seen.logits, seen.head_output)
        error, explained = excess(head, at(seen.head_input), at(seen.logits), ran)
        if not error <= explained:
            raise ValueError(
                f"{self.name}: cannot describe the output head. Logits rebuilt from the last hidden states are off by "
                f"{error:.2g} of the largest logit (rounding explains {explained:.1g}); scale={head.scale:g}, "
                f"softcap={head.softcap}, bias={head.bias is not None}. The model does something else between its "
                "last hidden state and its logits, so its scores would be wrong."
            )

    def _check_body(self, inputs: dict[str, Any], seen: _Seen, real: Tensor) -> Tensor:
        """Hidden states by the way that gives what the head gets: the base model, or else the whole one."""
        with self._autocast(seen.autocast):
            hidden = self._run(inputs)
            if self._gives(hidden, seen, real):
                return hidden
            self.runs_whole_model = True
            hidden = self._run(inputs)
            if self._gives(hidden, seen, real):
                return hidden
        raise ValueError(f"{self.name}: two forward passes over one row give different hidden states.")

    @staticmethod
    def _gives(hidden: Tensor, seen: _Seen, real: Tensor) -> bool:
        return hidden.shape == seen.head_input.shape and _same(hidden[real], seen.head_input[real])

    @property
    def _place_holders(self) -> Tensor:
        """Token ids that stand for images, videos or sounds."""
        kinds = ("image", "video", "audio", "vision")
        fields = self.causal.config.to_dict().items()
        return torch.tensor(
            [v for k, v in fields if "token" in k and any(x in k for x in kinds) and type(v) is int], dtype=torch.long
        )

    def _check_causal(
        self,
        predicted_BL: Tensor | None,
        inputs: dict[str, Any],
        autocast: torch.dtype | None,
        hidden: Tensor,
        real: Tensor,
    ) -> None:
        """Change the second half of each answer, or its last token: nothing before it may change."""
        ids = inputs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.shape != real.shape or ids.shape[1] < 2:
            return
        ids, real = ids.cpu(), real.cpu()
        labels = ids if predicted_BL is None else predicted_BL.cpu()
        held = self._place_holders  # the place of an image must stay one, and none may come
        texts = labels[(labels >= 0) & ~torch.isin(labels, held)].unique()
        place = torch.arange(ids.shape[1]).expand_as(ids)
        last = (real * place).amax(1, keepdim=True)
        later = nn.functional.pad(labels[:, :-1] >= 0, (1, 0)) & (place > last / 2) & real | (place == last)
        later &= ~torch.isin(ids, held)
        if not later.any() or not len(texts):
            return
        first = torch.where(later, place, ids.shape[1]).amin(1, keepdim=True)
        changed = torch.where(later & (place >= first), texts[torch.searchsorted(texts, ids) % len(texts) - 1], ids)
        changed = torch.where(later & (changed == ids), (ids + 1) % self.head().vocab_size, changed)
        with self._autocast(autocast):
            after = self._run({**inputs, "input_ids": changed.to(inputs["input_ids"].device)})
        earlier = (real & (place < first)).to(hidden.device)
        if earlier.any() and not _same(after[earlier], hidden[earlier]):
            raise ValueError(
                f"{self.name} reads later tokens: its hidden states change with tokens that come after them, so what "
                "it says of an answer is not what it predicts. For-Value scores models that read from left to right; "
                "if rows of this model need 'token_type_ids', have them made by the data_collator."
            )


def _unwrapped(model: nn.Module) -> Any:
    """Without DDP and compilation, however they are nested."""
    while (inner := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inner
    return model


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _coarser(one: Tensor, other: Tensor) -> torch.dtype:
    return min((one.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).bits)


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.to(_coarser(one, other)), other.to(_coarser(one, other)).to(one.device))


def _same(one: Tensor, other: Tensor) -> bool:
    """Equal but for the order of sums, which experts may be shared out for otherwise where other tokens change."""
    dtype = _coarser(one, other)
    one, other = (x.to(dtype).to(one.device, working_dtype(one, other)) for x in (one, other))
    if dtype in _SAME:
        return bool((one - other).abs().max() <= _SAME[dtype] * other.abs().max())
    return bool((one - other).abs().mean() <= _SAME_HALF * other.abs().mean())
