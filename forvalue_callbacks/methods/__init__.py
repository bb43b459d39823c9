"""Validation samples -> a state; positions -> numbers per sample."""
