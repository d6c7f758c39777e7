"""Trained projections: features -> LLM embeddings (input), signal states -> conditions (output)."""
