"""One base with adapters, served for all tests of this folder."""

from pathlib import Path

import pytest
from foreign_adapters import LORA, MIXLORA
from hf_models import tiny_model
from inference.tokenizers_to_try import byte_level
from serving.running_server import running, warm_service
from whole_models import adapter_of

import moe_jax
from moe_jax.checkpoints.adapter_files import SavedAdapter


def save_base(folder: Path) -> Path:
    """Writes a base of two layers with the demo's tokenizer."""
    sizes = {"num_hidden_layers": 2, "vocab_size": 640, "max_position_embeddings": 128}
    tiny_model("llama", **sizes).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("models") / "tiny")


def random_adapters(folder: Path) -> dict[str, SavedAdapter]:
    """Three adapters on the base of this folder, two of them of one method."""
    base = moe_jax.load_base(folder)
    return {
        "mix": adapter_of(base, MIXLORA),
        "plain": adapter_of(base, LORA),
        "louder": adapter_of(base, MIXLORA, spread=0.2),
    }


@pytest.fixture(scope="session")
def adapters(folder):
    return random_adapters(folder)


@pytest.fixture(scope="session")
def served(folder, adapters):
    """A server of the base and the adapters."""
    service = warm_service(folder, adapters)
    with running(service, folder, adapters) as server:
        yield server
