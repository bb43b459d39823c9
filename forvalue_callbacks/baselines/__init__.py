"""The methods that For-Value is compared with. Higher is more valuable everywhere; labelled tokens are summed.

    influence    tracin, tracin_checkpoints, datainf, hyperinf, lissa, exact_influence, outlier_gradients: pure
                 functions on per-sample gradients; z0_inf: on losses and weights of checkpoints
    gradients    per-sample gradients of the LoRA factors of a PEFT model
    forward      emb, rds_plus, loss, log_likelihoods, ifd, pmi: forward passes alone
    reference    in_context, rho_loss: the loss before and after the validation rows are known
    in_run       InRunShapleyCallback: during a LoRA run
    perturbation mirrored, forward_only_inference: the model moved, forward passes for many rows; small models
    text         tfidf, random_scores: no model

Never imported by `forvalue_callbacks` itself.
"""

from .forward import emb, ifd, log_likelihoods, loss, pmi, rds_plus
from .gradients import gradients
from .in_run import InRunShapleyCallback
from .influence import datainf, exact_influence, hyperinf, lissa, outlier_gradients, tracin, tracin_checkpoints, z0_inf
from .perturbation import forward_only_inference, mirrored
from .reference import in_context, rho_loss
from .text import random_scores, tfidf

__all__ = [
    "InRunShapleyCallback",
    "datainf",
    "emb",
    "exact_influence",
    "forward_only_inference",
    "gradients",
    "hyperinf",
    "ifd",
    "in_context",
    "lissa",
    "log_likelihoods",
    "loss",
    "mirrored",
    "outlier_gradients",
    "pmi",
    "random_scores",
    "rds_plus",
    "rho_loss",
    "tfidf",
    "tracin",
    "tracin_checkpoints",
    "z0_inf",
]
