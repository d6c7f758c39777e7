"""Trained projections into and out of the language model."""
