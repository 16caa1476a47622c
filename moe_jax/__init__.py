"""Fine-tune a frozen Llama with mixtures of LoRA experts, in JAX and Flax Linen."""

__version__ = "0.1.0"
