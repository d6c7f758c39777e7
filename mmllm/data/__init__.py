"""Training data: read datasets, mix them, render conversations to token ids, collate batches."""
