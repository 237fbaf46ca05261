import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fedomc
from tests.cli.conftest import network, refused, run


@pytest.mark.parametrize("format", ["S1E3M7", "S1E2M3/64+S1E2M1/64", "NF4", "S1E2M3>DRIVE1"])
def test_the_file_is_that_of_a_compressed_model(dense: Path, tmp_path: Path, format: str) -> None:
    out, expected = tmp_path / "out", tmp_path / "expected"
    assert run("compress", dense, out, "--format", format).exit_code == 0
    fedomc.save_model(fedomc.compress_(network(), format), expected, {"format": "pt"})
    assert out.read_bytes() == expected.read_bytes()
    model = fedomc.load_model(network(), out)
    assert isinstance(model[0].weight, fedomc.CompressedTensor)


def test_errors_are_shown_by_variable(dense: Path, tmp_path: Path) -> None:
    result = run("compress", dense, tmp_path / "out", "--format", "S1E2M3", "--json")
    found = json.loads(result.stdout)
    weight = network()[0].weight.detach()
    decoded = fedomc.CompressedTensor.from_dense(weight, "S1E2M3").dequantize()
    row = found["variables"][0]
    assert row["name"] == "0.weight"
    assert row["relative_error"] == pytest.approx(float((decoded - weight).norm() / weight.norm()), rel=1e-3)
    assert found["bytes"] == (tmp_path / "out").stat().st_size and found["warning"] is None


def test_the_table_fits(dense: Path, tmp_path: Path) -> None:
    result = run("compress", dense, tmp_path / "out", "--format", "INT8")
    lines = result.stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == ["0.weight", "2.weight"] and not result.stderr
    assert max(map(len, lines[:3])) <= 80


def test_excluded_variables_stay(dense: Path, tmp_path: Path) -> None:
    assert run("compress", dense, tmp_path / "out", "--format", "S1E3M7", "--exclude", "0.*").exit_code == 0
    rows = json.loads(run("inspect", tmp_path / "out", "--json").stdout)["variables"]
    assert [row["name"] for row in rows if row["packed"]] == ["2.weight"]


def test_variables_that_a_format_cannot_hold_are_named(tmp_path: Path) -> None:
    values = torch.randn(64, 64) * 1e-3
    values[0, 0] = 1000
    save_file({"outlier": values}, tmp_path / "in")
    result = run("compress", tmp_path / "in", tmp_path / "out", "--format", "S1E2M1")
    assert result.exit_code == 0 and "warning" in result.stderr and "outlier" in result.stderr


def test_a_file_is_overwritten_only_when_asked(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("precious")
    assert "--force" in refused(run("compress", dense, out, "--format", "S1E3M7"), 2)
    assert out.read_text() == "precious"
    assert run("compress", dense, out, "--format", "S1E3M7", "--force").exit_code == 0
    fedomc.load_model(network(), out)


@pytest.mark.parametrize(
    ("tensors", "format", "code", "said"),
    [
        ({"w": torch.full((64, 64), torch.nan)}, "S1E3M7", 1, "w "),
        ({"w": torch.ones(64, 64), "b": torch.full((3,), torch.inf)}, "S1E3M7", 1, "b "),
        ({"w": torch.ones(64, 64)}, "S9", 2, "'S9' is not a number format"),
        ({"w": torch.ones(64, 64)}, "DRIVE1", 2, "DRIVE1"),
        ({"w": torch.ones(64, 64)}, "S1E3M7@2", 2, "fraction"),
        ({"b": torch.ones(64)}, "S1E3M7", 2, "none of 1 variables"),
    ],
)
def test_what_cannot_be_packed_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], format: str, code: int, said: str
) -> None:
    save_file(tensors, tmp_path / "in")
    assert said in refused(run("compress", tmp_path / "in", tmp_path / "out", "--format", format), code)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_files_that_do_not_fit_are_refused(dense: Path, tmp_path: Path) -> None:
    out, format = tmp_path / "out", ("--format", "S1E3M7")
    assert "no such file" in refused(run("compress", tmp_path / "missing", out, *format), 2)
    assert "folder" in refused(run("compress", dense, tmp_path / "missing" / "out", *format), 2)
    assert "folder" in refused(run("compress", dense, tmp_path, *format, "--force"), 2)
    assert run("compress", dense, out, *format).exit_code == 0
    assert "written by fedomc" in refused(run("compress", out, tmp_path / "again", *format), 1)
    dense.write_bytes(dense.read_bytes()[:-1])
    assert "damaged" in refused(run("compress", dense, tmp_path / "again", *format), 1)
