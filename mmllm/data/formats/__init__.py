"""Readers of dataset formats, one file each; see COMPONENTS in mmllm.config."""
