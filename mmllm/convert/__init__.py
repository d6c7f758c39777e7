"""Converters of other projects' checkpoints: `nextgpt` (`mmllm convert nextgpt`)."""
