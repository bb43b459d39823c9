"""Fixtures of several test modules; whatever else they share is in `helpers`."""

import logging

import pytest

from helpers.models import build_model


@pytest.fixture(autouse=True)
def _no_precision_of_another_test(monkeypatch):
    """TrainingArguments(bf16=True) writes it into the environment, where the next arguments read it."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.fixture
def model():
    return build_model()


@pytest.fixture
def plain(monkeypatch):
    """Nobody has configured logging, as in a plain script."""
    log = logging.getLogger("forvalue_callbacks")
    monkeypatch.setattr(log, "propagate", False)
    monkeypatch.setattr(log, "handlers", [])
