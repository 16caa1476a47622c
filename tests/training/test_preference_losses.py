"""Preference losses equal TRL's trainers: loss, metrics and every gradient, for LoRA and MixLoRA.

All losses train in one compiled step, each with an adapter of either method, beside an adapter
of SFT. The models that TRL's trainers get are those of `torch_oracle`: LoRA as two matrices, and
MixLoRA as a loop over whole experts.
"""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_program
import torch_oracle
import transformers
import trl_oracle
from hf_models import save_tiny_llama
from tolerances import FLOAT32_LOGITS, GRADIENT_OF_LARGEST, ROUNDING

from moe_jax.config.preference import OrpoConfig
from moe_jax.demo.tiny_llama import train_tokenizer
from moe_jax.hf.config import read_model_config
from moe_jax.hf.load import load_base_params
from moe_jax.training.step.micro_batches import join_rows
from moe_jax.training.step.preference_loss import AnswerLogProbs, rewards_and_losses

SIZES = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TARGETS = ("q_proj", "down_proj")
LORA = {**tiny_program.LORA, "target_modules": TARGETS}
# The balance differs between micro-batches.
MIXLORA = {
    **tiny_program.MIXLORA,
    "target_modules": TARGETS,
    "losses": {"load_balance": {"coefficient": 0.0}},
}
ROWS = 8

STEP = {"reference_log_probs": "step"}
SMOOTHED = "smoothed"
CASES = {
    "sigmoid": ({"name": "dpo", "beta": 0.3, **STEP}, {"beta": 0.3}),
    "hinge": (
        {"name": "dpo", "beta": 0.3, "loss_type": "hinge", **STEP},
        {"beta": 0.3, "loss_type": "hinge"},
    ),
    "ipo": (
        {"name": "dpo", "beta": 0.3, "loss_type": "ipo", **STEP},
        {"beta": 0.3, "loss_type": "ipo"},
    ),
    "with_sft": (
        {"name": "dpo", "beta": 0.2, "sft_weight": 0.7, **STEP},
        {"beta": 0.2, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]},
    ),
    SMOOTHED: ({"name": "dpo", "beta": 0.3, "label_smoothing": 0.2, **STEP}, {"beta": 0.3}),
    "orpo": ({"name": "orpo", "beta": 0.4}, {"beta": 0.4}),
    "simpo": (
        {"name": "simpo", "beta": 2.5, "gamma": 1.4, "sft_weight": 0.3},
        {"beta": 2.5, "simpo_gamma": 1.4, "cpo_alpha": 0.3},
    ),
    "kto": (
        {
            "name": "kto",
            "beta": 0.3,
            "desirable_weight": 1.5,
            "undesirable_weight": 0.8,
            **STEP,
        },
        {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.8},
    ),
}
REWARDS = {
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "reward_margin": "rewards/margins",
}
ACCURACY = {"reward_accuracy": "rewards/accuracies"}
LOG_PROBS = {"log_prob_chosen": "logps/chosen", "log_prob_rejected": "logps/rejected"}
NLL = {"sft_loss": "nll_loss"}
# Their names of the metrics that both have; of `orpo` and `simpo` their `logps` are means.
THEIR_METRICS = {
    "dpo": {**REWARDS, **ACCURACY, **LOG_PROBS},
    "orpo": {**REWARDS, **ACCURACY, **NLL},
    "simpo": {**REWARDS, **ACCURACY, **NLL},
    "kto": {**REWARDS, **LOG_PROBS, "kl": "kl"},
}
# The losses see log-probabilities alone, so that a few of them show the other method.
ADAPTERS = {f"lora_{case}": (LORA, case) for case in CASES} | {
    f"mixlora_{case}": (MIXLORA, case) for case in ("sigmoid", "orpo", "kto")
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder, configuration and parameters of a base, and a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny_llama(folder, **SIZES, **HEADS)
    config = read_model_config(folder)
    tokenizer = train_tokenizer(["a b c"] * 4, vocab_size=300)
    return folder, config, load_base_params(folder, config, "float32"), tokenizer


def preference_batch(case, seed):
    """Rows of different lengths, with prompts that the two rows of an example share."""
    batch = tiny_program.random_batch(ROWS, seed=seed)
    prompts = batch.loss_mask.argmax(axis=1)
    for first in range(0, ROWS, 2):
        size = prompts[first : first + 2].min()
        batch.tokens[first + 1, :size] = batch.tokens[first, :size]
        if case == "orpo":
            size = 1  # TRL's cross-entropy is over the prompt too, but for the first token
        real = batch.segment_ids[first : first + 2] > 0
        batch.loss_mask[first : first + 2] = real & (np.arange(real.shape[1]) >= size)
    if case == "kto":
        for row, label in zip(range(0, ROWS, 2), (1, 0, 0, 1), strict=True):
            batch.labels[row, batch.segment_ids[row].sum() - 1] = label
    return batch


@pytest.fixture(scope="module")
def batches():
    # Of KTO one for which neither estimate of KL is cut off at 0.
    found = {
        name: preference_batch(case, seed=21 if case == "kto" else 11)
        for name, (_, case) in ADAPTERS.items()
    }
    return {**found, "cross_entropy": tiny_program.random_batch(ROWS, seed=12)}


def make_program(base, micro_batches, mesh=None):
    preferences = {name: CASES[case][0] for name, (_, case) in ADAPTERS.items()}
    return tiny_program.program(
        {**{name: fields for name, (fields, _) in ADAPTERS.items()}, "cross_entropy": LORA},
        rows=ROWS,
        config=base[1],
        mesh=mesh,
        training={"micro_batches": micro_batches},
        preferences=preferences,
    )


def one_step(program, base, batches, adapters):
    """Gradients and metrics; SGD subtracts the gradients."""
    params = jax.device_put(base[2], program.param_shardings)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.abstract_state)
    state = jax.device_put(state.replace(adapters=adapters), program.state_shardings)
    batch = join_rows([batches[rows.name] for rows in program.adapter_rows])
    new, metrics = program.train_step(state, params, program.put_train_batch(batch))
    gradients = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), adapters, new.adapters)
    return gradients, {name: np.asarray(value) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def program(base):
    return make_program(base, micro_batches=2)


@pytest.fixture(scope="module")
def adapters(program):
    """Random weights of each adapter, which depend on its name alone."""
    abstract, shardings = program.abstract_state.adapters, program.state_shardings.adapters
    trees = {
        name: tiny_program.random_leaves(
            abstract[name], shardings[name], seed=zlib.crc32(name.encode())
        )
        for name in abstract
    }
    return jax.tree.map(np.asarray, trees)


@pytest.fixture(scope="module")
def step(program, base, batches, adapters):
    return one_step(program, base, batches, adapters)


def torch_model(base):
    return transformers.LlamaForCausalLM.from_pretrained(base[0], attn_implementation="eager")


@pytest.mark.parametrize("name", ADAPTERS)
def test_loss_metrics_and_gradients_equal_trl(
    name, program, base, batches, adapters, step, tmp_path
):
    gradients, metrics = step
    _, case = ADAPTERS[name]
    ours, theirs = CASES[case]
    kind, batch, tree = ours["name"], batches[name], adapters[name]
    method = program.config.adapters[name].method
    model = torch_oracle.attach(torch_model(base), tree, method)
    trainer = trl_oracle.trainer(
        kind, model, torch_model(base).double(), base[3], tmp_path, **theirs
    )
    loss, expected = trl_oracle.loss_and_metrics(trainer, kind, batch)
    if case == SMOOTHED:  # with this probability the answers are swapped
        swapped = batch._replace(**{k: _swapped(v) for k, v in batch._asdict().items()})
        loss = 0.8 * loss + 0.2 * trl_oracle.loss_and_metrics(trainer, kind, swapped)[0]
    loss.backward()

    np.testing.assert_allclose(metrics[f"{name}/loss"], loss.item(), **ROUNDING)
    for mine, other in THEIR_METRICS[kind].items():
        # Differences of sums of log-probabilities of about -50.
        found = metrics[f"{name}/{mine}"]
        np.testing.assert_allclose(found, expected[other], rtol=0, atol=FLOAT32_LOGITS)
    if kind == "kto":
        assert metrics[f"{name}/kl"] > 0.1
    assert abs(metrics[f"{name}/reward_margin"]) > 1e-3
    theirs = torch_oracle.gradients(model, tree)
    jax.tree.map(assert_close, gradients[name], theirs)


def _swapped(array):
    return array.reshape(-1, 2, array.shape[-1])[:, ::-1].reshape(array.shape)


def assert_close(mine, other):
    largest = np.abs(other).max()
    assert largest > 1e-5
    np.testing.assert_allclose(mine, other, rtol=0, atol=GRADIENT_OF_LARGEST * largest)


@pytest.mark.parametrize("certain", [0, 1])
def test_orpo_of_a_certain_answer_is_finite(certain):
    """Its log-probability rounds to 0, and the loss is that of the nearest number below 0."""
    preference = OrpoConfig(beta=0.4)

    def loss(log_probs):
        answers = AnswerLogProbs(
            log_probs, log_probs, jnp.full((1, 2), 4.0), jnp.ones(1), jnp.float32(0)
        )
        return rewards_and_losses(preference, answers)[1][0]

    log_probs = jnp.full((1, 2), -2.0).at[0, certain].set(0.0)
    found, gradient = jax.value_and_grad(loss)(log_probs)
    odds = -math.log(np.finfo(np.float32).eps) - (-0.5 - math.log1p(-math.exp(-0.5)))
    margin = odds if certain == 0 else -odds
    np.testing.assert_allclose(found, 0.4 * math.log1p(math.exp(-margin)), **ROUNDING)
    assert np.isfinite(gradient).all()
    assert (gradient[0, 1 - certain] > 0) == (certain == 0)
