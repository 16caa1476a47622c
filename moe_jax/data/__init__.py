"""Text in, batches out: sources, prompts, tokenized data sets, and padded or packed batches."""
