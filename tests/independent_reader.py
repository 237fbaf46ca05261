"""A second reader of frames and model files, written from docs/format.md alone; it imports nothing of fedomc."""

import json
import math
from dataclasses import dataclass

import numpy as np
import xxhash
import zstandard

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


def low_xxh3(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


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


def pack(codes: list[int], width: int) -> bytes:
    """Put codes into blocks, as ``unpack`` takes them out."""
    result = b""
    for at in range(0, len(codes), 1024):
        block = codes[at : at + 1024]
        per_lane = math.ceil(math.ceil(len(block) / 32) * width / 32)
        lanes = [sum(code << i * width for i, code in enumerate(block[lane::32])) for lane in range(32)]
        words_of_lanes = [lane >> 32 * j & 0xFFFFFFFF for j in range(per_lane) for lane in lanes]
        result += b"".join(word.to_bytes(4, "little") for word in words_of_lanes)
    return result


def order(code: int, width: int) -> int:
    """Where a code stands among all codes by value, -0 next below 0."""
    magnitude = code & (2 ** (width - 1) - 1)
    return -1 - magnitude if code >> (width - 1) else magnitude


def code_at(place: int, width: int) -> int:
    """The code at a place, counted modulo 2^W."""
    place = (place + 2 ** (width - 1)) % 2**width - 2 ** (width - 1)
    return place if place >= 0 else 2 ** (width - 1) + (-1 - place)


def read_planes(data: bytes, n: int, width: int, coding: int) -> list[int]:
    """Take the symbols out of the planes, segment by segment."""
    first = 0 if coding == 2 else min(8, width)
    widths = [first] * (coding == 1) + [1] * (width - first)
    symbols: list[int] = []
    at = 0
    while len(symbols) < n:
        count = min(2**17, n - len(symbols))
        segment = [0] * count
        for number_of_plane, w in enumerate(widths):
            as_bytes = coding == 1 and number_of_plane == 0
            size = count if as_bytes else math.ceil(count / 8)
            if len(data) < at + 4:
                raise Refused
            length = int.from_bytes(data[at : at + 4], "little")
            piece = data[at + 4 : at + 4 + length]
            at += 4 + length
            if not 0 < length <= size or len(piece) != length:
                raise Refused
            if length < size:
                try:
                    if zstandard.get_frame_parameters(piece).content_size != size:
                        raise Refused
                    piece = zstandard.ZstdDecompressor().decompress(piece, allow_extra_data=False)
                except zstandard.ZstdError:
                    raise Refused from None
            if not as_bytes:
                plane = [piece[i // 8] >> i % 8 & 1 for i in range(count)]
            else:
                plane = list(piece)
            if max(plane) >= 2**w:
                raise Refused
            segment = [symbol << w | x for symbol, x in zip(segment, plane, strict=True)]
        symbols += segment
    if at != len(data):
        raise Refused
    return symbols


def read_frame(data: bytes, sent: list[int] | None = None) -> Frame:
    """Read a frame; refuse what the page says must be refused. ``sent`` are the codes that a difference is to."""
    if len(data) < 24 or data[:4] != b"FOMC" or data[4] != 3 or data[5] > 2:
        raise Refused
    kind, e, m = data[5], data[6], data[7]
    factor, offset = np.frombuffer(data, dtype="<f4", count=2, offset=8)
    checksum = int(np.frombuffer(data, dtype="<u4", count=1, offset=16)[0])
    d, coding, difference, zero = data[20:24]
    if not (1 <= e <= 8 and m <= 23 and d <= 8) or len(data) < 24 + 8 * d:
        raise Refused
    if coding > 2 or difference > (coding > 0) or zero:
        raise Refused
    shape = tuple(int(x) for x in np.frombuffer(data, dtype="<u8", count=d, offset=24))
    n, begin, width = math.prod(shape), 24 + 8 * d, 1 + e + m
    if math.prod(size or 1 for size in shape) > 2**48:
        raise Refused
    plain = begin + 4 * words(n, width)
    if (len(data) != plain if coding == 0 else len(data) >= plain) or plain > 256 * len(data):
        raise Refused
    with np.errstate(over="ignore", invalid="ignore"):
        most = np.abs(factor) * np.float32(largest(e, m)) + np.abs(offset)
    if not np.isfinite([factor, offset, most]).all() or checksum != low_xxh3(data[:16] + data[20:]):
        raise Refused
    body = data[begin:]
    if difference:
        if sent is None or len(sent) != n or int.from_bytes(body[:4], "little") != low_xxh3(pack(sent, width)):
            raise Refused
        body = body[4:]
    codes = unpack(body, n, width) if coding == 0 else read_planes(body, n, width, coding)
    if difference:
        assert sent is not None
        steps = [-(u + 1) // 2 if u % 2 else u // 2 for u in codes]
        codes = [code_at(order(old, width) + step, width) for old, step in zip(sent, steps, strict=True)]
    numbers = [number(code, e, m) for code in codes]
    values = factor * np.array(numbers, dtype=np.float32)
    if offset != 0:
        values = values + offset
    return Frame(kind, e, m, shape, values.reshape(shape))


def tensor_digest(dtype: str, shape: list[int], data: bytes) -> str:
    dimensions = ",".join(str(size) for size in shape)
    return xxhash.xxh3_64_hexdigest(f"{dtype}[{dimensions}]".encode() + data)


def text_digest(texts: dict[str, str]) -> str:
    """The digest of all entries of the metadata but that of the digest itself."""
    covered = b""
    for name, text in sorted((name.encode(), text.encode()) for name, text in texts.items()):
        covered += len(name).to_bytes(8, "little") + name + len(text).to_bytes(8, "little") + text
    return xxhash.xxh3_64_hexdigest(covered)


def read_model(data: bytes) -> dict[str, np.ndarray]:
    """Read a model file: every variable under each of its names."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"))
        texts = header.pop("__metadata__")
        if texts.pop("fedomc.digest") != text_digest(texts):
            raise Refused
        described, digests = json.loads(texts["fedomc"]), json.loads(texts["fedomc.digests"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refused from None
    if described["version"] != 2 or digests.keys() != header.keys():
        raise Refused
    raw = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        stored = data[8 + length + begin : 8 + length + end]
        if digests[name] != tensor_digest(entry["dtype"], entry["shape"], stored):
            raise Refused
        raw[name] = np.frombuffer(stored, dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
    result = {}
    for name, how in described["variables"].items():
        base = read_frame(raw.pop(name).tobytes())
        formats, frames, values = [how["format"]], [base], base.values
        if how["draws"][1:] not in ([], [0]):
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
