"""Losses and measures: MixIT, regularizers, metrics."""
