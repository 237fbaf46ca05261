"""The benchmark of products: a row for each product of each size."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import products
from fedomc.tensor.ops.products import backend


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a build of torch without oneDNN")
def test_a_row_for_each_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, before, threads = tmp_path / "rows.json", backend(), torch.get_num_threads()
    arguments = ["--rows", "1", "16", "--sizes", "8", "64", "--seconds", "0", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.products", *arguments])
    try:
        products.main()
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2 * 2 * 2 * 3 and {row["product"] for row in rows} == {"x W^T", "g W", "g^T x"}
    for row in rows:
        times = {name: row[f"{name}_seconds"] for name in ("blas", "onednn")}
        assert min(times.values()) > 0
        assert row["loss"] == pytest.approx(times[row["picked"]] / min(times.values()) - 1)
    assert backend() == before, "the choice is as it was before"
