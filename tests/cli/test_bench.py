import json

from tests.cli.conftest import refused, run


def test_bench_measures_both_operations() -> None:
    found = json.loads(run("bench", "--format", "S1E2M3/64", "--values", 2**16, "--json").stdout)
    assert found["format"] == "S1E2M3/64" and found["values"] == 2**16
    assert [row["operation"] for row in found["rows"]] == ["decode", "update"]
    assert all(row["mvalues_per_s"] > 0 and row["memcpy_ratio"] > 0 for row in found["rows"])


def test_bench_prints_a_table() -> None:
    lines = run("bench", "--values", 2**14).stdout.splitlines()
    assert [line.split()[-1] for line in lines[:3]] == ["operation", "decode", "update"] and max(map(len, lines)) <= 100


def test_what_is_no_single_format_is_refused() -> None:
    for format in ("S9", "DRIVE1", "S1E2M3+S1E2M1", "S1E3M7>DRIVE1"):
        refused(run("bench", "--format", format), 2)
    assert run("bench", "--values", 3).exit_code == 2
