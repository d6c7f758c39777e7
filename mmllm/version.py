"""The version of mmllm, for those who may not import the whole."""

__version__ = "0.1.0"
