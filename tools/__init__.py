"""Tools of the repository; nothing of it is in the wheel."""
