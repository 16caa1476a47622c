"""Writing files and folders: atomic replacement, free space, and disk errors as one-line messages.

It knows nothing about the content. Readers of data files are in `moe_jax.data`.
"""
