"""Small general-purpose helpers; they import nothing of mmllm but its errors."""
