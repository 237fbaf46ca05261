"""Wrote what lies in this folder: ``python -m tests.vectors.make``. It uses nothing of the library's codec or frames.

The numbers come from gfloat, the words from ``pack_by_design``, the bytes from ``docs/format.md``.
"""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

import gfloat
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

# name: exponent bits, mantissa bits, kind, values, bits of each plane, whether of differences
PLANES = {
    "planes-of-bytes": (3, 7, 0, 1500, (8, 1, 1, 1), False),
    "planes-of-bytes-19-bits": (4, 14, 2, 700, (8,) + (1,) * 11, False),
    "planes-of-bits": (2, 1, 1, 2003, (1,) * 4, False),
    "planes-of-differences": (3, 7, 0, 1500, (1,) * 11, True),
    "planes-of-differences-32-bits": (8, 23, 0, 300, (8,) + (1,) * 24, True),
}

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


def frame_of(
    codes: Sequence[int], e: int, m: int, kind: int, shape: Sequence[int], factor: float, offset: float,
    coding: int = 0, difference: int = 0, body: bytes | None = None,
) -> bytes:  # fmt: skip
    """Put a frame together."""
    body = words_of(codes, 1 + e + m) if body is None else body
    head = b"FOMC" + struct.pack("<BBBBff", 3, kind, e, m, factor, offset)
    tail = struct.pack(f"<BBBB{len(shape)}Q", len(shape), coding, difference, 0, *shape) + body
    return head + struct.pack("<I", checksum(head + tail)) + tail


def checksum(data: bytes) -> int:
    """Take the low half of XXH3."""
    return xxhash.xxh3_64_intdigest(data) % 2**32


def words_of(codes: Sequence[int], width: int) -> bytes:
    """Pack codes as the page says."""
    return pack_by_design(codes, width).astype("<i4").tobytes()


def near_zero(count: int, e: int, m: int, seed: int) -> list[int]:
    """Draw codes of which most are small, in runs, as zstd likes them; the special ones first."""
    random = np.random.default_rng(seed)
    magnitudes = (random.exponential(2 ** (e + m) / 64, count)).astype(int) * (np.arange(count) // 40 % 3 > 0)
    codes = [int(x) | int(sign) << (e + m) for x, sign in zip(magnitudes, random.integers(0, 2, count), strict=True)]
    return [0, 1 << (e + m), (1 << (e + m)) + 1, *codes[3:]]


def moved(codes: Sequence[int], e: int, m: int) -> list[int]:
    """Move some codes to those of neighbouring values, through zero and -0 too."""
    ordered = [*((1 << (e + m)) | x for x in range(3, -1, -1)), *range(4)]
    result = [ordered[ordered.index(code) + 1] if code in ordered[:-1] else code for code in codes]
    return [code + (i % 7 == 3 and code % 64 < 60) for i, code in enumerate(result)]


def order(code: int, e: int, m: int) -> int:
    """Number codes by their values, -0 below 0."""
    return -1 - (code - (1 << (e + m))) if code >> (e + m) else code


def body_of(codes: Sequence[int], sent: Sequence[int], e: int, m: int, planes: Sequence[int]) -> bytes:
    """Write planes; ``sent`` is empty, or the codes that others differ from."""
    width, body = 1 + e + m, b""
    symbols = list(codes)
    if sent:
        body = struct.pack("<I", checksum(words_of(sent, width)))
        steps = [order(code, e, m) - order(old, e, m) for code, old in zip(codes, sent, strict=True)]
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
        body += struct.pack("<I", len(stored)) + stored
    return body


def readable(values: np.ndarray) -> list[float]:
    """Write floats in as few digits as tell them apart."""
    numbers = [float(str(value)) for value in values.reshape(-1)]
    assert np.array(numbers, values.dtype).tobytes() == values.tobytes()
    return numbers


def make_frames() -> None:
    """Write the frames, each with a description of what is in it."""
    for name, (e, m, kind, shape, factor, offset) in FRAMES.items():
        codes = codes_of(name, e, m, int(np.prod(shape)))
        (FOLDER / f"{name}.frame").write_bytes(frame_of(codes, e, m, kind, shape, factor, offset))
        values = values_of(codes, e, m, factor, offset)
        described = {
            "kind": kind, "exponent_bits": e, "mantissa_bits": m, "shape": shape,
            "factor": readable(np.array([factor], np.float32))[0], "offset": offset,
            "codes": codes, "values": readable(values),
        }  # fmt: skip
        write_json(name, described)


def make_planes() -> None:
    """Write frames of planes, each with a description, and with the codes that were sent if they are differences."""
    for number, (name, (e, m, kind, count, planes, difference)) in enumerate(PLANES.items()):
        sent = near_zero(count, e, m, number) if difference else []
        codes = moved(sent, e, m) if difference else near_zero(count, e, m, number)
        body = body_of(codes, sent, e, m, planes)
        coding = 2 if planes[0] == 1 else 1
        data = frame_of(codes, e, m, kind, (count,), 0.5, 0.25, coding, int(difference), body)
        (FOLDER / f"{name}.frame").write_bytes(data)
        described = {
            "kind": kind, "exponent_bits": e, "mantissa_bits": m, "shape": (count,), "factor": 0.5, "offset": 0.25,
            "coding": coding, "sent": sent, "codes": codes, "values": readable(values_of(codes, e, m, 0.5, 0.25)),
        }  # fmt: skip
        write_json(name, described)


def make_model() -> None:
    """Write a model file: one part, two parts, two parts without an update yet, dense tensors, a tied name."""
    how = {"transform": "scaled-affine", "seed": 7}
    one, two = {**how, "rounding": "nearest"}, {**how, "rounding": "stochastic", "update_format": "S1E2M1"}
    parts = {
        "embedding.weight": ((3, 7, 0, (10, 6), 0.11, 0.01), {**one, "format": "S1E3M7", "rewrites": [2]}),
        "hidden.weight": ((2, 3, 0, (40, 30), 0.02, 0.0), {**two, "format": "S1E2M3", "rewrites": [1, 3]}),
        "hidden.weight.update": ((2, 1, 1, (40, 30), 2.0**-11, -1e-5), None),
        "fresh.weight": ((2, 3, 0, (5, 5), 0.4, 0.0), {**two, "format": "S1E2M3", "rewrites": [1, 0]}),
    }
    values, stored, variables = {}, {}, {}
    for name, ((e, m, kind, shape, factor, offset), fields) in parts.items():
        codes = codes_of(name, e, m, int(np.prod(shape)))
        values[name] = values_of(codes, e, m, factor, offset).reshape(shape)
        data = frame_of(codes, e, m, kind, shape, factor, offset)
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
    digests = {name: tensor_digest(dtype, shape, raw) for name, (dtype, shape, raw, _) in stored.items()}
    texts = {"fedomc": compact(content), "fedomc.digests": compact(digests), "note": "a test vector"}
    header = {"__metadata__": {**texts, "fedomc.digest": text_digest(texts)}}
    data = b""
    for name, (dtype, shape, raw, _) in sorted(stored.items(), key=lambda item: (-item[1][3], item[0])):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = compact(header).encode()
    text += b" " * (-len(text) % 8)
    (FOLDER / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    described = {
        name: {"dtype": value.dtype.name, "shape": value.shape, "values": whole(value)}
        for name, value in values.items()
    }
    write_json("model", described)


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
    make_planes()
    make_model()
