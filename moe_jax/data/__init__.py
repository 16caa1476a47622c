"""Text in, batches out: sources, prompts, tokenised data sets, and padded or packed batches."""
