"""Frozen encoders: media -> tokens of features.

base        the contract of an encoder
pretrained  bases for models of transformers, and for weights that mmllm ships
loading     folders of pretrained models
pooling     choosing a layer, averaging over patches and time

All other modules are families.
"""
