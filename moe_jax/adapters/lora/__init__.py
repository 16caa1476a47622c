"""LoRA, rsLoRA and DoRA, and the low-rank pairs that all methods are built from."""
