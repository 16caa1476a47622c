"""Evaluation of language models and classifiers on tasks.

`model_evaluation.evaluate` reads tasks (`moe_jax.tasks`), tokenizes their questions
(`scoring_protocols`), packs them into rows (`packed_sequences`), scores them with the model
(`scorer`), and saves answers and results (`answer_journal`, `outcomes`, `evaluation_results`).
`training_evaluator` does the same for the adapters of a training run, and `lm_harness` runs the
tasks of lm-evaluation-harness.
"""
