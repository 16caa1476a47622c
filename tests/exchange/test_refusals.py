"""Refusals of inexpressible adapters and of invalid adapter folders: one line, no files left."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from foreign_adapters import LORA, LORAMOE, MIXLORA, MOLA, SWITCH, TOP_P, random_adapter
from hf_models import save_tiny_llama
from safetensors.numpy import load_file, save_file

import moe_jax
from moe_jax.adapters import METHODS
from moe_jax.adapters.routing.router import Router
from moe_jax.exchange import moe_peft
from moe_jax.exchange.format import field_names

SOFT = {"name": "soft"}


def refusal(function, *arguments, **keywords):
    with pytest.raises(moe_jax.UserError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("to", "method", "words"),
    [
        ("peft", MIXLORA, "cannot express method 'mixlora'; PEFT has no experts behind routers; "),
        ("peft", MOLA, "cannot express method 'mola'"),
        ("peft", LORAMOE, "no experts behind routers; formats that can: --to mixlora"),
        ("mixlora", {**LORA, "dora": True}, "cannot express DoRA (dora True); MoE-PEFT does not"),
        ("mixlora", {**MIXLORA, "dora": True}, "cannot express DoRA"),
        ("mixlora", {**MIXLORA, "expert_lora": {"dora": True}}, "cannot express DoRA"),
        ("mixlora", {**MIXLORA, "alpha": 2.5}, "alpha 2.5; its readers require an integer"),
        ("mixlora", {**MIXLORA, "router": SOFT}, "router 'soft' of a MixLoRA; MoE-PEFT has top_k"),
        (
            "mixlora",
            {**MIXLORA, "router": {**TOP_P, "renormalise": True}},
            "router.renormalise True; MoE-PEFT's router behaves as False; train with that",
        ),
        ("mixlora", {**MIXLORA, "router": {**TOP_P, "temperature": 0.5}}, "router.temperature 0.5"),
        ("mixlora", {**MIXLORA, "router": {**SWITCH, "overflow": "residual"}}, "router.overflow"),
        (
            "mixlora",
            {**MIXLORA, "router": {**SWITCH, "weights": "straight_through"}},
            "router.weights 'straight_through'; MoE-PEFT's router behaves as 'probability'",
        ),
        ("mixlora", {**MIXLORA, "router": {**SWITCH, "sparse_step": 2}}, "router.sparse_step 2"),
        (
            "mixlora",
            {
                **MIXLORA,
                "router": {"name": "switch", "capacity_factor": 1.5, "overflow": "input"},
            },
            "router.capacity_factor 1.5",
        ),
        ("mixlora", {**MOLA, "router": SOFT}, "router 'soft' of a MoLA"),
        ("mixlora", {**LORAMOE, "router": MOLA["router"]}, "router 'top_k' of a LoRAMoE"),
        ("mixlora", {**MOLA, "num_experts": [2, 3, 4]}, "num_experts 2-3-4; MoE-PEFT has one"),
    ],
)
def test_features_that_a_format_cannot_express(tiny, tmp_path, to, method, words):
    adapter = random_adapter(method, tiny.base.config)
    message = refusal(moe_jax.export_adapter, adapter, to, tmp_path / "out")
    assert words in message
    assert list(tmp_path.iterdir()) == []


def test_every_field_is_handled():
    """Every field of every method and router is in the lists of fields that the format handles."""
    for name in ("lora", "mixlora", "loramoe", "mola"):
        assert set(field_names(METHODS[name])) <= set(moe_peft._KNOWN)
    for router, fields in moe_peft._HANDLED_ROUTER_FIELDS.items():
        assert set(field_names(router)) == {*field_names(Router), *fields}


def test_invalid_outputs_and_options(tiny, tmp_path, monkeypatch):
    adapter = random_adapter(LORA, tiny.base.config)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    message = refusal(moe_jax.export_adapter, adapter, "peft", tmp_path / "full")
    assert "full: is not empty" in message
    assert "unknown format 'peff'; did you mean 'peft'?" in refusal(
        moe_jax.export_adapter, adapter, "peff", tmp_path / "out"
    )
    assert "unknown dtype 'int8'" in refusal(
        moe_jax.export_adapter, adapter, "peft", tmp_path / "out", dtype="int8"
    )
    save_tiny_llama(tmp_path / "wide", hidden_size=96)
    message = refusal(
        moe_jax.export_adapter, adapter, "peft", tmp_path / "out", base=str(tmp_path / "wide")
    )
    assert "wide: its architecture differs from that of the base that the adapter" in message
    shutil.rmtree(tmp_path / "wide")
    large = adapter._replace(tree={"layers": _times(adapter.tree["layers"], 1e6)})
    message = refusal(moe_jax.export_adapter, large, "peft", tmp_path / "out", dtype="float16")
    assert "has values too large for float16" in message
    less = {"layers": {"mlp": adapter.tree["layers"]["mlp"]}}
    message = refusal(moe_jax.export_adapter, adapter._replace(tree=less), "peft", tmp_path / "out")
    assert "its weights: has no array for 'layers/self_attn/" in message
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    message = refusal(moe_jax.export_adapter, adapter, "mixlora", tmp_path / "out")
    assert "MB and the disk has 1.0 kB; free some space" in message
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def _times(tree, factor):
    return {
        key: _times(node, factor) if isinstance(node, dict) else node * factor
        for key, node in tree.items()
    }


def test_fused_projections_are_refused(tiny, tmp_path):
    phi = dataclasses.replace(tiny.base.config, model_type="phi3")
    adapter = random_adapter({**LORA, "target_modules": ["k_proj", "o_proj"]}, phi)
    message = refusal(moe_jax.export_adapter, adapter, "peft", tmp_path / "out")
    assert "'k_proj' is no module of phi3 in other tools, but part of qkv_proj" in message
    adapter = random_adapter({**LORA, "target_modules": ["o_proj", "down_proj"]}, phi)
    assert moe_jax.export_adapter(adapter, "peft", tmp_path / "out") == []


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """Read-only folders of adapters as other tools write them, one for each `peft_type`."""
    folder = tmp_path_factory.mktemp("written")
    cases = {
        "LORA": ("peft", LORA),
        "DORA": ("peft", {**LORA, "dora": True}),
        "MIXLORA": ("mixlora", MIXLORA),
        "DYNAMIC": ("mixlora", {**MIXLORA, "router": TOP_P}),
        "LORAMOE": ("mixlora", LORAMOE),
        "MOLA": ("mixlora", MOLA),
    }
    for name, (to, method) in cases.items():
        moe_jax.export_adapter(random_adapter(method, tiny.base.config), to, folder / name)
    return folder


def with_config(source, target, **changes):
    """A copy of an adapter with changed fields; `...` removes a field."""
    shutil.copytree(source, target)
    file = target / "adapter_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return target


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("LORA", {"peft_type": "IA3"}, "peft_type: 'IA3' is not supported; "),
        ("LORA", {"peft_type": "MIXLOR"}, "did you mean 'MIXLORA'?"),
        ("LORA", {"peft_type": ...}, "peft_type: None is not supported"),
        ("LORA", {"peft_type": ["LORA"]}, "peft_type: ['LORA'] is not supported"),
        ("LORA", {"r": ...}, "r: this field is required and was not given"),
        ("LORA", {"r": "4"}, "r: expected int, got str ('4')"),
        ("LORA", {"r": 0}, "rank: must be positive"),
        (
            "LORA",
            {"r": 8},
            "has shape [4, 48], but by adapter_config.json it should have [8, 48] on ",
        ),
        ("LORA", {"lora_alpha": None}, "lora_alpha: this field is required"),
        ("LORA", {"target_modules": ["fc1", "fc2"]}, "['fc1', 'fc2'] matches no module of the ba"),
        ("LORA", {"target_modules": ["q_proj", "fc1"]}, "layers.0.mlp.down_proj.lora_B.weight and"),
        (
            "LORA",
            {"target_modules": ["q_proj"]},
            "layers.0.mlp.down_proj.lora_B.weight and 34 more",
        ),
        ("LORA", {"target_modules": 3}, "target_modules: expected a tuple, got int (3)"),
        (
            "LORA",
            {"target_modules": r"model\.layers\.\d\..*\.(q|k|v|o|gate|up)_proj"},
            "layers.0.mlp.down_proj.lora_B.weight and 4 more, which would be dropped",
        ),
        ("LORA", {"target_modules": ".*fc1"}, "target_modules: '.*fc1' matches no module"),
        ("LORA", {"target_modules": "(q_proj"}, "target_modules: '(q_proj' is not a valid pattern"),
        ("LORA", {"bias": "some"}, "bias: 'some' is not supported"),
        ("LORA", {"task_type": "SEQ_CLS"}, "task_type: 'SEQ_CLS' is not supported"),
        (
            "LORA",
            {"rank_pattern": {"q_proj": 8}},
            "should have [8, 48] on {base}; adapter_config.json (r, rank_pattern) is not that of",
        ),
        ("LORA", {"rank_pattern": {"(": 8}}, "rank_pattern: '(' is not a valid pattern"),
        ("LORA", {"layers_to_transform": [0, 1]}, "layers.2.mlp.down_proj.lora_B.weight and 12 mo"),
        ("LORA", {"layers_to_transform": ["1"]}, "layers_to_transform[0]: expected int, got str"),
        ("LORA", {"modules_to_save": ["lm_head"]}, "modules_to_save: ['lm_head'] adds trained wei"),
        ("LORA", {"lora_bias": True}, "lora_bias: True adds trained biases of the pairs, which"),
        ("LORA", {"some_new_field": 1}, "some_new_field: 1 is not supported"),
        ("LORA", {"init_lora_weights": "pissa"}, "'pissa' changes the weights of the base"),
        ("LORA", {"use_dora": True}, "use_dora: adapter_model.safetensors has no magnitudes"),
        ("DORA", {"use_dora": False}, "lora_magnitude_vector and "),
        ("MIXLORA", {"use_dora": True}, "use_dora: MoE-PEFT does not save the magnitudes"),
        ("MIXLORA", {"routing_strategy": "mixlora-dynamc"}, "did you mean 'mixlora-dynamic'?"),
        ("MIXLORA", {"routing_strategy": "mola"}, "routing_strategy: 'mola' is not supported"),
        ("MIXLORA", {"num_experts": 5}, "experts.4.lora_A.weight"),
        ("MIXLORA", {"num_experts": 3}, "experts.3.lora_A.weight"),
        ("MIXLORA", {"num_experts": ...}, "num_experts: this field is required"),
        ("MIXLORA", {"top_k": 5}, "top_k: 5 experts per token, but there are only 4"),
        ("MIXLORA", {"top_p": 0.5}, "top_p: 0.5 is not supported"),
        ("MIXLORA", {"act_fn": "gelu"}, "act_fn: 'gelu' in the experts' FFN is not supported"),
        ("MIXLORA", {"expert_lora": {"r": 8}}, "experts.0.lora_A.weight: has shape [4, 80], but"),
        ("MIXLORA", {"expert_lora": {"rr": 8}}, "expert_lora: rr: 8 is not supported"),
        ("MIXLORA", {"expert_lora": 3}, "expert_lora: expected a group of fields"),
        ("MIXLORA", {"target_modules": ["q_proj"]}, "MixLoRA needs at least one of gate_proj"),
        ("MIXLORA", {"peft_type": "MOLA"}, "routing_strategy: 'mixlora' is not supported"),
        ("DYNAMIC", {"temperature": 0.5}, "temperature: 0.5 divides probabilities in MoE-PEFT"),
        ("DYNAMIC", {"top_p": 1.5}, "top_p: must lie in (0, 1]"),
        ("LORAMOE", {"top_k": 2}, "top_k: 2 is not supported"),
        ("MOLA", {"num_experts": [2, 4]}, "num_experts: expected int, got list ([2, 4])"),
        (
            "MOLA",
            {"peft_type": "LORAMOE", "routing_strategy": "loramoe"},
            "top_k: 2 is not supported",
        ),
    ],
)
def test_invalid_configurations(tiny, written, tmp_path, name, changes, words):
    source = with_config(written / name, tmp_path / "in", **changes)
    message = refusal(moe_jax.import_adapter, source, tiny.folder, tmp_path / "out")
    assert words.replace("{base}", str(tiny.folder)) in message
    assert message.startswith(str(source))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_empty_fields_are_accepted(tiny, written, tmp_path):
    empty = {"rank_pattern": {}, "modules_to_save": None, "lora_bias": False, "layers": []}
    source = with_config(written / "LORA", tmp_path / "in", **empty, peft_version="0.99")
    assert moe_jax.import_adapter(source, tiny.folder).method.rank == 4
    source = with_config(written / "LORA", tmp_path / "all", target_modules="all-linear")
    assert len(moe_jax.import_adapter(source, tiny.folder).method.target_modules) == 7
    names = {**dict.fromkeys(MIXLORA["target_modules"], True), "fc1": False}
    source = with_config(written / "MIXLORA", tmp_path / "dict", target_modules=names)
    method = moe_jax.import_adapter(source, tiny.folder).method
    assert list(method.target_modules) == MIXLORA["target_modules"]


def test_invalid_tensors(tiny, written, tmp_path):
    source = with_config(written / "LORA", tmp_path / "in")
    file = source / "adapter_model.safetensors"
    tensors = load_file(file)
    first, *_ = tensors
    bad = np.array(tensors[first])
    bad[0, 0] = np.inf
    for changed, words in (
        (
            {**tensors, "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": bad},
            "c_attn.lora_A.weight, but {base} has no such projection in its layers; give the base",
        ),
        ({**tensors, "extra": np.zeros(3, np.float32)}, "holds extra, no part of a LoRA, which"),
        (
            {k: v for k, v in tensors.items() if k != first},
            f"lacks the pairs of {first.removesuffix('.lora_A.weight')}, which adapter_config.json",
        ),
        ({**tensors, first: bad}, f"{first}: has values that are not finite"),
        ({**tensors, first: bad.astype(np.float64)}, f"{first}: is stored as F64; supported: F32"),
    ):
        save_file(changed, file)
        message = refusal(moe_jax.import_adapter, source, tiny.folder, tmp_path / "out")
        assert words.replace("{base}", str(tiny.folder)) in message
        assert message.startswith(str(file))
    file.write_bytes(file.read_bytes()[:-100])
    message = refusal(moe_jax.import_adapter, source, tiny.folder)
    assert "truncated or damaged" in message
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_another_base(written, tmp_path):
    for name, overrides, words in (
        ("wide", {"hidden_size": 96}, "has shape [4, 48], but by adapter_config.json it should h"),
        ("deep", {"num_hidden_layers": 4}, "has pairs on the layers up to 2, but adapter_config."),
        ("flat", {"num_hidden_layers": 2}, "more, but {base} has the layers 0 to 1; give the base"),
    ):
        save_tiny_llama(tmp_path / name, **overrides)
        message = refusal(moe_jax.import_adapter, written / "LORA", tmp_path / name)
        assert words.replace("{base}", str(tmp_path / name)) in message
        assert "give the base that the adapter was trained on" in message


def test_invalid_folders(tiny, written, tmp_path):
    message = refusal(moe_jax.import_adapter, tmp_path / "gone", tiny.folder)
    assert "no adapter here, adapter_config.json is missing" in message
    for step in (20, 40):
        with_config(written / "MIXLORA", tmp_path / "run" / f"checkpoint-{step}")
    message = refusal(moe_jax.import_adapter, tmp_path / "run", tiny.folder)
    assert message.endswith("is missing; give its subfolder checkpoint-20 or checkpoint-40")
    source = with_config(written / "MIXLORA", tmp_path / "in")
    (source / "adapter_model.bin").unlink()
    message = refusal(moe_jax.import_adapter, source, tiny.folder)
    assert "has neither adapter_model.safetensors nor adapter_model.bin" in message
    (source / "adapter_config.json").write_text("[]")
    assert "expected an object" in refusal(moe_jax.import_adapter, source, tiny.folder)
    (source / "adapter_config.json").write_text("{")
    assert "not valid JSON" in refusal(moe_jax.import_adapter, source, tiny.folder)
    (source / "adapter_config.json").write_text("[" * 10**5)
    assert "not valid JSON" in refusal(moe_jax.import_adapter, source, tiny.folder)
    (source / "adapter_config.json").unlink()
    (source / "adapter.json").write_text("{}")
    message = refusal(moe_jax.import_adapter, source, tiny.folder)
    assert "is already an adapter of this library" in message
    message = refusal(moe_jax.import_adapter, written / "LORA", tmp_path / "no base")
    assert "no such folder" in message
    message = refusal(moe_jax.import_adapter, written / "LORA", tiny.folder, source)
    assert "is not empty" in message


def test_a_pickle_with_code_in_it(tiny, written, tmp_path):
    source = with_config(written / "MIXLORA", tmp_path / "in")
    file = source / "adapter_model.bin"

    class Code:
        def __reduce__(self):
            return open, (str(tmp_path / "it ran"), "w")

    torch.save({**torch.load(file, weights_only=True), "code": Code()}, file)
    message = refusal(moe_jax.import_adapter, source, tiny.folder, tmp_path / "out")
    assert message.startswith(f"{file}: holds a pickle that calls ")
    assert "open, which was not run" in message
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
