"""Data: rendering, batching, mixing, and what the frozen parts say of it."""
