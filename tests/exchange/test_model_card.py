"""Model cards of exports; the header is read with the hub's client."""

import dataclasses

import pytest
from foreign_adapters import LORA, LORAMOE, MIXLORA, TOP_P
from huggingface_hub import ModelCard, metadata_load
from training_record import PICTURES, example_record
from whole_models import adapter_of

import moe_jax
from moe_jax.config.parse import to_plain

METRICS = """| Loss | Nats per target token |
| --- | --- |
| training | `1.2500` |
| validation: held_out | `1.5000` |"""


def trained(mixture, method, preference=None):
    """An adapter with a training record and pictures."""
    adapter = adapter_of(mixture.base, method)
    record = dataclasses.replace(
        example_record(), method=to_plain(adapter.method), preference=preference
    )
    return adapter._replace(training=record, pictures=PICTURES)


@pytest.mark.parametrize(
    ("to", "method", "library", "code"),
    [
        ("peft", LORA, "peft", 'PeftModel.from_pretrained(base, "{out}")'),
        ("mixlora", MIXLORA, None, 'MixLoraModelForCausalLM.from_pretrained("{out}")'),
        ("mixlora", LORAMOE, None, 'name = model.load_adapter("{out}")'),
        ("mixtral", MIXLORA, "transformers", 'AutoModelForCausalLM.from_pretrained("{out}")'),
        ("llama", LORA, "transformers", 'AutoModelForCausalLM.from_pretrained("{out}")'),
        ("moe_jax", MIXLORA, "moe_jax", 'moe_jax.load_adapter("{out}")'),
    ],
)
def test_every_format_has_a_card(mixture, tmp_path, to, method, library, code):
    out = tmp_path / "out"
    moe_jax.export_adapter(trained(mixture, method), to, out)
    header, text = metadata_load(out / "README.md"), (out / "README.md").read_text()
    assert header.get("library_name") == library
    assert header["pipeline_tag"] == "text-generation"
    assert header["datasets"] == ["owner/rows"]
    assert header["tags"] == ["moe_jax", method["name"]]
    assert "base_model" not in header  # a local folder
    for words in (
        code.format(out=out),
        f"`{mixture.base.folder}`, fingerprint `{mixture.base.identity.fingerprint}`",
        "kept in bfloat16 during training",
        "| rank | `4` |",
        "| batch_size | `8` |",
        "| optimizer.schedule.kind | `cosine` |",
        "| training | `words` | `words.jsonl` |  | `train` | `completion` | `2.0` | `100` |",
        "| training | `more` | `owner/rows` | `v1` | `train` | `text` | `1.0` | `20` |",
        METRICS,
        "The mean validation loss of the best adapter was 1.4000.",
        "| held_out | `accuracy` | `0.7500` |\n| held_out | `f1` | `unknown` |",
        "Evaluation tasks, after step 5:",
        "| boolq | `label_acc` | `0.5000` |\n| boolq | `acc` | `0.6250` |",
        "| start_from | `upcycled` |",
        "- Training state: a run cannot be resumed from this export.",
    ):
        assert words in text, words
    assert "/home/someone" not in text
    compile(text.split("```python\n")[1].split("```")[0], "loading code", "exec")
    for name, picture in PICTURES.items():
        assert f"]({name})" in text
        assert (out / name).read_bytes() == picture


@pytest.mark.parametrize(
    ("classification", "unit"),
    [({"glue": "sst2"}, "Nats per row"), ({"regression": True}, "Mean squared error")],
)
def test_unit_of_a_classifiers_losses(mixture, tmp_path, classification, unit):
    adapter = trained(mixture, {**LORA, "classification": classification})
    moe_jax.export_adapter(adapter, "moe_jax", tmp_path / "out")
    assert (
        METRICS.replace("Nats per target token", unit) in (tmp_path / "out/README.md").read_text()
    )


def test_preference_training(mixture, tmp_path):
    adapter = trained(mixture, LORA, {"name": "dpo", "beta": 0.1})
    moe_jax.export_adapter(adapter, "moe_jax", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert METRICS.replace("Nats per target token", "Preference loss per example") in text
    assert "| preference.name | `dpo` |\n| preference.beta | `0.1` |" in text


def test_a_hub_base_is_linked(mixture, tmp_path):
    adapter = trained(mixture, {**MIXLORA, "router": TOP_P, "dropout": 0.1})
    moe_jax.export_adapter(adapter, "mixlora", tmp_path / "out", base="some/base")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "some/base"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert "# A mixlora adapter of base\n" in card.text
    assert "- Left out, relevant for further training only: dropout.\n" in card.text


def test_the_native_format_has_no_local_paths(mixture, tmp_path):
    moe_jax.export_adapter(trained(mixture, LORA), "moe_jax", tmp_path / "out", base="some/base")
    exported = moe_jax.load_adapter(tmp_path / "out")
    assert exported.base.path == exported.training.base["path"] == "some/base"
    paths = {name: data.path for name, data in exported.training.train.items()}
    assert paths == {"words": "words.jsonl", "more": "owner/rows"}
    assert "/home/someone" not in (tmp_path / "out" / "training.json").read_text()


def test_several_paths_and_files_of_the_hub(mixture, tmp_path):
    adapter = trained(mixture, LORA)
    local, hub = adapter.training.train["words"], adapter.training.train["more"]
    train = {
        "local": dataclasses.replace(local, path="/home/someone/a.csv, /home/someone/b*.csv"),
        "hub": dataclasses.replace(
            hub, path="hf://datasets/owner/rows@v1/x.csv, hf://datasets/owner/other/*.csv"
        ),
    }
    record = dataclasses.replace(adapter.training, train=train)
    moe_jax.export_adapter(adapter._replace(training=record), "moe_jax", tmp_path / "out")
    header = metadata_load(tmp_path / "out" / "README.md")
    assert header["datasets"] == ["owner/rows", "owner/other"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| `a.csv, b*.csv` |" in text
    assert "| `hf://datasets/owner/rows@v1/x.csv, hf://datasets/owner/other/*.csv` |" in text
    assert "/home/someone" not in text + (tmp_path / "out" / "training.json").read_text()


def test_an_adapter_without_a_training_record(mixture, tmp_path):
    adapter = adapter_of(mixture.base, LORA)._replace(step=0)
    moe_jax.export_adapter(adapter, "peft", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "from a base and an adapter that has no recorded training steps." in text
    assert "The data, settings and losses of the adapter's training are not recorded." in text
    assert "## Metrics" not in text
    assert "## Pictures" not in text
    assert "datasets" not in metadata_load(tmp_path / "out" / "README.md")


def test_an_adapter_modified_after_training(mixture, tmp_path):
    """Surgery does this. The card shows both methods and no picture of the former experts."""
    before = trained(mixture, {**MIXLORA, "num_experts": 2})
    adapter = trained(mixture, MIXLORA)._replace(training=before.training)
    moe_jax.export_adapter(adapter, "mixlora", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    current, former = text.split("The adapter was modified after training.")
    assert "| num_experts | `4` |" in current
    assert "| num_experts | `2` |" in former
    assert (tmp_path / "out" / "loss.png").exists()
    assert not (tmp_path / "out" / "experts.png").exists()
