"""Gradients of the loss that a model is trained by, for models of any kind."""

import torch
from torch.func import functional_call

from forvalue_callbacks.core import add_gradient


def label_gradient(model, name, batch):
    """Autograd: gradient in the parameter called `name` of the log-likelihood of a batch's `labels`, which are those
    of its logits place by place, as the loss that the model is trained by has them."""
    leaf = model.get_parameter(name).detach().clone().requires_grad_(True)
    output = functional_call(model, {name: leaf}, kwargs=dict(batch), tie_weights=False)
    labels = batch["labels"].flatten()
    log_p = -torch.nn.functional.cross_entropy(output.logits.view(len(labels), -1), labels, reduction="sum")
    assert torch.isclose(-log_p / (labels != -100).sum(), output.loss.to(log_p))
    log_p.backward()
    return leaf.grad


def segment_gradients(backbone, segments, batch=None):
    """One gradient per segment, sum_t e_t h_t^T, from inputs of the head: of each by itself, or all in one batch."""
    with torch.no_grad():
        if batch is None:
            hidden = [backbone.hidden_states(segment.inputs)[0] for segment in segments]
        else:
            hidden = list(backbone.hidden_states(batch))
    head, out = backbone.head(), []
    for segment, states in zip(segments, hidden, strict=True):
        target = torch.as_tensor(segment.target)
        out.append(add_gradient(torch.zeros_like(head.weight), head, states[torch.as_tensor(segment.at)], target))
    return out
