"""Independent oracles of the score: autograd on the head's weight, the paper's double sum, naive log-probabilities."""

import torch
from torch.func import functional_call

from forvalue_callbacks import core

V, D, T, T2 = 37, 8, 11, 13
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 0.7, "softcap": 3.0},
}


def relative(got, want):
    """Largest error over the largest value: sums of errors of both signs are compared on one scale."""
    got, want = (torch.as_tensor(x, dtype=torch.float64) for x in (got, want))
    return float((got - want).abs().max() / want.abs().max())


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


def hidden_states(model, row):
    """Inputs of the head at the positions that predict the row's labels, (T, D)."""
    with torch.no_grad():
        states = model.base_model(input_ids=torch.tensor([row["input_ids"][:-1]])).last_hidden_state[0]
    return states[torch.tensor(row["labels"][1:]) != -100]


def inverse_second_moment(model, rows):
    """Written out: (A + 0.01 mean(diag A) I)^-1, A the mean of h h^T over all labelled positions."""
    hidden = torch.cat([hidden_states(model, row) for row in rows])
    moment = sum(torch.outer(h, h) for h in hidden) / len(hidden)
    return torch.linalg.inv(moment + 0.01 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype))


def make(kind="plain", dtype=torch.float64, seed=0):
    """A head of one of HEADS, and hidden states and labels of two sides of T and T2 positions."""
    torch.manual_seed(seed)
    options = dict(HEADS[kind])
    bias = torch.randn(V, dtype=torch.float64) if options.pop("bias", False) else None
    head = core.Head(torch.randn(V, D, dtype=torch.float64).to(dtype), bias, **options)
    hidden = [torch.randn(n, D, dtype=torch.float64).to(dtype) for n in (T, T2)]
    labels = [torch.randint(V, (n,)) for n in (T, T2)]
    return head, hidden, labels


def naive_log_p(head, weight, hidden, labels):
    """Written out anew: nothing of `Head` is trusted but its four fields."""
    logits = hidden @ weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1)[torch.arange(len(labels)), labels]
