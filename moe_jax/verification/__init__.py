"""Check of a base model on the user's machine, against transformers and peft where installed."""
