"""Sharding of arrays over a mesh of devices.

    axes.py   names of the logical axes of parameters and activations
    rules.py  logical axes to mesh axes
    placement.py  arrays on a mesh of several processes
    mesh.py   the mesh, with axes `data`, `fsdp` and `tensor`

Modules of the model name logical axes only; `rules.py` maps them to axes of the mesh.
"""
