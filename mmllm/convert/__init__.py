"""Checkpoints of other projects -> checkpoints of mmllm: `nextgpt` (`mmllm convert nextgpt`)."""
