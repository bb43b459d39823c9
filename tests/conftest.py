"""Fixtures of several test modules; whatever else they share is in `helpers`."""

import logging

import pytest

from helpers.models import build_model


@pytest.fixture
def model():
    return build_model()


@pytest.fixture
def plain(monkeypatch):
    """Nobody has configured logging, as in a plain script."""
    log = logging.getLogger("forvalue_callbacks")
    monkeypatch.setattr(log, "propagate", False)
    monkeypatch.setattr(log, "handlers", [])
