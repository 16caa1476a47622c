"""The parts of a decoder layer that know nothing of adapters.

The letters of every shape in this library:

    B batch rows          S sequence positions     T = B * S tokens
    D model width         F FFN width              V vocabulary
    H query heads         K key/value heads        Q head width
    L decoder layers      E experts                R LoRA rank
    C chosen-expert slots (the k of top-k)         M micro-batches
    N rotated channels of a head
"""
