"""The benchmark of the codec: every operation that it names runs."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import codec
from fedomc.codec import native


def test_a_row_for_each_operation_of_each_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backends = ["reference"] + (["native"] if native.extension is not None else [])
    file = tmp_path / "rows.json"
    arguments = ["--values", "4096", "--seconds", "0", "--backends", *backends, "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.codec", *arguments])
    codec.main()
    rows = json.loads(file.read_text())["rows"]
    decoding = {"decode", "decode_bfloat16", "decode_float16"}
    floats = {"encode", *decoding, "decode_add", "decode_add_difference", "update"}
    wanted = {(name, op) for name in codec.FORMATS for op in floats}
    wanted |= {(name, op) for name in codec.BLOCKWISE for op in ("encode", *decoding, "update")}
    wanted |= {(name, op) for name in codec.ROTATED for op in ("encode", *decoding)}
    for backend in backends:
        found = [row for row in rows if row["backend"] == backend]
        assert {(row["format"], row["op"]) for row in found} == wanted
        assert all(row["mvalues_per_s"] > 0 and row["memcpy_ratio"] > 0 for row in found)
