"""The training step.

    step.py            training step, evaluation of the loss, scores of a classifier
    forward.py         the model applied to a batch
    preference_loss.py losses and metrics of preference training
    frozen_pass.py     scores of answers by references, without gradients
    loss.py            losses of language models and of classification heads
    optimizer.py       optimizers and learning rates of the adapters, loss scaling for float16
    router_metrics.py  metrics of the routers
    state.py           the training state and its shardings
    micro_batches.py   the batches of all adapters, joined and split into micro-batches
    program.py         compiled functions of a run, from shapes alone

The functions of `step.py` are pure; `program.py` compiles them for a mesh and places batches on it.
"""
