"""Independent oracles of the score: autograd on the head's weight, and the paper's double sum."""

import numpy as np
import torch
from torch.func import functional_call


def relative(got, want):
    """Largest error over the largest value: sums of errors of both signs are compared on one scale."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    return np.abs(got - want).max() / np.abs(want).max()


def row_gradient(model, row, **inputs):
    """Autograd: gradient of the row's log-likelihood in the head's own weight, by the model's own forward, (V, D).

    `inputs` are what the forward takes beside token ids.
    """
    head = model.eval().get_output_embeddings()
    name = next(n for n, m in model.named_modules() if m is head) + ".weight"
    # A leaf of its own for the head: with tied embeddings the gradient of the input side would be added otherwise.
    leaf = head.weight.detach().clone().requires_grad_(True)
    ids, labels = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])
    logits = functional_call(model, {name: leaf}, kwargs={"input_ids": ids[None], **inputs}, tie_weights=False).logits[
        0
    ]
    keep = labels[1:] != -100
    log_p = logits[:-1][keep].log_softmax(-1)
    log_p.gather(1, labels[1:][keep][:, None]).sum().backward()
    return leaf.grad


def score_by_autograd(model, row, validation_rows):
    """`< mean_v G(v), G(row) >` from one gradient per row."""
    direction = torch.stack([row_gradient(model, v) for v in validation_rows]).mean(0)
    return float((direction * row_gradient(model, row)).sum())


def score_by_double_sum(model, row, validation_row):
    """Paper, Eq. 1, for a head that is just W h: `sum_{k, k'} <e_k, e_k'> <h_k, h_k'>`, position by position."""
    weight, sides = model.get_output_embeddings().weight.detach(), []
    for r in (row, validation_row):
        ids, labels = torch.as_tensor(r["input_ids"]), torch.as_tensor(r["labels"])
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids[None]).last_hidden_state[0]
        p = (hidden @ weight.T).softmax(-1)
        positions = [k for k in range(len(ids) - 1) if labels[k + 1] != -100]
        onehot = torch.eye(len(weight), dtype=weight.dtype)
        sides.append([(onehot[labels[k + 1]] - p[k], hidden[k]) for k in positions])
    return float(sum((e @ f) * (h @ g) for e, h in sides[0] for f, g in sides[1]))
