"""A second reader of frames and model files, written from docs/format.md alone; it imports nothing of fedomc."""

import json
import math
import zlib
from dataclasses import dataclass

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}


class Refused(Exception):
    """The bytes are not what the page describes."""


@dataclass
class Frame:
    kind: int
    exponent_bits: int
    mantissa_bits: int
    shape: tuple[int, ...]
    values: np.ndarray


def number(code: int, e: int, m: int) -> float:
    """The value of a code, by the page's two formulas; every step is exact in float64."""
    sign, x, f = code >> (e + m), code >> m & (2**e - 1), code & (2**m - 1)
    if e == 8 and x == 255:
        x, f = 254, 2**m - 1
    bias = 2 ** (e - 1) - 1
    magnitude = 2.0 ** (x - bias) * (1 + f / 2**m) if x > 0 else 2.0 ** (1 - bias) * (f / 2**m)
    return -magnitude if sign else magnitude


def largest(e: int, m: int) -> float:
    return (2 - 2.0**-m) * 2.0 ** ((254 if e == 8 else 2**e - 1) - (2 ** (e - 1) - 1))


def words(n: int, width: int) -> int:
    return 32 * ((n // 1024) * width + math.ceil(math.ceil((n % 1024) / 32) * width / 32))


def unpack(data: bytes, n: int, width: int) -> list[int]:
    """Take the codes out of the blocks: each lane is one string of bits."""
    every = np.frombuffer(data, dtype="<u4")
    codes: list[int] = []
    at = 0
    while len(codes) < n:
        left = min(1024, n - len(codes))
        per_lane = math.ceil(math.ceil(left / 32) * width / 32)
        block = every[at : at + 32 * per_lane].reshape(per_lane, 32)
        lanes = [int.from_bytes(np.ascontiguousarray(block[:, lane]).tobytes(), "little") for lane in range(32)]
        codes += [lanes[i % 32] >> (i // 32 * width) & (2**width - 1) for i in range(left)]
        at += 32 * per_lane
    return codes


def read_frame(data: bytes) -> Frame:
    """Read a frame; refuse what the page says must be refused."""
    if len(data) < 24 or data[:4] != b"FOMC" or data[4] != 1 or data[5] > 1:
        raise Refused
    kind, e, m = data[5], data[6], data[7]
    factor, offset = np.frombuffer(data, dtype="<f4", count=2, offset=8)
    checksum, d = (int(x) for x in np.frombuffer(data, dtype="<u4", count=2, offset=16))
    if not (1 <= e <= 8 and m <= 23 and d <= 8) or len(data) < 24 + 8 * d:
        raise Refused
    shape = tuple(int(x) for x in np.frombuffer(data, dtype="<u8", count=d, offset=24))
    n, begin = math.prod(shape), 24 + 8 * d
    if math.prod(size or 1 for size in shape) > 2**48 or len(data) != begin + 4 * words(n, 1 + e + m):
        raise Refused
    with np.errstate(over="ignore", invalid="ignore"):
        most = np.abs(factor) * np.float32(largest(e, m)) + np.abs(offset)
    if not np.isfinite([factor, offset, most]).all() or checksum != zlib.crc32(data[:16] + data[20:]):
        raise Refused
    numbers = [number(code, e, m) for code in unpack(data[begin:], n, 1 + e + m)]
    values = factor * np.array(numbers, dtype=np.float32)
    if offset != 0:
        values = values + offset
    return Frame(kind, e, m, shape, values.reshape(shape))


def read_model(data: bytes) -> dict[str, np.ndarray]:
    """Read a model file: every variable under each of its names."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length].decode("utf-8"))
    described = json.loads(header.pop("__metadata__")["fedomc"])
    if described["version"] != 1:
        raise Refused
    raw = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        stored = np.frombuffer(data[8 + length + begin : 8 + length + end], dtype=DTYPES[entry["dtype"]])
        raw[name] = stored.reshape(entry["shape"])
    result = {}
    for name, how in described["variables"].items():
        base = read_frame(raw.pop(name).tobytes())
        formats, frames, values = [how["format"]], [base], base.values
        if how["rewrites"][1:] not in ([], [0]):
            update = read_frame(raw.pop(name + ".update").tobytes())
            values = values + update.values
            formats, frames = [*formats, how["update_format"]], [base, update]
        for kind, (format, frame) in enumerate(zip(formats, frames, strict=True)):
            found = (frame.kind, f"S1E{frame.exponent_bits}M{frame.mantissa_bits}", list(frame.shape))
            if found != (kind, format, how["shape"]):
                raise Refused
        if not np.isfinite(values).all():
            raise Refused
        result[name] = values
    result |= raw
    return result | {further: result[name] for further, name in described["tied"].items()}
