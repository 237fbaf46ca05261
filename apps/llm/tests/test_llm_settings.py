"""The settings are those of the command line and of the Flower app, and impossible ones are refused."""

import dataclasses
import inspect
import tomllib
from pathlib import Path
from typing import Any

import pytest

import fedomc
from fedomc_llm import cli
from fedomc_llm.errors import SettingsError
from fedomc_llm.settings import Settings, Variant


@pytest.mark.parametrize(
    ("text", "method", "format", "adapters"),
    [
        ("full:FP32", "full", "FP32", "FP32"),
        (f"full:{fedomc.DEFAULT}", "full", fedomc.DEFAULT, "FP32"),
        ("full:S1E2M3>DRIVE1", "full", "S1E2M3>DRIVE1", "FP32"),
        ("lora:FP32", "lora", "FP32", "FP32"),
        ("lora:S1E2M3/64", "lora", "S1E2M3/64", "FP32"),
        ("lora:S1E2M3/64:S1E4M3", "lora", "S1E2M3/64", "S1E4M3"),
    ],
)
def test_variants_are_read_and_written(text: str, method: str, format: str, adapters: str) -> None:
    variant = Variant.parse(text)
    assert (variant.method, variant.format, variant.adapter_format) == (method, format, adapters)
    assert str(variant) == text
    travels = format if method == "full" else adapters
    assert (variant.policy(0) is None) == (travels == "FP32")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("FP32", "no way of fine-tuning"),
        ("full", "no way of fine-tuning"),
        ("full:FP32:FP32", "no way of fine-tuning"),
        ("half:FP32", "no way of fine-tuning"),
        ("lora:S1E9M3", "'S1E9M3' is not a format"),
        ("lora:FP32:S1", "'S1' is not a format"),
        (f"lora:{fedomc.DEFAULT}", "one part"),
    ],
)
def test_other_texts_are_no_variants(text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=says) as raised:
        Variant.parse(text)
    assert text in str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"length": 1}, "length=1"),
        ({"cohort": -1}, "cohort=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"variants": ()}, "variants is empty"),
        ({"variants": ("full:FP32", "full:FP32")}, "given twice"),
        ({"activations": "S9"}, "S9"),
    ],
)
def test_impossible_settings_are_named(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(fedomc.OMCError, match=says):
        Settings(**wrong)


@pytest.mark.parametrize(
    ("key", "value", "says"), [("turns", 3, "'turns' is unknown"), ("rounds", 1.5, "int"), ("checkpointing", 2, "bool")]
)
def test_a_run_config_is_checked(key: str, value: object, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        Settings.from_mapping({key: value})


def test_settings_survive_a_round_trip() -> None:
    settings = Settings(variants=("full:FP32",), rounds=7, learning_rate=0.25, texts="/somewhere", checkpointing=True)
    assert Settings.from_mapping(settings.to_dict()) == settings
    dashed = {key.replace("_", "-"): value for key, value in settings.to_dict().items()}
    assert Settings.from_mapping({**dashed, "variants": " ".join(settings.variants)}) == settings


def test_the_flower_app_has_the_same_settings_and_defaults() -> None:
    config = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    rest = {key: value for key, value in config.items() if key not in ("output", "resume")}
    assert len(config) == len(rest) + 2 and len(rest) == len(Settings().to_dict())
    assert Settings.from_mapping(rest) == Settings()


def test_the_command_line_has_all_settings_and_defaults() -> None:
    parameters = inspect.signature(cli.finetune).parameters
    for field in dataclasses.fields(Settings):
        parameter = parameters["texts_folder" if field.name == "texts" else field.name]
        assert parameter.default == (None if field.name == "variants" else field.default), field.name
