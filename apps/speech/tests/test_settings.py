import dataclasses
import inspect
import tomllib
from pathlib import Path

import pytest

import fedomc
from fedomc_speech import cli
from fedomc_speech.errors import SettingsError
from fedomc_speech.settings import Settings, Variant


@pytest.mark.parametrize(
    ("text", "format", "fraction"),
    [
        ("FP32", "FP32", 1.0),
        ("S1E3M7", "S1E3M7", 1.0),
        ("S1E3M7@0.9", "S1E3M7", 0.9),
        ("S1E2M3+S1E2M1", "S1E2M3+S1E2M1", 1.0),
        ("S1E2M3+S1E2M1@0.75", "S1E2M3+S1E2M1", 0.75),
        ("S1E3M7>DRIVE1@0.9", "S1E3M7>DRIVE1", 0.9),
        ("S1E4M3+S1E2M1>S1E2M1", "S1E4M3+S1E2M1>S1E2M1", 1.0),
        ("S1E2M3/64+S1E2M1/64", "S1E2M3/64+S1E2M1/64", 1.0),
        ("NF4@0.5", "NF4", 0.5),
    ],
)
def test_a_variant_is_read_and_printed(text: str, format: str, fraction: float) -> None:
    variant = Variant.parse(text)
    assert (variant.format, variant.fraction, str(variant)) == (format, fraction, text)


def test_the_policy_of_a_variant() -> None:
    settings = Settings(seed=5, transform="affine", rounding="stochastic")
    assert Variant.parse("FP32").policy(settings) is None
    one, two = (Variant.parse(text).policy(settings) for text in ("S1E3M7@0.9", "S1E2M3+S1E2M1"))
    assert one is not None and two is not None
    assert (str(one.format), one.update_format, one.fraction, one.rounding) == ("S1E3M7", None, 0.9, "stochastic")
    assert (str(two.format), str(two.update_format), two.rounding) == ("S1E2M3", "S1E2M1", "stochastic")
    assert one.seed == two.seed == 5
    assert one.transform == "affine"
    one, two = (Variant.parse(text).policy(Settings()) for text in ("S1E3M7@0.9", "S1E2M3+S1E3M0"))
    how = {"exclude": ("*.bias_u", "*.bias_v")}
    nearest = {"transform": "scaled-affine", "rounding": "nearest"}
    assert one == fedomc.CompressionPolicy("S1E3M7", fraction=0.9, **nearest, **how)
    assert two == fedomc.CompressionPolicy("S1E2M3", "S1E3M0", transform="scaled", **how)
    blocks = Variant.parse(fedomc.DEFAULT).policy(Settings())
    assert blocks == fedomc.CompressionPolicy.parse(fedomc.DEFAULT, **how)
    assert Variant.parse("S1E2M3/64").policy(Settings()) == fedomc.CompressionPolicy(
        "S1E2M3/64", rounding="nearest", **how
    )
    mixed = Variant("S1E2M1").policy(Settings(format_by_name="*.conv.*=S1E2M3 head.*=S1E3M7"))
    assert mixed is not None
    assert [str(mixed.format_of(name)) for name in ("a.conv.b", "head.weight", "c")] == ["S1E2M3", "S1E3M7", "S1E2M1"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"formats": "S1E3"}, "S1E3"),
        ({"formats": "S1E9M3"}, "S1E9M3"),
        ({"formats": "S1E3M7@1.5"}, "1.5"),
        ({"formats": "S1E3M7@0..9"}, "0..9"),
        ({"formats": "FP32 FP32"}, "twice"),
        ({"formats": "S1E3M7@0.9 S1E3M7@.90"}, "twice"),
        ({"rounds": 0}, "rounds=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"client-learning-rate": "fast"}, "client-learning-rate"),
        ({"augment": "perhaps"}, "type bool"),
        ({"augment": 1}, "type bool"),
        ({"client-learning-rate": float("nan")}, "client_learning_rate=nan"),
        ({"server-learning-rate": -1.0}, "server_learning_rate"),
        ({"aggregate": "median"}, "median"),
        ({"entropy_coding": "sideways"}, "sideways"),
        ({"unquantized-format": "S1E5"}, "S1E5"),
        ({"format-by-name": "head.*"}, "format_by_name='head"),
        ({"format-by-name": "head.*=S1E5"}, "S1E5"),
        ({"transform": "log", "formats": "S1E3M7"}, "log"),
        ({"round": 3}, "'round' is unknown"),
        ({"streaming": "yes"}, "streaming='yes'"),
        ({"streaming": 1}, "streaming=1"),
        ({"streaming": [True]}, "streaming="),
    ],
)
def test_what_is_wrong_is_named(values: dict[str, object], says: str) -> None:
    with pytest.raises(fedomc.OMCError, match=says.replace("+", r"\+")):
        Settings.from_mapping(values)


@pytest.mark.parametrize(("written", "read"), [(True, True), (False, False), ("true", True), ("false", False)])
def test_truth_values_are_read_as_toml_and_run_configs_write_them(written: object, read: bool) -> None:
    assert Settings.from_mapping({"streaming": written}).streaming is read


def test_settings_survive_a_round_trip() -> None:
    settings = Settings(
        formats=("FP32", "S1E3M7@0.9"), rounds=7, client_learning_rate=0.25, corpus_path="/somewhere", streaming=True
    )
    assert Settings.from_mapping(settings.to_dict()) == settings
    dashed = {key.replace("_", "-"): value for key, value in settings.to_dict().items()}
    assert Settings.from_mapping({**dashed, "formats": " ".join(settings.formats)}) == settings


def test_the_flower_app_has_the_same_settings_and_defaults() -> None:
    app = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    config = app["config"]
    assert {"output", "resume"} <= set(config)
    rest = {key: value for key, value in config.items() if key not in ("output", "resume")}
    assert len(rest) == len(Settings().to_dict())
    assert Settings.from_mapping(rest) == Settings()


def test_the_command_line_has_all_settings_and_defaults() -> None:
    renamed = {"corpus": "corpus_name", "model": "model_size", "formats": "formats"}
    parameters = inspect.signature(cli.compare).parameters
    for field in dataclasses.fields(Settings):
        parameter = parameters[renamed.get(field.name, field.name)]
        assert parameter.default == (None if field.name == "formats" else field.default), field.name


def test_the_server_learning_rate_rises_and_falls() -> None:
    settings = Settings(rounds=100, warmup=10, server_learning_rate=2.0)
    rates = [settings.server_learning_rate_in(number) for number in range(1, 101)]
    assert rates[0] == 0.2
    assert max(rates) == rates[9] == 2.0
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_unknown_sizes_and_cohorts_are_refused() -> None:
    from fedomc_speech import federation, model

    with pytest.raises(SettingsError, match="huge"):
        model.build("huge", 5)
    with pytest.raises(SettingsError, match="only 3 clients"):
        federation.check_cohort(Settings(cohort=4), 3)
