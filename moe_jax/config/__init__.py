"""Configuration of a run: frozen dataclasses, and the strict parser that creates them.

A configuration file has a function `get_config()` that returns nested groups of fields:

    base                     path, revision, param_dtype, hf_config: the frozen base model
    compute                  dtype, attention, remat
    adapters.NAME.method     name, rank, alpha, dropout, target_modules, rslora, dora,
                             classification; for mixtures of experts also num_experts, router,
                             losses; for MixLoRA expert_lora, ffn_dropout (see `moe_jax.adapters`)
    adapters.NAME.data       train, validation, max_length, buckets, packing, ...
    adapters.NAME.optimizer  name, learning_rate, schedule, weight_decay, clip_norm, ...
    adapters.NAME.evaluation tasks, every, limit, protocols, with_base, ...
    adapters.NAME            batch_size, start_from; steps, epochs and seed where they differ from
                             those of `training`
    training                 steps or epochs, micro_batches, max_batch_rows, seed, log_every,
                             eval_every, ...
    mesh                     data, fsdp, tensor: number of devices along each axis
    checkpoints              every, minutes, keep
    logging                  tensorboard, wandb_project, matrix_tflops
    sweep                    adapter, grid: one adapter for each combination of values
    train_only               names of the adapters to train; None trains all
    tasks_folder             folder with the rows of tasks; None reads them from the hub

Each group is a dataclass in this package, whose docstring describes every field.

From a file to a `RunConfig`: `command_line` runs the file and sets the fields that the command line
overrides; `expand` selects the adapters of `train_only` and replaces a `sweep` by its adapters;
`rank_match` keeps methods whose rank follows from a size until the base is known;
`parse` checks the nested mappings against the dataclasses' types and creates them; each dataclass
checks its own values in `__post_init__`. `to_json` writes the result, and `parse_run_config` reads
it back to an equal `RunConfig`.

No library is used, because three properties are needed together. Unknown fields are
refused with the nearest known name. Adapter methods, routers, losses and tasks are dataclasses
chosen by name from registries that users extend. Every message names the field with its full path.
Libraries such as draccus, tyro or ml_collections' `config_flags` offer one or two of them. Fields
are plain dataclass fields, so a library can replace the parser later.
"""
