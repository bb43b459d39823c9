"""Samples -> hidden states at the positions that predict something."""
