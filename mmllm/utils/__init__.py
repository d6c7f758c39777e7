"""Small tools without a subject of their own; they import nothing of mmllm but its errors."""
