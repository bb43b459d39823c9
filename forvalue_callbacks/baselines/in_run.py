"""First-order In-Run Data Shapley: rows are valued by the steps of the very training run that they take part in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..data.reader import sample_of
from ..data.sft import Row
from .batches import prepared
from .gradients import gradients
from .influence import tracin


class InRunShapleyCallback(TrainerCallback):
    """In-Run Data Shapley (arXiv 2406.11011), first order, of a LoRA run by `Trainer` or `SFTTrainer`.

    Before every optimizer step, each row z of its batches gets `lr * < g_v, g_z >` for each validation row v, at the
    weights of that step and with log-likelihoods summed over labelled tokens; a row drawn twice gets it twice. With
    SGD and small steps, the values of a step's rows add up to what the step gains on the validation rows, times the
    labelled tokens of the step, by which the trainer divides its loss.

    Args:
        rows: the tokenised training rows (`input_ids`, `labels` or a mask), to know a row of a batch again. Equal rows
            count as the first of them.
        validation: tokenised validation rows.

    Costs a forward and a backward pass over the validation rows and the step's rows at every step: the training step's
    own backward pass is left alone.

    Raises:
        ValueError: a batch holds a row that is none of `rows` (packing, another truncation).
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], validation: Iterable[Mapping[str, Any]]):
        self.rows, self.validation = prepared(rows), list(validation)
        prepared(self.validation)
        self.pairwise = torch.zeros(len(self.rows), len(self.validation), dtype=torch.float64)
        self._places: dict[str, int] = {}
        for i, row in enumerate(self.rows):
            self._places.setdefault(row.digest, i)
        self._drawn: list[int] = []
        self._hook: Any = None

    @property
    def values(self) -> Tensor:
        """Mean over the validation rows, float64 (N,)."""
        return self.pairwise.mean(1)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        assert model is not None
        self._hook = model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hook.remove()

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        drawn, self._drawn = self._drawn, []
        batch = [self.rows[i] for i in drawn]
        if batch:
            gained = tracin(gradients(model, batch), gradients(model, self.validation)).double().cpu()
            self.pairwise.index_add_(0, torch.tensor(drawn), optimizer.param_groups[0]["lr"] * gained)

    def _remember(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or kwargs.get("labels") is None:
            return
        ids, labels = kwargs["input_ids"].cpu(), kwargs["labels"].cpu()
        mask = kwargs.get("attention_mask")
        real = torch.ones_like(ids).bool() if mask is None else mask.cpu().bool()
        for i in range(len(ids)):
            key = sample_of(i, Row(ids[i][real[i]].numpy(), labels[i][real[i]].numpy())).digest
            if key not in self._places:
                raise ValueError("InRunShapleyCallback: a batch holds a row that is none of the rows it was given")
            self._drawn.append(self._places[key])
