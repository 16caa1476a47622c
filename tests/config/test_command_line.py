"""Configuration files, and overrides on the command line."""

import pytest

from moe_jax.config.command_line import apply_overrides, load_config_file, split_overrides
from moe_jax.errors import ConfigError


def write(tmp_path, text):
    file = tmp_path / "config.py"
    file.write_text(text)
    return str(file)


def test_a_file_with_dicts_or_config_dicts(tmp_path):
    plain = write(tmp_path, "def get_config():\n    return {'a': {'b': 1}}\n")
    assert load_config_file(plain) == {"a": {"b": 1}}
    text = "import ml_collections\n\ndef get_config():\n    c = ml_collections.ConfigDict()\n"
    text += "    c.a = ml_collections.ConfigDict({'b': (1, 2)})\n    return c\n"
    assert load_config_file(write(tmp_path, text)) == {"a": {"b": (1, 2)}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n", "defines no function get_config()"),
        ("def get_config():\n    return 3\n", "returned no group of fields"),
        ("def get_config():\n\n    return 1 / 0\n", "fails in line 3: ZeroDivisionError: division"),
        ("def get_config(:\n", "fails in line 1: SyntaxError"),
        ("import no_such_package\n", "fails in line 1: ModuleNotFoundError: No module named"),
        ("raise ValueError('a\\nb')\n", "fails in line 1: ValueError: a"),
    ],
)
def test_invalid_files(tmp_path, text, words):
    with pytest.raises(ConfigError) as error:
        load_config_file(write(tmp_path, text))
    assert words in str(error.value)
    assert "config.py" in str(error.value)
    assert "\n" not in str(error.value)


def test_duplicate_key_in_one_dict(tmp_path):
    # Python keeps the last one, and the first of two adapters of the same name would be lost.
    text = """
def get_config():
    return {
        "adapters": {
            "mine": {"batch_size": 1},
            "other": {"batch_size": 1},
            "mine": {"batch_size": 2},
        },
    }
"""
    with pytest.raises(ConfigError) as error:
        load_config_file(write(tmp_path, text))
    assert "config.py line 7: the key 'mine' is given twice in one dict, first in line 5" in str(
        error.value
    )
    with pytest.raises(ConfigError, match="line 1: the key 1 is given twice"):
        load_config_file(write(tmp_path, "X = {1: 2, 1: 3}\n"))
    # Equal keys of different dicts, and keys in subscripts, are valid.
    fine = "X = 'a'\n\ndef get_config():\n    return {'a': {'a': 1}, 'b': {'a': 1, X + 'b': 2}}\n"
    assert load_config_file(write(tmp_path, fine)) == {"a": {"a": 1}, "b": {"a": 1, "ab": 2}}


def test_missing_file(tmp_path):
    (tmp_path / "tiny_mixlora.py").write_text("")
    with pytest.raises(ConfigError, match=r"no such file: .*; did you mean 'tiny_mixlora\.py'\?"):
        load_config_file(str(tmp_path / "tiny_mixlra.py"))


def test_overrides_are_separated_from_flags():
    others, overrides = split_overrides(
        ["--config", "x.py", "--config.a.b=1=2", "--config.c", "3", "-config.d=", "--workdir=w"]
    )
    assert others == ["--config", "x.py", "--workdir=w"]
    assert overrides == {"a.b": "1=2", "c": "3", "d": ""}
    with pytest.raises(ConfigError, match=r"has no value; write --config\.a=VALUE"):
        split_overrides(["--config.a"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("1e-4", 1e-4),
        ("-1", -1),
        ("(64, 128)", (64, 128)),
        ("('q_proj', 'v_proj')", ("q_proj", "v_proj")),
        ("None", None),
        ("true", True),
        ("False", False),
        ("runs/base", "runs/base"),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("'8'", "8"),
        ("", ""),
    ],
)
def test_values(text, value):
    config = {"a": {"b": 0}}
    apply_overrides(config, {"a.b": text})
    assert config["a"]["b"] == value
    assert type(config["a"]["b"]) is type(value)


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("base.revision", "1234567", "1234567"),
        ("base.revision", "1e5", "1e5"),
        ("base.revision", "None", None),
        ("base.revision", "'8'", "8"),
        ("adapters.default.data.train.words.split", "2024", "2024"),
        ("adapters.default.data.train.words.columns.output", "3", "3"),
        ("adapters.default.data.train.words.columns", "{'output': 'a'}", {"output": "a"}),
        ("adapters.default.data.buckets", "(16, 32)", (16, 32)),
        ("adapters.default.method.rank", "8", 8),
        ("compute.remat", "none", "none"),
        ("training.steps", "8", 8),
        ("training.epochs", "None", None),
    ],
)
def test_string_fields_stay_strings(path, text, value):
    config = {}
    apply_overrides(config, {path: text})
    for name in path.split("."):
        config = config[name]
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize("text", ["a*.csv", "8", "('a',", "a, b"])
def test_one_path_is_a_string(text):
    config = {}
    apply_overrides(config, {"adapters.default.data.train.words.path": text})
    assert config["adapters"]["default"]["data"]["train"]["words"] == {"path": text}


@pytest.mark.parametrize("text", ["('a', 'b.csv')", "['a', 'b.csv']"])
def test_several_paths_are_a_tuple(text):
    config = {}
    apply_overrides(config, {"adapters.default.data.train.words.path": text})
    assert list(config["adapters"]["default"]["data"]["train"]["words"]["path"]) == ["a", "b.csv"]


def test_fields_that_the_file_leaves_out():
    config = {"training": {"steps": None}}
    apply_overrides(config, {"training.steps": "5", "checkpoints.keep": "1"})
    assert config == {"training": {"steps": 5}, "checkpoints": {"keep": 1}}


def test_groups_that_are_misspelt():
    with pytest.raises(ConfigError, match=r"config\.adapters\.defualt: .*did you mean 'default'"):
        apply_overrides({"adapters": {"default": {}}}, {"adapters.defualt.batch_size": "4"})
    with pytest.raises(ConfigError, match=r"config\.seed: is a single value"):
        apply_overrides({"seed": 1}, {"seed.value": "4"})


@pytest.mark.parametrize(
    ("names", "field"),
    [
        (["a"], "config.adapters.a.optimizer.name"),
        (["a", "b"], "config.adapters.NAME.optimizer.name"),
        ([], "config.adapters.NAME.optimizer.name"),
    ],
)
def test_fields_of_an_adapter_at_the_top(names, field):
    config = {"adapters": {name: {} for name in names}}
    with pytest.raises(ConfigError, match=rf"is a field of an adapter; give {field}$"):
        apply_overrides(config, {"optimizer.name": "adamw"})
