"""Writes the files of this folder: ``python -m tests.vectors.make``. It uses nothing of the library's codec or frames.

Values of floats come from gfloat, those of the OCP formats from ml_dtypes, the others from integers and the table of
``docs/format.md``; words come from ``pack_by_design``, and the bytes around them from ``docs/format.md``.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gfloat
import ml_dtypes
import numpy as np
import xxhash
import zstandard

from fedomc import FloatFormat
from tests.conftest import gfloat_format, pack_by_design
from tests.independent_reader import tensor_digest, text_digest

FOLDER = Path(__file__).parent

# name: exponent bits, mantissa bits, kind, shape, factor, offset
FRAMES = {
    "e1m0-two-bits": (1, 0, 0, (2, 5), 1.0, 0.0),
    "e1m5-scaled": (1, 5, 0, (9, 11), 0.0123, -0.5),
    "e2m1-update": (2, 1, 1, (40, 3), 2.0**-12, 1e-6),
    "e2m3-every-code": (2, 3, 0, (64,), 1.0, 0.0),
    "e2m3-three-blocks-ragged": (2, 3, 0, (2, 1100), -0.037, 0.002),
    "e3m7-one-block": (3, 7, 0, (32, 32), 0.71, 0.0),
    "e3m7-one-more": (3, 7, 0, (1025,), 1.0, 0.25),
    "e4m0-no-mantissa": (4, 0, 0, (3, 1, 11), 0.3, 0.0),
    "e5m10-negative-zero-offset": (5, 10, 0, (33,), 1.0, -0.0),
    "e7m2": (7, 2, 0, (100,), 1.0, 0.0),
    "e8m0": (8, 0, 0, (70,), 1.0, 0.0),
    "e8m7-subnormal-results": (8, 7, 1, (50,), 2.0**-20, 0.0),
    "e8m23-32-bits": (8, 23, 0, (37,), 1.0, 0.0),
    "e8m7-unused-top-exponent": (8, 7, 0, (4,), 1.0, 0.0),
    "scalar": (3, 4, 0, (), 0.5, 0.125),
    "empty": (3, 4, 0, (0, 3), 1.0, 0.0),
    "eight-dimensions": (2, 2, 0, (1, 2, 1, 3, 1, 1, 2, 1), 1.5, 0.0),
}


@dataclass(frozen=True)
class Method:
    """What a frame says of a method, and how its codes are ordered."""

    name: str
    tag: int
    header: bytes
    width: int
    order: str = "sign-magnitude"


def float_format(e: int, m: int) -> Method:
    """Describe S1EeMm."""
    return Method(f"S1E{e}M{m}", 1, bytes([e, m]), 1 + e + m)


INT8 = {block: Method(f"INT8/{block}", 2, bytes([block.bit_length() - 1]), 8, "two's complement") for block in (32, 64)}
INT4 = {
    block: Method(f"INT4/{block}", 3, bytes([block.bit_length() - 1]), 4, "two's complement") for block in (64, 256)
}
NF4 = {block: Method(f"NF4/{block}", 4, bytes([block.bit_length() - 1]), 4, "unsigned") for block in (64, 128)}
MXFP8, MXFP8E5M2 = Method("MXFP8", 5, bytes([4, 3]), 8), Method("MXFP8E5M2", 5, bytes([5, 2]), 8)
MXFP6, MXFP6E3M2 = Method("MXFP6", 5, bytes([2, 3]), 6), Method("MXFP6E3M2", 5, bytes([3, 2]), 6)
MXFP4 = Method("MXFP4", 5, bytes([2, 1]), 4)


def block_floats(block: int, e: int, m: int) -> Method:
    """Describe floats with a power of two for each block."""
    return Method(f"S1E{e}M{m}/{block}", 7, bytes([block.bit_length() - 1, e, m]), 1 + e + m)


BLOCK_FLOATS = 7

# of an element: its dtype, and its largest finite code
OCP = {
    "MXFP8": (ml_dtypes.float8_e4m3fn, 0x7E),
    "MXFP8E5M2": (ml_dtypes.float8_e5m2, 0x7B),
    "MXFP6": (ml_dtypes.float6_e2m3fn, 0x1F),
    "MXFP6E3M2": (ml_dtypes.float6_e3m2fn, 0x1F),
    "MXFP4": (ml_dtypes.float4_e2m1fn, 0x07),
}

NORMAL_FLOATS = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
    "-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
    "0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"
)

# name: method, kind, shape, the first scales; the others are drawn
BLOCK_FRAMES = {
    "int8": (INT8[64], 0, (3, 50), ()),
    "int8-every-code": (INT8[32], 0, (256,), (1.0, 0.0, -0.5, 2.0**-149, 2.0**-100, 2.0**120)),
    "int4": (INT4[64], 1, (7, 11), ()),
    "int4-blocks-of-256": (INT4[256], 0, (2, 1100), ()),
    "nf4": (NF4[64], 0, (65,), (1.0,)),
    "nf4-blocks-of-128": (NF4[128], 0, (30, 10), (-0.25, 3.4e38)),
    "mxfp8-every-code": (MXFP8, 0, (256,), (127, 126, 120, 7, 1, 0)),
    "mxfp8-largest-scale": (MXFP8, 2, (40,), (246, 0)),
    "mxfp8e5m2-every-code": (MXFP8E5M2, 0, (4, 64), (127, 128, 239, 0)),
    "mxfp6": (MXFP6, 0, (1025,), (127, 0, 252)),
    "mxfp6e3m2": (MXFP6E3M2, 1, (5, 33), (127, 0, 250)),
    "mxfp4": (MXFP4, 0, (9, 31), (127, 0, 252)),
    "mxfp4-scalar": (MXFP4, 0, (), (128,)),
    "nf4-empty": (NF4[64], 0, (3, 0), ()),
    "block-floats-six-bits": (block_floats(64, 2, 3), 0, (3, 50), (127, 0, 252)),
    "block-floats-every-code": (block_floats(32, 4, 3), 1, (256,), (127, 126, 120, 7, 1, 0)),
    "block-floats-widest": (block_floats(256, 5, 6), 0, (2, 700), (127, 238, 0)),
    "block-floats-narrowest": (block_floats(128, 1, 0), 0, (300,), (126, 253)),
}

DRIVE = {width: Method(f"DRIVE{width}", 6, bytes([width]), width, "unsigned") for width in (1, 2)}

# name: method, shape, seed, the first scales; the others are drawn
ROTATED = {
    "drive1": (DRIVE[1], (1025,), 5, ()),
    "drive1-three-blocks": (DRIVE[1], (2, 1100), 2**63 - 1, (0.0, -1.0)),
    "drive2": (DRIVE[2], (7, 43), -(2**40) - 3, ()),
    "drive2-three-blocks": (DRIVE[2], (3, 700), 0x123456789ABCDEF, (1e33, 2.0**-149)),
    "drive2-two-full-blocks": (DRIVE[2], (1600,), 0, ()),
}

# name: method, kind, values, bits of each plane, whether of differences
PLANES = {
    "planes-of-bytes": (float_format(3, 7), 0, 1500, (8, 1, 1, 1), False),
    "planes-of-bytes-19-bits": (float_format(4, 14), 2, 700, (8,) + (1,) * 11, False),
    "planes-of-bits": (float_format(2, 1), 1, 2003, (1,) * 4, False),
    "planes-of-differences": (float_format(3, 7), 0, 1500, (1,) * 11, True),
    "planes-of-differences-32-bits": (float_format(8, 23), 0, 300, (8,) + (1,) * 24, True),
    "planes-of-differences-int8": (INT8[64], 0, 1100, (8,), True),
    "planes-of-differences-nf4": (NF4[128], 0, 1500, (1,) * 4, True),
    "planes-mxfp6": (MXFP6, 0, 1111, (6,), False),
}

# name: method, shape
INTERCHANGE = {
    "eight": (MXFP8, (6, 64)),
    "wide": (MXFP8E5M2, (5, 40)),
    "six": (MXFP6, (3, 36)),
    "six_ragged": (MXFP6E3M2, (3, 7)),
    "four": (MXFP4, (2, 3, 96)),
    "four_ragged": (MXFP4, (9, 31)),
    "four_scalar": (MXFP4, ()),
}

# the dtypes of the elements of the OCP formats in safetensors
DTYPES = {"MXFP8": "F8_E4M3", "MXFP8E5M2": "F8_E5M2", "MXFP6": "F6_E2M3", "MXFP6E3M2": "F6_E3M2", "MXFP4": "F4"}

GIVEN = {
    "scalar": [0b10110011],
    "e2m3-every-code": list(range(64)),
    "e8m7-unused-top-exponent": [0x7F80, 0x7FFF, 0xFF80, 0xFFC1],
}


def codes_of(name: str, e: int, m: int, count: int) -> list[int]:
    """Draw codes at random, the special ones first; the unused exponent of e = 8 is left out."""
    if name in GIVEN:
        return GIVEN[name]
    sign = 1 << (e + m)
    top = ((255 if e == 8 else 2**e) << m) - 1
    special = [0, sign, 1, sign + 1, top, sign + top, 1 << m, (1 << m) - 1]
    drawn = np.random.default_rng([e, m, count]).integers(0, top + 1, 2 * count)
    return (special + [int(x) + sign * int(y & 1) for x, y in drawn.reshape(-1, 2)])[:count]


def values_of(codes: Sequence[int], e: int, m: int, factor: float, offset: float) -> np.ndarray:
    """Decode through gfloat."""
    info, top = gfloat_format(FloatFormat(e, m)), (255 << m) - 1
    limit = [code & (1 << 8 + m) | min(code & ~(1 << 8 + m), top) if e == 8 else code for code in codes]
    numbers = np.array([gfloat.decode_float(info, code).fval for code in limit], dtype=np.float32)
    values = np.float32(factor) * numbers
    return values + np.float32(offset) if offset else values


def block_values_of(codes: Sequence[int], method: Method, scales: Sequence[float]) -> np.ndarray:
    """Decode codes that share a scale by block; an OCP scale is given as its bits."""
    numbers, block = np.array(codes, dtype=np.int64), 32
    if method.name in OCP:
        dtype, largest = OCP[method.name]
        sign = 1 << (method.width - 1)
        finite = np.array([code & sign | min(code & (sign - 1), largest) for code in codes], dtype=np.uint8)
        elements = finite.view(dtype).astype(np.float32)
        factors = np.array(scales, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    elif method.tag == BLOCK_FLOATS:
        logarithm, e, m = method.header
        block = 2**logarithm
        elements = values_of(codes, e, m, 1.0, 0.0)
        factors = np.array(scales, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    else:
        block, factors = 2 ** method.header[0], np.array(scales, dtype=np.float32)
        if method.order == "unsigned":
            elements = np.array(NORMAL_FLOATS.split(), dtype=np.float32)[numbers]
        else:
            half, whole = 1 << (method.width - 1), 1 << method.width
            elements = np.array([code - whole * (code >= half) for code in codes], dtype=np.float32)
    return elements * factors.repeat(block)[: len(codes)]


def frame_of(
    method: Method, kind: int, shape: Sequence[int], fields: Sequence[bytes], coding: int = 0, difference: int = 0
) -> bytes:
    """Put a frame together."""
    head = b"FOMC" + struct.pack("<BBBB", 4, kind, method.tag, len(method.header))
    tail = struct.pack("<BBBB", len(shape), coding, difference, len(fields))
    tail += struct.pack(f"<{len(shape)}Q{len(fields)}Q", *shape, *map(len, fields)) + method.header.ljust(8, b"\0")
    tail += b"".join(field + bytes(-len(field) % 4) for field in fields)
    return head + struct.pack("<I", checksum(head + tail)) + tail


def float_frame(
    codes: Sequence[int], e: int, m: int, kind: int, shape: Sequence[int], factor: float, offset: float
) -> bytes:
    """Put a frame of floats together."""
    fields = words_of(codes, 1 + e + m), struct.pack("<ff", factor, offset)
    return frame_of(float_format(e, m), kind, shape, fields)


def has_exponents(method: Method) -> bool:
    """Say whether scales are powers of two, in a byte each."""
    return method.name in OCP or method.tag == BLOCK_FLOATS


def scales_of(method: Method, count: int, first: Sequence[float] = ()) -> list[float]:
    """Draw the scales of so many values."""
    power = has_exponents(method)
    blocks = -(-count // (32 if method.name in OCP else 2 ** method.header[0]))
    random = np.random.default_rng([method.tag, method.width, count])
    drawn = (
        random.integers(100, 140, blocks).tolist() if power else readable(random.lognormal(-4, 1, blocks).astype("f4"))
    )
    return [*first, *drawn[len(first) :]]


def scale_bytes(method: Method, scales: Sequence[float]) -> bytes:
    """Write scales."""
    return np.array(scales, dtype="u1" if has_exponents(method) else "<f4").tobytes()


def checksum(data: bytes) -> int:
    """Take the low half of XXH3."""
    return xxhash.xxh3_64_intdigest(data) % 2**32


def words_of(codes: Sequence[int], width: int) -> bytes:
    """Pack codes as the page says."""
    return pack_by_design(codes, width).astype("<i4").tobytes()


def near_zero(count: int, width: int, seed: int) -> list[int]:
    """Draw codes of which most are small, in runs, as zstd likes them; the special ones first."""
    random, sign = np.random.default_rng(seed), 1 << (width - 1)
    magnitudes = (random.exponential(sign / 64, count)).astype(int) * (np.arange(count) // 40 % 3 > 0)
    codes = [int(x) | int(y) * sign for x, y in zip(magnitudes, random.integers(0, 2, count), strict=True)]
    return [0, sign, sign + 1, *codes[3:]]


def moved(codes: Sequence[int], method: Method) -> list[int]:
    """Move some codes to those of neighbouring values, through zero and -0 too."""
    sign = 1 << (method.width - 1)
    ordered = sorted([*range(4), *range(sign, sign + 4)], key=lambda code: order(code, method))
    result = [ordered[ordered.index(code) + 1] if code in ordered[:-1] else code for code in codes]
    return [code + (i % 7 == 3 and code % 64 < 60) * (method.width > 4) for i, code in enumerate(result)]


def order(code: int, method: Method) -> int:
    """Number codes by their values; of floats, -0 is next below 0."""
    half = 1 << (method.width - 1)
    if code < half or method.order == "unsigned":
        return code
    return half - 1 - code if method.order == "sign-magnitude" else code - 2 * half


def planes_of(codes: Sequence[int], sent: Sequence[int], method: Method, planes: Sequence[int]) -> bytes:
    """Write planes; ``sent`` is empty, or the codes that others differ from."""
    width, written = method.width, b""
    symbols = list(codes)
    if sent:
        written = struct.pack("<I", checksum(words_of(sent, width)))
        half, whole = 1 << (width - 1), 1 << width
        steps = [order(code, method) - order(old, method) for code, old in zip(codes, sent, strict=True)]
        steps = [(step + half) % whole - half for step in steps]
        symbols = [2 * step if step >= 0 else -2 * step - 1 for step in steps]
    low = width
    for bits in planes:
        low -= bits
        plane = [symbol >> low & (2**bits - 1) for symbol in symbols]
        if bits == 1:
            plane = [sum(bit << i for i, bit in enumerate(plane[at : at + 8])) for at in range(0, len(plane), 8)]
        raw = bytes(plane)
        zipped = zstandard.ZstdCompressor(level=1).compress(raw)
        stored = zipped if len(zipped) < len(raw) else raw
        written += struct.pack("<I", len(stored)) + stored
    return written


def readable(values: np.ndarray) -> list[float]:
    """Write floats in as few digits as tell them apart."""
    numbers = [float(str(value)) for value in values.reshape(-1)]
    assert np.array(numbers, values.dtype).tobytes() == values.tobytes()
    return numbers


def make_frames() -> None:
    """Write the frames, each with a description of what is in it."""
    for name, (e, m, kind, shape, factor, offset) in FRAMES.items():
        codes = codes_of(name, e, m, int(np.prod(shape)))
        (FOLDER / f"{name}.frame").write_bytes(float_frame(codes, e, m, kind, shape, factor, offset))
        values = values_of(codes, e, m, factor, offset)
        described = {
            "kind": kind, "method": f"S1E{e}M{m}", "shape": shape,
            "factor": readable(np.array([factor], np.float32))[0], "offset": offset,
            "codes": codes, "values": readable(values),
        }  # fmt: skip
        write_json(name, described)


def make_block_frames() -> None:
    """Write the frames of methods that have a scale by block."""
    for name, (method, kind, shape, first) in BLOCK_FRAMES.items():
        count = int(np.prod(shape))
        drawn = np.random.default_rng([method.tag, count]).integers(0, 2**method.width, count).tolist()
        codes = [*range(2**method.width), *drawn[2**method.width :]][:count] if count > 1 else drawn
        scales = scales_of(method, count, first)
        fields = words_of(codes, method.width), scale_bytes(method, scales)
        (FOLDER / f"{name}.frame").write_bytes(frame_of(method, kind, shape, fields))
        values = readable(block_values_of(codes, method, scales))
        described = {"kind": kind, "method": method.name, "shape": shape, "scales": scales, "codes": codes}
        write_json(name, {**described, "values": values})


def make_rotated() -> None:
    """Write the frames of randomly rotated blocks, which are updates; sums are of Python's integers."""

    def mixed(x: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
        return x ^ (x >> 16)

    def signs(seed: int, block: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        low, high = mixed(seed & 0xFFFFFFFF), mixed((seed >> 32 & 0xFFFFFFFF) ^ 0x9E3779B9)
        lanes = [mixed((mixed((1024 * block + i) ^ low) + mixed(high)) & 0xFFFFFFFF) for i in range(32)]
        rows = [mixed((mixed((32 + i) ^ high) + low) & 0xFFFFFFFF) for i in range(32)]
        crossed = [(lanes[i % 32] ^ rows[i // 32]) * 0x9E3779B1 & 0xFFFFFFFF for i in range(count)]
        bits = np.array([(x ^ (x >> 15)) * 0x85EBCA77 & 0xFFFFFFFF for x in crossed])
        return 1 - 2 * (bits >> 31 & 1), 1 - 2 * (bits >> 30 & 1)

    for name, (method, shape, seed, first) in ROTATED.items():
        count, levels = int(np.prod(shape)), {1: [-1, 1], 2: [-10, -3, 3, 10]}[method.width]
        left = count % 1024
        total = count - left + (0 if not left else 512 if left <= 512 and method.width == 2 else 1024)
        random = np.random.default_rng([method.tag, count])
        codes = random.integers(0, 2**method.width, total).tolist()
        drawn = readable(random.lognormal(-14, 1, -(-count // 1024)).astype("f4"))
        scales, values = [*first, *drawn[len(first) :]], list[float]()
        for block, scale in enumerate(np.array(scales, dtype="f4")):
            c = np.array([levels[code] for code in codes[1024 * block : 1024 * block + 1024]])
            index = range(len(c))
            matrix = np.array([[1 - 2 * ((i & j).bit_count() & 1) for j in index] for i in index])
            outer, inner = signs(seed, block, len(c))
            values += readable(scale * (outer * (matrix @ (inner * (matrix @ c)))).astype("f4") + np.float32(0))
        fields = words_of(codes, method.width), scale_bytes(method, scales), struct.pack("<q", seed)
        (FOLDER / f"{name}.frame").write_bytes(frame_of(method, 1, shape, fields))
        described = {"kind": 1, "method": method.name, "shape": shape, "scales": scales, "seed": seed, "codes": codes}
        write_json(name, {**described, "values": values[:count]})


def make_planes() -> None:
    """Write frames of planes, each with a description, and with the codes that were sent if they are differences."""
    for number, (name, (method, kind, count, planes, difference)) in enumerate(PLANES.items()):
        sent = near_zero(count, method.width, number) if difference else []
        codes = moved(sent, method) if difference else near_zero(count, method.width, number)
        written, coding = planes_of(codes, sent, method, planes), 2 if planes[0] == 1 else 1
        if method.tag == 1:
            rest, values = struct.pack("<ff", 0.5, 0.25), values_of(codes, *method.header, 0.5, 0.25)
            parameters: dict[str, object] = {"factor": 0.5, "offset": 0.25}
        else:
            scales = scales_of(method, count)
            rest, values = scale_bytes(method, scales), block_values_of(codes, method, scales)
            parameters = {"scales": scales}
        data = frame_of(method, kind, (count,), (written, rest), coding, int(difference))
        (FOLDER / f"{name}.frame").write_bytes(data)
        described = {
            "kind": kind, "method": method.name, "shape": (count,), **parameters,
            "coding": coding, "sent": sent, "codes": codes, "values": readable(values),
        }  # fmt: skip
        write_json(name, described)


def make_model() -> None:
    """Write a model file: one part, two parts, two parts without an update yet, dense tensors, a tied name."""
    how = {"transform": "scaled-affine", "seed": 7}
    one, two = {**how, "rounding": "nearest"}, {**how, "rounding": "stochastic", "update_format": "S1E2M1"}
    parts = {
        "embedding.weight": ((3, 7, 0, (10, 6), 0.11, 0.01), {**one, "format": "S1E3M7", "draws": [2]}),
        "hidden.weight": ((2, 3, 0, (40, 30), 0.02, 0.0), {**two, "format": "S1E2M3", "draws": [1, 3]}),
        "hidden.weight.update": ((2, 1, 1, (40, 30), 2.0**-11, -1e-5), None),
        "fresh.weight": ((2, 3, 0, (5, 5), 0.4, 0.0), {**two, "format": "S1E2M3", "draws": [1, 0]}),
    }
    values, stored, variables = {}, {}, {}
    for name, ((e, m, kind, shape, factor, offset), fields) in parts.items():
        codes = codes_of(name, e, m, int(np.prod(shape)))
        values[name] = values_of(codes, e, m, factor, offset).reshape(shape)
        data = float_frame(codes, e, m, kind, shape, factor, offset)
        stored[name] = ("U8", [len(data)], data, 4)
        if fields is not None:
            variables[name] = {**fields, "shape": shape}
    values["hidden.weight"] = values["hidden.weight"] + values.pop("hidden.weight.update")
    values["output.weight"] = values["embedding.weight"]
    values["hidden.bias"] = np.linspace(-1, 1, 40, dtype="<f4")
    values["count"] = np.array(1234567890123, dtype="<i8")
    values["narrow"] = np.array([[0.5, -0.0]], dtype="<f2")
    for name, dtype in (("hidden.bias", "F32"), ("count", "I64"), ("narrow", "F16")):
        stored[name] = (dtype, list(values[name].shape), values[name].tobytes(), values[name].itemsize)
    content = {"version": 2, "variables": variables, "tied": {"output.weight": "embedding.weight"}}
    write_model("model", stored, content, values)


def make_interchange() -> None:
    """Write a model file for other programs: rows that end with a block, between blocks, and within a byte."""
    values, stored, variables = {}, {}, {}
    for name, (method, shape) in INTERCHANGE.items():
        count, (_, largest) = int(np.prod(shape)), OCP[method.name]
        signs, codes = (
            np.random.default_rng([method.width, count]).integers(0, [[2], [largest + 1]], (2, count)).tolist()
        )
        codes = [sign << (method.width - 1) | code for sign, code in zip(signs, codes, strict=True)]
        scales, last = scales_of(method, count), shape[-1] if shape else 1
        values[name] = block_values_of(codes, method, scales).reshape(shape)
        elements = list(shape) if last * method.width % 8 == 0 else [32 * len(scales)]
        string = sum(code << i * method.width for i, code in enumerate(codes))
        data = string.to_bytes(int(np.prod(elements)) * method.width // 8, "little")
        stored[name] = (DTYPES[method.name], elements, data, 1)
        of_scales = [*shape[:-1], last // 32] if last % 32 == 0 else [len(scales)]
        stored[name + "_scale"] = ("F8_E8M0", of_scales, bytes(scales), 1)
        how = {"format": method.name, "transform": "none", "rounding": "nearest", "seed": 7}
        variables[name] = {**how, "draws": [1], "shape": shape}
    values["bias"] = np.linspace(-1, 1, 5, dtype="<f4")
    stored["bias"] = ("F32", [5], values["bias"].tobytes(), 4)
    content = {"version": 2, "variables": variables, "tied": {}, "interchange": True}
    write_model("interchange", stored, content, values)


def write_model(name: str, stored: dict, content: dict, values: dict[str, np.ndarray]) -> None:
    """Write a model file of dtype, shape, bytes and alignment of each tensor, and a description of its values."""
    digests = {key: tensor_digest(dtype, shape, raw) for key, (dtype, shape, raw, _) in stored.items()}
    texts = {"fedomc": compact(content), "fedomc.digests": compact(digests), "note": "a test vector"}
    header = {"__metadata__": {**texts, "fedomc.digest": text_digest(texts)}}
    data = b""
    for key, (dtype, shape, raw, _) in sorted(stored.items(), key=lambda item: (-item[1][3], item[0])):
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = compact(header).encode()
    text += b" " * (-len(text) % 8)
    (FOLDER / f"{name}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    described = {
        key: {"dtype": value.dtype.name, "shape": value.shape, "values": whole(value)} for key, value in values.items()
    }
    write_json(name, described)


def whole(values: np.ndarray) -> list[float] | list[int]:
    """Write the values of any dtype."""
    return values.reshape(-1).tolist() if values.dtype.kind == "i" else readable(values)


def compact(content: object) -> str:
    """Write JSON as the page says."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def write_json(name: str, content: object) -> None:
    """Write a description that people read."""
    (FOLDER / f"{name}.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    make_frames()
    make_block_frames()
    make_rotated()
    make_planes()
    make_model()
    make_interchange()
