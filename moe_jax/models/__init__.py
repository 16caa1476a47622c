"""The language model with its adapters.

causal_lm.py   embedding, scanned layers, final norm and heads
decoder.py     attention, gated FFN and the decoder layer
remat.py       rematerialisation policies
adapted.py     the one door: variables, adapter rows, mesh and compiled functions together
"""
