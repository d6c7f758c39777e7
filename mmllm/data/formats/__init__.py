"""One file for each format of dataset that can be read; see COMPONENTS in mmllm.config."""
