"""Scores that need no model: the floor and the ceiling of a comparison on text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def tfidf(texts: Sequence[str], validation_texts: Sequence[str]) -> Tensor:
    """Cosine of TF-IDF vectors of words and pairs of words, idf from both sides, float64 (N, M).

    Needs scikit-learn.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", sublinear_tf=True)
    vectors = vectorizer.fit_transform([*texts, *validation_texts])  # rows of unit length
    return torch.from_numpy((vectors[: len(texts)] @ vectors[len(texts) :].T).toarray())


def random_scores(n_rows: int, n_validation: int, *, seed: int = 0) -> Tensor:
    """Uniform in [0, 1), float64 (N, M)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_rows, n_validation, generator=generator, dtype=torch.float64)
