"""What an output head computes: logits, their slope, and products in half precision that lose nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Head:
    """An output head: `logits = cap * tanh((W h + b) * scale / cap)`; without a soft-cap just `(W h + b) * scale`.

    Args:
        weight: unembedding W, (V, D).
        bias: b, (V,), or None.
        scale: factor on the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: Gemma-2's `final_logit_softcapping`, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def transform(self, linear_TC: Tensor) -> Tensor:
        """Logits from W h + b, in place where it can."""
        if self.scale != 1.0:
            linear_TC = linear_TC.mul_(self.scale)
        if self.softcap is not None:
            linear_TC = linear_TC.div_(self.softcap).tanh_().mul_(self.softcap)
        return linear_TC

    def slope(self, logits_TC: Tensor) -> Tensor | float:
        """Derivative of the logits in W h, elementwise: scale * (1 - (f / cap)^2)."""
        if self.softcap is None:
            return self.scale
        return (logits_TC / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)

    def linear(self, hidden_TD: Tensor, block: slice) -> Tensor:
        """W h + b on one block of the vocabulary, (T, C); in float32 where the hidden states are in half precision."""
        linear_TC = product(hidden_TD, self.weight[block])
        return linear_TC if self.bias is None else linear_TC.add_(self.bias[block])

    def logits(self, hidden_TD: Tensor, block: slice = slice(None)) -> Tensor:
        """Logits on one block of the vocabulary, (T, C)."""
        return self.transform(self.linear(hidden_TD, block))


def pair_head(head: Head) -> Head:
    """Of a head of one output, the reward `r = (w h + b) * scale`, the head of two classes that says of
    `x = h_chosen - h_rejected` which answer is the better one: `log p(0) = log sigmoid(r_chosen - r_rejected)`, minus
    the loss of Bradley and Terry.

    Its rows are w and 0. Each of them has a gradient, the one minus the other: with the factor on the weight, inner
    products are those of the gradients in w.
    """
    root = 2**0.5
    weight = torch.cat([head.weight, torch.zeros_like(head.weight)]) * root
    return Head(weight, None, head.scale / root)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def factor(head: Head, hidden_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """Hidden states as the products take them: in half precision where CUDA multiplies them with a head of the same.

    Such a product is exact but for its sums, which are float32: nothing is lost by not converting the factors first.
    """
    if hidden_TD.is_cuda and hidden_TD.dtype in HALF and head.weight.dtype == hidden_TD.dtype:
        return hidden_TD
    return hidden_TD.to(dtype)


def product(hidden_TD: Tensor, matrix_CD: Tensor) -> Tensor:
    """`hidden @ matrix.T`, (T, C), in the working dtype.

    Half-precision hidden states meet a float32 matrix as the sum of two half-precision ones, which holds 16 of its 24
    bits (22 with float16): one product of twice the depth, several times as fast as one in float32.
    """
    if hidden_TD.dtype not in HALF or hidden_TD.requires_grad:  # there is no derivative of what follows
        return hidden_TD @ matrix_CD.to(hidden_TD.dtype).T
    if matrix_CD.dtype != hidden_TD.dtype:
        high_CD = matrix_CD.to(hidden_TD.dtype)
        matrix_CD = torch.cat([high_CD, (matrix_CD - high_CD).to(hidden_TD.dtype)], 1)
        hidden_TD = torch.cat([hidden_TD, hidden_TD], 1)
    return torch.mm(hidden_TD, matrix_CD.T, out_dtype=torch.float32)
