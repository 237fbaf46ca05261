import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedomc import CompressedTensor, CompressionPolicy, Encoding, FloatFormat, FormatError, PolicyError, Selection
from fedomc.training.selection import arrived_bytes, held_bytes

SHAPES = {f"layer{i}.{kind}": shape for i in range(12) for kind, shape in (("w", (30 + i, 40)), ("bias", (30 + i,)))}
MATRICES = [name for name in SHAPES if name.endswith("w")]
KNOWN = [[0, 10, 11, 2, 3, 4], [0, 11, 2, 3, 7, 9]]
KNOWN_SEED = 8373256207941231614


def total(names: object) -> int:
    return sum(math.prod(SHAPES[name]) for name in names)


def chosen(policy: CompressionPolicy, **who: object) -> list[str]:
    return list(policy.select(SHAPES, **who))


def test_known_selections() -> None:
    """The same on every machine, today and later."""
    policy = CompressionPolicy("S1E3M7", fraction=0.5, seed=1)
    found = [sorted(set(MATRICES) - set(chosen(policy, round=3, client=client))) for client in ("a", 7)]
    assert [[int(name[5:-2]) for name in kept] for kept in found] == KNOWN
    assert policy.encoding(round=3, client="a").seed == KNOWN_SEED


def test_the_same_in_another_process() -> None:
    script = (
        "from fedomc import CompressionPolicy\n"
        f"shapes = {SHAPES!r}\n"
        "print(list(CompressionPolicy('S1E3M7', fraction=0.5).select(shapes, round=2, client='c')))"
    )
    outputs = {
        subprocess.run(  # noqa: S603
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {str(chosen(CompressionPolicy("S1E3M7", fraction=0.5), round=2, client="c"))}


def test_clients_rounds_and_seeds_differ() -> None:
    policies = [CompressionPolicy("S1E3M7", fraction=0.5, seed=seed) for seed in (0, 1)]
    shapes = {f"layer{i}.w": (30 + i, 40) for i in range(60)}
    found = {
        (round, client, policy.seed): tuple(policy.select(shapes, round=round, client=client))
        for policy in policies
        for round in (0, 1, 10)
        for client in (0, 1, 10, "a")
    }
    assert len(set(found.values())) == len(found)
    seeds = {policy.encoding(round=r, client=c).seed for policy in policies for r in (0, 1, 11) for c in (1, 11, "1")}
    assert len(seeds) == 18


def test_integers_of_numpy_are_integers() -> None:
    policy = CompressionPolicy("S1E3M7", fraction=0.5)
    assert chosen(policy, round=np.int64(3), client=np.int64(2)) == chosen(policy, round=3, client=2)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=4),
        st.tuples(st.integers(2, 60), st.integers(2, 60)),
        min_size=1,
        max_size=20,
    ),
    st.floats(0, 1),
    st.integers(0, 50),
)
def test_as_close_to_the_fraction_as_the_drawn_order_allows(
    shapes: dict[str, tuple[int, int]], fraction: float, client: int
) -> None:
    policy = CompressionPolicy("S1E3M7", fraction=fraction)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    try:
        selection = policy.select(shapes, client=client)
    except PolicyError:
        kept = sum(sizes.values())
        rest = []
    else:
        assert list(selection) == [name for name in shapes if name in selection]  # the order of the model
        kept = sum(size for name, size in sizes.items() if name not in selection)
        rest = [sizes[name] for name in selection]
    target = (1 - fraction) * sum(sizes.values())
    assert all(abs(kept + size - target) >= abs(kept - target) for size in rest)
    assert abs(kept - target) <= max(sizes.values()) / 2 + 1e-6 * target


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 0.95])
def test_closeness_for_many_small_variables(fraction: float) -> None:
    for client in range(20):
        share = total(chosen(CompressionPolicy("S1E3M7", fraction=fraction), client=client)) / total(MATRICES)
        assert abs(share - fraction) < 0.05


def test_every_variable_that_fits_is_kept_by_some_client() -> None:
    shapes = {**SHAPES, "giant": (1000, 1000)}
    policy = CompressionPolicy("S1E3M7", fraction=0.99)
    counts = dict.fromkeys([*MATRICES, "giant"], 0)
    for client in range(200):
        for name in set(counts) - set(policy.select(shapes, client=client)):
            counts[name] += 1
    assert counts.pop("giant") == 0
    assert min(counts.values()) > 80  # 1% of the parameters is nearly all small matrices
    policy = CompressionPolicy("S1E3M7", fraction=0.9)
    counts = dict.fromkeys(MATRICES, 0)
    for client in range(400):
        for name in set(counts) - set(policy.select(SHAPES, client=client)):
            counts[name] += 1
    assert min(counts.values()) > 5 and max(counts.values()) < 120


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, MATRICES),
        ({"weight_matrices_only": False}, list(SHAPES)),
        ({"include": ["layer1.*"]}, ["layer1.w"]),
        ({"include": ["layer1.*", "layer2.?"]}, ["layer1.w", "layer2.w"]),
        ({"exclude": ["layer1*", "layer[2-8].*"]}, ["layer0.w", "layer9.w"]),
        ({"include": ["layer1*"], "exclude": ["*0*"]}, ["layer1.w", "layer11.w"]),
        ({"include": ["*bias"], "weight_matrices_only": False}, [name for name in SHAPES if "bias" in name]),
    ],
)
def test_which_may_be_compressed(kwargs: dict[str, object], expected: list[str]) -> None:
    policy = CompressionPolicy("S1E3M7", **kwargs)
    assert chosen(policy) == expected
    assert policy.compressible(SHAPES) == {name: math.prod(SHAPES[name]) for name in expected}


@pytest.mark.parametrize(
    ("shape", "is_matrix"),
    [
        ((), False), ((500,), False), ((1, 500), False), ((500, 1, 1), False), ((20, 2), True), ((1, 20, 1, 3), True),
        ((0, 5, 5), False), ((3, 20, 3), True),
    ],
)  # fmt: skip
def test_weight_matrices(shape: tuple[int, ...], is_matrix: bool) -> None:
    assert ("x" in CompressionPolicy("S1E3M7").compressible({"x": shape, "matrix": (20, 20)})) == is_matrix


@pytest.mark.parametrize("update_format", [None, "S1E2M1"])
@pytest.mark.parametrize("format", ["S1E1M0", "S1E2M1", "S1E2M3", "S1E3M7", "S1E5M10", "S1E5M21"])
def test_matrices_that_would_not_become_smaller_stay_in_fp32(format: str, update_format: str | None) -> None:
    shapes = {f"{size}": (2, size) for size in (*range(2, 200), 511, 512, 513, 5000)}
    for matrices_only in (True, False):
        policy = CompressionPolicy(format, update_format, weight_matrices_only=matrices_only)
        found = policy.compressible(shapes)
        for name, shape in shapes.items():
            packed = CompressedTensor.from_dense(torch.ones(shape), format, update_format=update_format)
            assert (name in found) == (packed.nbytes < packed.numel() * 4 or not matrices_only), name


@pytest.mark.parametrize("formats", [("S1E8M23", None), ("S1E8M7", "S1E8M7")])
def test_formats_that_save_nothing_at_any_size_are_taken_at_their_word(formats: tuple[str, str | None]) -> None:
    assert CompressionPolicy(*formats).compressible({"x": (2, 2)}) == {"x": 4}


def test_a_model_and_its_shapes_select_alike() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(50, 40), nn.LayerNorm(40), nn.Conv1d(40, 30, 3), nn.Embedding(100, 40))
    policy = CompressionPolicy("S1E2M3", update_format="S1E2M1", rounding="stochastic", fraction=0.5)
    selection = policy.select(model, round=1, client=2)
    assert isinstance(selection, Selection) and set(selection) < {"0.weight", "2.weight", "3.weight"}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert dict(selection) == dict(policy.select(shapes, round=1, client=2))
    encoding = next(iter(selection.values()))
    assert encoding == policy.encoding(round=1, client=2)
    assert encoding == Encoding(FloatFormat(2, 3), FloatFormat(2, 1), "scaled", "stochastic", encoding.seed)
    assert next(iter(selection)) in repr(selection)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"format": "fp16"}, FormatError, "fp16"),
        ({"update_format": "S1E9M1"}, FormatError, "S1E9M1"),
        ({"fraction": -0.1}, PolicyError, "fraction=-0.1"),
        ({"fraction": 1.01}, PolicyError, "fraction=1.01"),
        ({"fraction": math.nan}, PolicyError, "fraction=nan"),
        ({"transform": "log"}, PolicyError, "log"),
        ({"rounding": "up"}, PolicyError, "up"),
        ({"include": "layer*"}, PolicyError, "include='layer"),
        ({"exclude": "layer*"}, PolicyError, "exclude='layer"),
        ({"format_by_name": "layer*"}, PolicyError, "format_by_name='layer"),
        ({"format_by_name": ["S1E2M3"]}, PolicyError, "map name patterns"),
        ({"format_by_name": {1: "S1E2M3"}}, PolicyError, "map name patterns"),
        ({"format_by_name": {"layer*": "fp8"}}, FormatError, "fp8"),
    ],
)
def test_impossible_policies(kwargs: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CompressionPolicy(**{"format": "S1E3M7", **kwargs})


@pytest.mark.parametrize(
    ("kwargs", "transform", "rounding"),
    [
        ({}, "scaled", "stochastic"),
        ({"update_format": "S1E3M0"}, "scaled", "stochastic"),
        ({"update_format": "S1E3M0", "rounding": "nearest"}, "scaled", "nearest"),
        ({"update_format": "S1E3M0", "transform": "affine"}, "affine", "stochastic"),
        ({"rounding": "nearest"}, "scaled", "nearest"),
        ({"transform": "none"}, "none", "stochastic"),
    ],
)
def test_defaults_of_transform_and_rounding(kwargs: dict[str, str], transform: str, rounding: str) -> None:
    encoding = CompressionPolicy("S1E2M3", **kwargs).encoding()
    assert (encoding.transform, encoding.rounding) == (transform, rounding)


@pytest.mark.parametrize(
    ("by_name", "expected"),
    [
        ({}, {"S1E3M7": 12}),
        ({"layer1*": "S1E2M3"}, {"S1E3M7": 9, "S1E2M3": 3}),
        ({"*": "S1E2M3"}, {"S1E2M3": 12}),
        ({"layer1.*": "S1E4M8", "layer1*": "S1E2M3"}, {"S1E3M7": 9, "S1E2M3": 2, "S1E4M8": 1}),  # the first counts
        ({"layer1*": "S1E2M3", "layer1.*": "S1E4M8"}, {"S1E3M7": 9, "S1E2M3": 3}),
        ([("layer1*", FloatFormat(2, 3))], {"S1E3M7": 9, "S1E2M3": 3}),
    ],
)
def test_formats_by_name(by_name: object, expected: dict[str, int]) -> None:
    policy = CompressionPolicy("S1E3M7", update_format="S1E3M0", format_by_name=by_name)  # type: ignore[arg-type]
    selection = policy.select(SHAPES, round=2, client=1)
    assert Counter(str(encoding.format) for encoding in selection.values()) == expected
    assert {replace(each, format=policy.format) for each in selection.values()} == {policy.encoding(round=2, client=1)}
    assert set(map(str, policy.formats)) >= set(expected)
    assert all(policy.format_of(name) == encoding.format for name, encoding in selection.items())


def test_another_format_brings_its_own_defaults() -> None:
    two_parts = CompressionPolicy("S1E2M3", update_format="S1E3M0")
    assert replace(two_parts, update_format=None).encoding() == CompressionPolicy("S1E2M3").encoding()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"include": ["layer1*", "layers.*"]}, "include: 'layers.*' matches none of 24 variables, such as 'layer0.w'"),
        ({"format_by_name": {"layer*": "S1E2M3", "Layer*": "S1E2M3"}}, "format_by_name: 'Layer*' matches none"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(kwargs: dict[str, object], message: str) -> None:
    policy = CompressionPolicy("S1E3M7", **kwargs)
    for ask in (policy.select, policy.compressible):
        with pytest.raises(PolicyError, match=re.escape(message)):
            ask(SHAPES)
    assert CompressionPolicy("S1E3M7", exclude=["layers.*"]).compressible(SHAPES) == CompressionPolicy(
        "S1E3M7"
    ).compressible(SHAPES)


@pytest.mark.parametrize("kwargs", [{"include": ["*bias*"]}, {"exclude": ["*"]}, {"fraction": 0.0}])
def test_nothing_to_compress_is_an_error(kwargs: dict[str, object]) -> None:
    with pytest.raises(PolicyError, match=r"none of \d+ variables can be compressed|no variable to compress"):
        CompressionPolicy("S1E3M7", **kwargs).select(SHAPES)
    with pytest.raises(PolicyError, match=r"none of \d+ variables can be compressed|no variable to compress"):
        CompressionPolicy("S1E3M7").select({"bias": (5,)})


def test_policies_are_values() -> None:
    a, b = (
        CompressionPolicy(format, include=["x"], format_by_name={"y": format})
        for format in ("S1E3M7", FloatFormat(3, 7))
    )
    assert a == b == replace(a, seed=0) and hash(a) == hash(b) and a.format == FloatFormat(3, 7)


@pytest.mark.parametrize(
    "text", ["S1E3M7>S1E2M1", "S1E4M3+S1E2M1>DRIVE1@0.9", "S1E3M7>DRIVE2@0.5", "INT8>MXFP4"], ids=str
)
def test_an_uplink_is_read_and_written(text: str) -> None:
    policy = CompressionPolicy.parse(text)
    assert str(policy) == text and CompressionPolicy.parse(str(policy)) == policy and hash(policy)
    (held, _, rest), fraction = text.partition(">"), policy.fraction
    assert policy == CompressionPolicy.parse(held, uplink=rest.partition("@")[0], fraction=fraction)
    for encoding in policy.select(SHAPES, round=3, client="a").values():
        assert str(encoding) == text.partition("@")[0]
    without = replace(policy, uplink=None)
    assert without.encoding(round=3, client="a").seed == policy.encoding(round=3, client="a").seed


@pytest.mark.parametrize("text", ["S1E3M7>", ">S1E3M7", "S1E3M7>S1E2M1>S1E2M1", "S1E3M7>S1E2M1+S1E2M1", "S1E3M7>FP32"])
def test_an_uplink_is_one_method(text: str) -> None:
    with pytest.raises(FormatError):
        CompressionPolicy.parse(text)


def test_what_is_kept_for_the_change_counts_as_held() -> None:
    """What was sent of variables in one part, and of what partial quantization left in FP32; no update."""
    plain, uplink = (CompressionPolicy.parse(f"S1E3M7{rest}@0.5").select(SHAPES) for rest in ("", ">DRIVE1"))
    assert set(plain) == set(uplink) and set(uplink) | set(uplink.unquantized) == set(MATRICES)
    kept = sum(plain[name].nbytes(math.prod(SHAPES[name])) for name in plain) + 4 * total(uplink.unquantized)
    assert held_bytes(SHAPES, uplink) == held_bytes(SHAPES, plain) + kept
    two, sent = (CompressionPolicy.parse(f"S1E2M3+S1E2M1{rest}").select(SHAPES) for rest in ("", ">DRIVE1"))
    assert held_bytes(SHAPES, two) == held_bytes(SHAPES, sent)


class TestUplinkInclude:
    """Variables whose change alone is compressed."""

    shapes: ClassVar[dict[str, tuple[int, ...]]] = {"a.weight": (64, 64), "a.bias": (64,), "b.bias": (8,), "c": (64,)}

    def test_names_further_variables_where_the_uplink_saves_bytes(self) -> None:
        policy = CompressionPolicy.parse("S1E3M7>DRIVE1", uplink_include=["*.bias"])
        assert policy.uplinked(self.shapes) == ("a.weight", "a.bias")  # DRIVE1 takes 140 bytes at least
        selection = policy.select(self.shapes)
        assert set(selection) == {"a.weight"} and selection.unquantized == ("a.bias",)
        assert arrived_bytes(self.shapes, selection) == selection["a.weight"].nbytes(64 * 64) + 4 * 64
        assert CompressionPolicy.parse("S1E3M7>DRIVE1").uplinked(self.shapes) == ("a.weight",)
        assert CompressionPolicy.parse("S1E3M7").uplinked(self.shapes) == ()

    def test_the_rest_of_partial_quantization_is_included(self) -> None:
        shapes = {f"{i}.weight": (64, 64) for i in range(10)} | {f"{i}.bias": (64,) for i in range(10)}
        policy = CompressionPolicy.parse("S1E3M7>S1E2M1@0.7", uplink_include=["*"])
        selection = policy.select(shapes, round=2, client=1)
        assert set(policy.uplinked(shapes)) == {*selection, *selection.unquantized} == set(shapes)
        assert len(selection) == 7

    @pytest.mark.parametrize(
        ("how", "error"),
        [
            ({"uplink_include": ["*.bias"]}, "needs an uplink"),
            ({"uplink": "DRIVE1", "uplink_include": "*.bias"}, "must be a list of patterns"),
            ({"uplink": "DRIVE1", "uplink_include": ["x*"]}, "uplink_include: 'x\\*' matches none of 4 variables"),
        ],
    )
    def test_wrong_ones_are_refused(self, how: dict[str, Any], error: str) -> None:
        with pytest.raises(PolicyError, match=error):
            CompressionPolicy("S1E3M7", **how).uplinked(self.shapes)
