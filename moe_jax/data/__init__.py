"""Text in, batches out."""

import os

# Before anything here imports transformers, which advises to install PyTorch; tokenizers need none.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
