"""Frozen diffusion decoders: one file per family of diffusers pipelines."""
