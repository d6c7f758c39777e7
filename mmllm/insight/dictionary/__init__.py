"""Sparse autoencoders: the module, its training, its files, and what they are worth."""
