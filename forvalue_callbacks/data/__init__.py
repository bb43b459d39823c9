"""Rows in any form -> samples; knows tokenizers and collators, no models."""
