"""Frozen modality encoders: one file per family."""
