import json
from pathlib import Path

import pytest

import fedomc
from tests.cli.conftest import network, refused, run


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    path = tmp_path / "packed.safetensors"
    fedomc.save_model(fedomc.compress_(network(), "S1E2M3+S1E2M1"), path)
    return path


def test_a_packed_file_lists_formats_and_bytes(packed: Path) -> None:
    result = run("inspect", packed, "--json")
    found = json.loads(result.stdout)
    rows = {row["name"]: row for row in found["variables"]}
    assert result.exit_code == 0 and list(rows) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert rows["0.weight"]["held_as"] == "S1E2M3+S1E2M1" and rows["0.weight"]["shape"] == [256, 256]
    assert rows["0.weight"]["fp32_bytes"] == 4 * 256 * 256
    assert 6 / 32 < rows["0.weight"]["bytes"] / rows["0.weight"]["fp32_bytes"] < 7 / 32
    assert rows["0.bias"]["held_as"] == "F32" and rows["0.bias"]["bytes"] == 1024
    assert found["bytes"] == sum(row["bytes"] for row in rows.values()) and not found["verified"]


def test_the_table_has_a_row_by_variable_and_fits(packed: Path) -> None:
    result = run("inspect", packed, "--verify")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and max(map(len, lines)) <= 80
    assert [line.split()[-1] for line in lines[:5]] == ["variable", "0.bias", "0.weight", "2.bias", "2.weight"]
    assert "4 variables, 2 of them packed" in result.stdout and "all values match the digests" in result.stdout


def test_a_file_of_another_program_has_no_digests(dense: Path) -> None:
    assert "no digests" in run("inspect", dense, "--verify").stdout
    found = json.loads(run("inspect", dense, "--verify", "--json").stdout)
    assert found["metadata"] == {"format": "pt"} and not found["written_by_fedomc"] and not found["verified"]


def test_damaged_values_are_found_when_asked_for(packed: Path) -> None:
    data = bytearray(packed.read_bytes())
    data[-1000] ^= 1
    packed.write_bytes(data)
    assert run("inspect", packed).exit_code == 0
    assert "damaged" in refused(run("inspect", packed, "--verify"), 1)


@pytest.mark.parametrize("content", [b"", b"text", b"\xff" * 100, b"\x08" + bytes(7) + b"{}      "], ids=len)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    result = run("inspect", path)
    if content.endswith(b"{}      "):
        assert result.exit_code == 0 and "0 variables" in result.stdout
    else:
        assert "not a safetensors file" in refused(result, 1)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "missing.safetensors" in refused(run("inspect", tmp_path / "missing.safetensors"), 2)
    refused(run("inspect", tmp_path), 2)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        assert str(path) in refused(run("inspect", path), 2)
