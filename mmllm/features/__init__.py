"""Cached outputs of frozen encoders and decoders, in memory and on disk."""
