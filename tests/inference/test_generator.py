"""Batches with several adapters: outputs, ends, random draws, meshes and errors."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from foreign_adapters import LORA, MIXLORA
from hf_models import tiny_model
from inference.greedy import continuations, transformers_continuation
from transformers import LlamaForCausalLM, MixtralForCausalLM
from whole_models import adapter_of

import moe_jax
from moe_jax.config.model import ComputeConfig
from moe_jax.config.rope import RopeConfig
from moe_jax.config.run import MeshConfig
from moe_jax.errors import CheckpointError, ConfigError, DataError
from moe_jax.hf.base_model import open_base
from moe_jax.inference.generator import Request, TokenGenerator
from moe_jax.inference.settings import SamplingConfig
from moe_jax.loaded.inference_model import build_model, load_adapters, load_params
from moe_jax.sharding.mesh import make_mesh

NEW = 12
COMPUTE = ComputeConfig(dtype="float32")
PROMPTS = [(3, 1, 4, 1, 5), (9, 2), (6, 5, 3, 5, 8, 9, 7), (9, 3, 2)]
REQUESTS = [
    Request(PROMPTS[0], "mix", number=0),
    Request(PROMPTS[1], number=1),
    Request(PROMPTS[2], "plain", number=2),
    Request(PROMPTS[3], "mix", number=3),
]
RANDOM_SAMPLING = SamplingConfig(temperature=1.5, repetition_penalty=1.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder):
    return moe_jax.load_base(folder)


@pytest.fixture(scope="module")
def adapters(base):
    return {"plain": adapter_of(base, LORA), "mix": adapter_of(base, MIXLORA)}


@pytest.fixture(scope="module")
def generator(base, adapters):
    loaded_adapters = {name: (adapter.method, adapter.tree) for name, adapter in adapters.items()}
    return TokenGenerator(base.config, base.params, loaded_adapters, compute=COMPUTE)


@pytest.fixture(scope="module")
def greedy(generator):
    return continuations(generator, REQUESTS, NEW)


def test_each_row_equals_its_merged_model_in_transformers(greedy, folder, adapters, tmp_path):
    moe_jax.export_adapter(adapters["mix"], "mixtral", tmp_path / "mix")
    moe_jax.export_adapter(adapters["plain"], "llama", tmp_path / "plain")
    models = {
        None: LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32),
        "plain": LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32),
        "mix": MixtralForCausalLM.from_pretrained(tmp_path / "mix", dtype=torch.float32),
    }
    for actual, request in zip(greedy, REQUESTS, strict=True):
        expected = {
            name: transformers_continuation(model.eval(), request.tokens, NEW)
            for name, model in models.items()
        }
        assert actual == expected[request.adapter]
        assert sum(actual == other for other in expected.values()) == 1


def test_a_row_that_ends_does_not_change_other_rows(generator, greedy):
    before = generator.compilations()
    assert before == 4  # the prompts, the cache of each layer, their first tokens, and the loop
    end = greedy[0][4]
    expected = [row[: row.index(end) + 1] if end in row else row for row in greedy]
    assert len(expected[0]) <= 5 and max(map(len, expected)) == NEW
    assert continuations(generator, REQUESTS, NEW, eos_id=end) == expected

    def stop(row, tokens):
        assert tokens == greedy[row][: len(tokens)]
        return row == 2 and len(tokens) == 3

    expected = [row[:3] if number == 2 else row for number, row in enumerate(greedy)]
    assert continuations(generator, REQUESTS, NEW, stop=stop) == expected
    # Whatever ends rows, whatever the prompts' lengths, and in whatever order they come.
    assert continuations(generator, REQUESTS[::-1], NEW) == greedy[::-1]
    assert generator.compilations() == before
    longer = [request._replace(tokens=request.tokens * 3) for request in REQUESTS]
    continuations(generator, longer, NEW)
    assert generator.compilations() == before + 1  # prompts of the next bucket


def test_random_draws_depend_on_the_row_alone(generator):
    drawn = continuations(generator, REQUESTS, NEW, sampling=RANDOM_SAMPLING, seed=5)
    before = generator.compilations()
    others = [
        REQUESTS[3],
        Request((1, 2, 3, 4, 5, 6, 7, 8), number=8),
        Request((8,), "plain", number=9),
        REQUESTS[0],
    ]
    again = continuations(generator, others, NEW, sampling=RANDOM_SAMPLING, seed=5)
    assert (again[0], again[3]) == (drawn[3], drawn[0])
    same = [REQUESTS[0]._replace(sample=n, number=number) for n, number in ((0, 0), (1, 0), (0, 1))]
    rows = continuations(
        generator,
        [same[0], REQUESTS[1], REQUESTS[2], same[1]],
        NEW,
        sampling=RANDOM_SAMPLING,
        seed=5,
    )
    assert rows[0] == drawn[0] != rows[3]
    rows = continuations(
        generator,
        [same[0], REQUESTS[1], REQUESTS[2], same[2]],
        NEW,
        sampling=RANDOM_SAMPLING,
        seed=6,
    )
    assert len({tuple(row) for row in (drawn[0], rows[0], rows[3])}) == 3
    assert generator.compilations() == before


def test_a_mesh_gives_the_same_tokens(folder, adapters, greedy):
    # Four ways to divide five rows: two of the six of `mix` and of the others fill up.
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    files = open_base(folder)
    model = build_model(files, "float32")
    loaded = load_adapters(adapters, files, model, mesh)
    loaded_adapters = {one.name: (one.saved.method, one.saved.tree) for one in loaded}
    params = load_params(files, model, mesh)
    generator = TokenGenerator(files.config, params, loaded_adapters, compute=COMPUTE, mesh=mesh)
    assert continuations(generator, REQUESTS, NEW) == greedy


def test_invalid_requests_are_rejected_before_the_first_step(base, adapters):
    def refused(message, *requests, error=DataError, new_tokens=4, seed=0, config=base.config):
        loaded_adapters = {"mix": (adapters["mix"].method, adapters["mix"].tree)}
        generator = TokenGenerator(config, base.params, loaded_adapters, compute=COMPUTE)
        with pytest.raises(error, match=message):
            generator.stream(
                [Request(*request) for request in requests],
                SamplingConfig(),
                max_new_tokens=new_tokens,
                eos_ids=(),
                seed=seed,
            )

    refused("prompt 2: has no tokens", [(1,)], [()])
    refused("prompt 1: has ids from 3 to 64, .* for 0 to 63", [(3, 64)])
    refused(
        "prompt 1: has 62 tokens, and with 4 new tokens does not fit into the context of 64; "
        "shorten it, or ask for at most 2 new tokens",
        [(1,) * 62],
    )
    refused("has 64 tokens, but the context holds 64, .* shorten it", [(1,) * 64])
    refused("adapter 'mxi': .* did you mean 'mix'", [(1,), "mxi"], error=ConfigError)
    refused("max_new_tokens: must be positive", [(1,)], error=ConfigError, new_tokens=0)
    refused("seed: must be between 0 and 4294967295", [(1,)], error=ConfigError, seed=-1)

    rope = RopeConfig(
        rope_type="longrope",
        rope_theta=10000.0,
        short_factor=(1.0,) * 4,
        long_factor=(2.0,) * 4,
        original_max_position_embeddings=8,
    )
    long = dataclasses.replace(base.config, rope=rope)
    refused("has 6 tokens, and with 4 new tokens passes 8, .* at most 2", [(1,) * 6], config=long)
    refused("prompt 2: its 2 tokens stay below 8", [(1,) * 9], [(1, 2)], config=long)
    TokenGenerator(long, base.params, {}, compute=COMPUTE).stream(
        [Request((1,) * 4), Request((2,))], SamplingConfig(), max_new_tokens=4, eos_ids=()
    )

    for message, options in (
        ("max_length: .* context of 64 tokens, got 65", {"max_length": 65}),
        ("buckets: .* got 16, 8", {"buckets": (16, 8)}),
    ):
        with pytest.raises(ConfigError, match=message):
            TokenGenerator(base.config, base.params, {}, compute=COMPUTE, **options)


def test_logits_that_are_not_finite(base):
    params = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), base.params)
    generator = TokenGenerator(base.config, params, {}, compute=COMPUTE)
    with pytest.raises(CheckpointError, match="prompt 1: the model's logits are not finite"):
        continuations(generator, [Request((1, 2))], 1)
