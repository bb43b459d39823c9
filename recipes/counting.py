"""What a method makes a machine do: tokens that the model reads, and products with the head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

# Products of matrices: the place of the first factor among the arguments.
PRODUCTS = {"aten.mm": 0, "aten.bmm": 0, "aten.addmm": 1, "aten.addmm_": 1, "aten.baddbmm": 1, "aten.baddbmm_": 1}


@dataclass
class Work:
    """Args:
    tokens: that the model has read, padding included.
    multiplications: in products of matrices outside of the model.
    """

    tokens: int = 0
    multiplications: int = 0


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.work, self.in_model = Work(), False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        place = PRODUCTS.get(str(function).rsplit(".", 1)[0])
        if place is not None and not self.in_model:
            self.work.multiplications += out.numel() * args[place].shape[-1]
        return out


def counted(model: PreTrainedModel, run: Callable[[], object]) -> Work:
    """The work of one run."""
    counting = _Counting()

    def entered(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        counting.in_model = True
        counting.work.tokens += kwargs["input_ids"].numel()

    def left(*_: Any) -> None:
        counting.in_model = False

    base = model.base_model
    hooks = [base.register_forward_pre_hook(entered, with_kwargs=True), base.register_forward_hook(left)]
    try:
        with counting:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return counting.work
