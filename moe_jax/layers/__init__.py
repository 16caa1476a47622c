"""Layers of the frozen decoder, without adapters.

    attention.py          causal attention over padded, packed and cached rows
    blocked_attention.py  attention of long rows, in memory linear in their length
    kv_cache.py           keys and values of earlier tokens
    rope.py               rotary position embeddings
    frozen.py             frozen parameters and projections
    quantized.py          kernels stored in eight or four bits
    norm.py               RMSNorm
    dropout.py            dropout with cheap random bits
    activation.py         activation functions and gating
    vocabulary.py         token embedding and language-model head
    vocab_loss.py         cross-entropy in chunks of the logits
    target_scores.py      log-probabilities of scored tokens, in chunks of the logits
    split_product.py      products of bfloat16 tokens with a float32 matrix
    tokens.py             products with all tokens, sums over sequences
    names.py              names of variable collections and of rematerialized arrays

Letters of the axes in all shapes of the library:

    B batch rows          S sequence positions     T = B * S tokens
    D model width         F FFN width              V vocabulary
    H query heads         K key/value heads        Q head width
    L decoder layers      E experts                R LoRA rank
    C chosen experts (the k of top-k)              M micro-batches
    N rotated channels of a head                   b rows of one adapter

`docs/design/layout.md` has their second meanings in decoding, score heads and key tables.
"""
