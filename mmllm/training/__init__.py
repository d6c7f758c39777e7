"""Training: stages as data, one loop, its report."""
