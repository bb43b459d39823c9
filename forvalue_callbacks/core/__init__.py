"""The equations, on plain tensors: imports torch (and numpy) and nothing else of the stack."""

from .head import Head, factor, pair_head, product, working_dtype
from .pairs import PAIR_TILE, score_pairs, squared_norms
from .stats import inverse_with_ridge
from .stream import (
    TOKEN_TILE,
    VOCAB_BLOCK,
    add_gradient,
    errors,
    fold_kernel,
    gain_tokens,
    log_likelihood_tokens,
    log_normalizer,
    score_tokens,
    tile_for,
)
from .wide import Along, Measured, Move, measure

__all__ = [
    "PAIR_TILE",
    "TOKEN_TILE",
    "VOCAB_BLOCK",
    "Along",
    "Head",
    "Measured",
    "Move",
    "add_gradient",
    "errors",
    "factor",
    "fold_kernel",
    "gain_tokens",
    "inverse_with_ridge",
    "log_likelihood_tokens",
    "log_normalizer",
    "measure",
    "pair_head",
    "product",
    "score_pairs",
    "score_tokens",
    "squared_norms",
    "tile_for",
    "working_dtype",
]
