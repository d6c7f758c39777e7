"""Features of a dictionary: what makes each of them active, and what it does."""
