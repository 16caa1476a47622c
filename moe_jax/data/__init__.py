"""Text in, batches out: sources, prompts, tokenised data sets, and padded or packed batches."""

import os

# Set before any import of transformers, which otherwise advises to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
