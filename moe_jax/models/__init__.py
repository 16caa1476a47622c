"""The language model with its adapters.

causal_lm.py   embedding, scanned layers, final norm and heads
decoder.py     attention, gated FFN and the decoder layer
remat.py       rematerialization policies
adapted.py     applies and compiles the model with its parameters, adapters, rows and mesh
"""
