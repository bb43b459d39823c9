"""Which kind of model one is, and the module that makes its logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..data.seq2seq import shifted_right
from .unembedding import active_module

Kind = Literal["causal", "seq2seq", "sequence classification", "token classification", "reward"]


def kind_of(model: Any) -> Kind:
    """Kind of a `PreTrainedModel`; classifiers have the names that transformers gives them, or inherit from such. One
    of sequences with a single output says how good an answer is: a reward."""
    names = [cls.__name__ for cls in type(model).__mro__]
    if any(name.endswith("ForSequenceClassification") for name in names):
        number = model.config.num_labels == 1 and getattr(model.config, "problem_type", None) is None
        return "reward" if number else "sequence classification"
    if any(name.endswith("ForTokenClassification") for name in names):
        return "token classification"
    return "seq2seq" if getattr(model.config, "is_encoder_decoder", False) else "causal"


def classifies(kind: Kind) -> bool:
    return of_sequences(kind) or kind == "token classification"


def of_sequences(kind: Kind) -> bool:
    """Whether a model has one output, or one for each class, for a whole sequence."""
    return kind in ("sequence classification", "reward")


def head_module(model: Any, kind: Kind) -> nn.Module:
    """The linear module whose outputs are the logits, or become them.

    Raises:
        ValueError: the model has none, or predicts something else than one of several classes.
    """
    name = type(model).__name__
    if classifies(kind):
        return _classifier(model, name, 1 if kind == "reward" else 2)
    if any(cls.__name__.endswith("ForMaskedLM") for cls in type(model).__mro__):
        raise ValueError(
            f"{name} reads later tokens, to fill in masked ones: For-Value scores models that predict from left to "
            "right, encoder-decoders, and models that classify sequences or tokens."
        )
    module = getattr(model, "get_output_embeddings", lambda: None)()
    if module is None:
        raise ValueError(
            f"{name} has no output embeddings: For-Value scores language models with a head, and models that classify "
            "sequences or tokens."
        )
    return module


def _classifier(model: Any, name: str, least: int) -> nn.Module:
    """The last linear map onto the classes that is not within the body of the model."""
    n, problem = model.config.num_labels, getattr(model.config, "problem_type", None)
    if problem == "multi_label_classification":
        raise ValueError(
            f"{name} has problem_type='multi_label_classification', where each class is predicted by itself: "
            "For-Value scores classifiers that choose one of several classes."
        )
    if n < least or problem == "regression":
        raise ValueError(
            f"{name} predicts a number (num_labels={n}, problem_type={problem!r}): For-Value scores classifiers that "
            "choose one of several classes, and reward models (num_labels=1 and no problem_type) by pairs."
        )
    body = set(model.base_model.modules()) if model.base_model is not model else set()
    found = [part for part in _linear_parts(model) if part not in body and _n_out(part) == n]
    if not found:
        raise ValueError(
            f"{name} has no linear map onto its {n} classes behind its body: For-Value scores classifiers that end "
            "with one."
        )
    return found[-1]


def _linear_parts(module: nn.Module) -> Iterator[nn.Module]:
    """Linear modules in the order in which they are defined, adapters on them included; of copies the active one."""
    if isinstance(module, ModulesToSaveWrapper):
        yield from _linear_parts(active_module(module))
    elif isinstance(module, (BaseTunerLayer, nn.Linear)):
        yield module
    else:
        for child in module.children():
            yield from _linear_parts(child)


def _n_out(module: nn.Module) -> int | None:
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return getattr(inner, "out_features", None)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a hook sees a module get."""
    return args[0] if args else next(iter(kwargs.values()))


def logits_of(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output[0]


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What the decoder of a model reads, (B, L), where it is to predict `labels` (B, L), as the model makes it in
    training.

    Raises:
        ValueError: the model has no token that its decoder starts with.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own(labels)
    config = model.config.get_text_config()
    start, pad = (getattr(config, f"{x}_token_id", None) for x in ("decoder_start", "pad"))
    if start is None or pad is None:
        raise ValueError(
            f"{type(model).__name__}: set decoder_start_token_id and pad_token_id in the model's config, of which the "
            "inputs of its decoder are made."
        )
    return shifted_right(labels, start, pad)
