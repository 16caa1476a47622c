"""How well a model answers the questions of a task.

`run.evaluate` reads tasks (`moe_jax.tasks`), turns their questions into token ids
(`protocols`), has the model score them (`scorer`), and keeps what it said (`journal`, `results`).
`in_training` does the same for the adapters of a training run.
"""
