"""Whether a model is what its `Backbone` describes: where its head gets its input, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core import working_dtype
from ..data.reasons import NotFiniteError
from .kinds import classifies, first_input, logits_of, of_sequences
from .sharding import gathered, is_sharded
from .unembedding import excess, left_as_found, named_transforms, seen_transform

if TYPE_CHECKING:
    from .backbone import Backbone

# Two runs that do the same may differ by such a share of the largest hidden state, for sums in another order; in half
# precision, where one value may be rounded the other way, by such a share of the mean.
_SAME = {torch.float64: 1e-10, torch.float32: 1e-5}
_SAME_HALF = 3e-4
# Positions whose logits are compared.
_CHECKED = 8
# Inputs or outputs of the head at which any soft-cap has saturated; below the largest float16.
_LARGE = 3e4


@dataclass
class _Seen:
    """One forward pass of the whole model: logits, and what its head got and gave; (B, L, ...) each."""

    logits: Tensor
    head_input: Tensor
    head_output: Tensor | None  # None where the model multiplies by the head's weight and does not call it
    autocast: torch.dtype | None  # in which the head ran


def check(backbone: Backbone, batch: Mapping[str, Any], predicted_BL: Tensor | None = None) -> None:
    """Run the whole model on a batch, see where its head gets its input and what becomes of it, and rebuild its
    logits; refuse, by name, a model that is not understood or, but for classifiers, one that reads later tokens.

    What is seen is written into the backbone: factor and soft-cap, and whether the whole model must be run.

    Args:
        predicted_BL: the token that each position predicts, -1 where it predicts none; None: the next one.

    Raises:
        ValueError: the logits differ by more than rounding explains, or are not finite; a later token changes
            what came before it.
    """
    with left_as_found(backbone.model):
        inputs = backbone.inputs(batch)
        seen = _observe(backbone, inputs)
        mask = inputs.get(backbone.mask_name)
        real = torch.ones(seen.logits.shape[:2], dtype=torch.bool, device=seen.logits.device)
        if isinstance(mask, Tensor) and mask.shape == real.shape:  # what stands at padding is nobody's business
            real = mask.bool().to(real.device)
        _refuse_not_finite(backbone, seen.logits[real])
        _check_head(backbone, inputs, seen, real)
        hidden = _check_body(backbone, inputs, seen, real)
        if not classifies(backbone.kind):
            _check_causal(backbone, predicted_BL, inputs, seen.autocast, hidden, real)


def _observe(backbone: Backbone, inputs: dict[str, Any], gain: float = 1.0) -> _Seen:
    """The model's own forward pass; with a gain the input of the head is made so much larger."""
    seen: dict[str, Any] = {}
    kind = backbone.device.type

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen["head_input"] = first_input(args, kwargs)
        seen["autocast"] = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if gain == 1.0:
            return None
        larger = seen["head_input"] * gain
        return ((larger, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): larger})

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen["head_output"] = output

    head = backbone.head_module()
    hooks = [head.register_forward_pre_hook(before, with_kwargs=True), head.register_forward_hook(after)]
    try:
        with backbone.autocast(), gathered(backbone.holder):
            logits = logits_of(backbone.model(**inputs, **backbone.without_cache()))
    finally:
        for hook in hooks:
            hook.remove()
    states, linear = seen.get("head_input"), seen.get("head_output")
    if of_sequences(backbone.kind):
        with backbone.autocast():
            place = backbone.up_to_head(inputs)[1]
        logits = logits[:, None]
        states, linear = (None if x is None else backbone.of_sequence(x, place) for x in (states, linear))
    if states is None:
        with backbone.autocast():
            states = backbone.run(inputs)
    if states.shape[:2] != logits.shape[:2]:
        raise ValueError(
            f"{backbone.name}: the model gives logits for {tuple(logits.shape[:2])} positions, and its head does not "
            "get as many hidden states: it does something else between them, so its scores would be wrong."
        )
    return _Seen(logits, states, linear, seen.get("autocast"))


def _refuse_not_finite(backbone: Backbone, logits_TV: Tensor) -> None:
    masked_V = torch.isneginf(logits_TV).all(0)
    if masked_V.any() and torch.isfinite(logits_TV[:, ~masked_V]).all():
        raise ValueError(
            f"{backbone.name}: the logits of {int(masked_V.sum())} tokens (first: {int(masked_V.nonzero()[0])}) are "
            "-inf, as where a bias masks them: no gradient passes there. Make that bias a large negative number, as "
            "-1e4."
        )
    if not torch.isfinite(logits_TV).all():
        weights = () if is_sharded(backbone.holder) else backbone.holder.named_parameters()
        bad = [name for name, weight in weights if not weight.is_meta and not torch.isfinite(weight).all()]
        raise NotFiniteError(
            f"{backbone.name}: the logits of a validation row are not finite: hidden states or logits overflow"
            f"{f' (weights {bad[0]!r} are not finite themselves)' if bad else ''}. Try forward_dtype='bfloat16' or "
            "float32 weights."
        )


def _check_head(backbone: Backbone, inputs: dict[str, Any], seen: _Seen, real: Tensor) -> None:
    """Find the factor and the soft-cap, and rebuild the logits."""
    places = real.flatten().nonzero()[:, 0]
    places = places[:: max(1, len(places) // _CHECKED)][:_CHECKED]

    def at(states: Tensor) -> Tensor:
        return states.flatten(0, 1)[places.to(states.device)]

    def pair(seen: _Seen) -> tuple[Tensor, Tensor]:
        assert seen.head_output is not None
        return backbone.biased(at(seen.head_output)), at(seen.logits)

    if seen.head_output is not None:
        candidates = named_transforms(backbone.causal.config)
        pairs = [pair(seen)]
        if any(cap is not None for _, cap in candidates) or not _equal(*pairs[0]):
            largest = (float(at(states).abs().max()) for states in (seen.head_input, seen.head_output))
            gain = _LARGE / max(1.0, *largest)  # neither may overflow
            pairs.append(pair(_observe(backbone, inputs, gain)))
        backbone.transform = seen_transform(candidates, pairs)
    head = backbone.own_head()
    ran = seen.logits.dtype if seen.head_output is None else _coarser(seen.logits, seen.head_output)
    error, explained = excess(head, at(seen.head_input), at(seen.logits), ran)
    if not error <= explained:
        raise ValueError(
            f"{backbone.name}: cannot describe the output head. Logits rebuilt from the last hidden states are off by "
            f"{error:.2g} of the largest logit (rounding explains {explained:.1g}); scale={head.scale:g}, "
            f"softcap={head.softcap}, bias={head.bias is not None}. The model does something else between its "
            "last hidden state and its logits, so its scores would be wrong."
        )


def _check_body(backbone: Backbone, inputs: dict[str, Any], seen: _Seen, real: Tensor) -> Tensor:
    """Hidden states by the way that gives what the head gets: the base model, or else the whole one."""
    with backbone.autocast(seen.autocast):
        hidden = backbone.run(inputs)
        if _gives(hidden, seen, real):
            return hidden
        backbone.runs_whole_model = True
        hidden = backbone.run(inputs)
        if _gives(hidden, seen, real):
            return hidden
    raise ValueError(f"{backbone.name}: two forward passes over one row give different hidden states.")


def _gives(hidden: Tensor, seen: _Seen, real: Tensor) -> bool:
    return hidden.shape == seen.head_input.shape and _same(hidden[real], seen.head_input[real])


def _place_holders(config: Any) -> Tensor:
    """Token ids that stand for images, videos or sounds."""
    kinds = ("image", "video", "audio", "vision")
    fields = config.to_dict().items()
    return torch.tensor(
        [v for k, v in fields if "token" in k and any(x in k for x in kinds) and type(v) is int], dtype=torch.long
    )


def _check_causal(
    backbone: Backbone,
    predicted_BL: Tensor | None,
    inputs: dict[str, Any],
    autocast: torch.dtype | None,
    hidden: Tensor,
    real: Tensor,
) -> None:
    """Change the second half of each answer, or its last token: nothing before it may change.

    What an encoder reads is prompt: of an encoder-decoder what the decoder reads is changed.
    """
    ids = inputs.get(backbone.ids_name)
    if not isinstance(ids, Tensor) or ids.shape != real.shape or ids.shape[1] < 2:
        return
    ids, real = ids.cpu(), real.cpu()
    predicted_BL = ids if predicted_BL is None else predicted_BL.cpu()
    held = _place_holders(backbone.causal.config)  # the place of an image must stay one, and none may come
    texts = predicted_BL[(predicted_BL >= 0) & ~torch.isin(predicted_BL, held)].unique()
    place = torch.arange(ids.shape[1]).expand_as(ids)
    last = (real * place).amax(1, keepdim=True)
    later = nn.functional.pad(predicted_BL[:, :-1] >= 0, (1, 0)) & (place > last / 2) & real | (place == last)
    later &= ~torch.isin(ids, held)
    if not later.any() or not len(texts):
        return
    first = torch.where(later, place, ids.shape[1]).amin(1, keepdim=True)
    changed = torch.where(later & (place >= first), texts[torch.searchsorted(texts, ids) % len(texts) - 1], ids)
    changed = torch.where(later & (changed == ids), (ids + 1) % backbone.head().vocab_size, changed)
    with backbone.autocast(autocast):
        after = backbone.run({**inputs, backbone.ids_name: changed.to(hidden.device)})
    earlier = (real & (place < first)).to(hidden.device)
    if earlier.any() and not _same(after[earlier], hidden[earlier]):
        raise ValueError(
            f"{backbone.name} reads later tokens: its hidden states change with tokens that come after them, so what "
            "it says of an answer is not what it predicts. For-Value scores models that read from left to right; "
            "if rows of this model need 'token_type_ids', have them made by the data_collator."
        )


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
