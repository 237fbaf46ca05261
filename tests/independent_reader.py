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
class Method:
    """How the codes of a frame are read: ``block`` is 0 for floats, whose scale and offset are of the variable."""

    name: str
    width: int
    block: int
    order: str
    exponent_bits: int = 0
    mantissa_bits: int = 0


@dataclass
class Frame:
    kind: int
    method: str
    shape: tuple[int, ...]
    values: np.ndarray


OCP = {(4, 3): "MXFP8", (5, 2): "MXFP8E5M2", (2, 3): "MXFP6", (3, 2): "MXFP6E3M2", (2, 1): "MXFP4"}
OCP_LARGEST = {"MXFP8": 448.0, "MXFP8E5M2": 57344.0, "MXFP6": 7.5, "MXFP6E3M2": 28.0, "MXFP4": 6.0}
OCP_TOP = {"MXFP8": 8, "MXFP8E5M2": 15, "MXFP6": 2, "MXFP6E3M2": 4, "MXFP4": 2}

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def method(tag: int, header: bytes) -> Method:
    """Look a method up in the page's table."""
    if tag in (2, 3, 4):
        if len(header) != 1 or not 5 <= header[0] <= 8:
            raise Refused
        name, width, order = {
            2: ("INT8", 8, "two's complement"),
            3: ("INT4", 4, "two's complement"),
            4: ("NF4", 4, "unsigned"),
        }[tag]
        block = 2 ** header[0]
        return Method(name if block == 64 else f"{name}/{block}", width, block, order)
    if tag == 6:
        if header not in (b"\1", b"\2"):
            raise Refused
        return Method(f"DRIVE{header[0]}", header[0], 1024, "unsigned")
    if tag == 7:
        if len(header) != 3 or not 5 <= header[0] <= 8 or not (1 <= header[1] <= 5 and header[2] <= 6):
            raise Refused
        block, e, m = 2 ** header[0], *header[1:]
        return Method(f"S1E{e}M{m}/{block}", 1 + e + m, block, "sign-magnitude", e, m)
    if tag not in (1, 5) or len(header) != 2:
        raise Refused
    e, m = header
    if tag == 5:
        if (e, m) not in OCP:
            raise Refused
        return Method(OCP[e, m], 1 + e + m, 32, "sign-magnitude", e, m)
    if not (1 <= e <= 8 and m <= 23):
        raise Refused
    return Method(f"S1E{e}M{m}", 1 + e + m, 0, "sign-magnitude", e, m)


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


def element(code: int, how: Method) -> float:
    """The value of a code without its scale."""
    if how.name.startswith("INT"):
        return code - 2**how.width if code >> (how.width - 1) else code
    if how.name.startswith("NF4"):
        return NF4[code]
    value = number(code, how.exponent_bits, how.mantissa_bits)
    if how.name in OCP_LARGEST and abs(value) > OCP_LARGEST[how.name]:
        value = math.copysign(OCP_LARGEST[how.name], value)
    return value


def decode(codes: list[int], second: bytes, how: Method) -> np.ndarray:
    """The values of codes; refuse scales that the page refuses."""
    numbers = np.array([element(code, how) for code in codes], dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        if not how.block:
            scale, offset = np.frombuffer(second, dtype="<f4")
            most = np.abs(scale) * np.float32(largest(how.exponent_bits, how.mantissa_bits)) + np.abs(offset)
            if not np.isfinite([scale, offset, most]).all():
                raise Refused
            values = scale * numbers
            return values + offset if offset != 0 else values
        if how.order == "sign-magnitude":
            e = how.exponent_bits
            top = OCP_TOP[how.name] if how.name in OCP_TOP else 2**e - 1 - (2 ** (e - 1) - 1)
            exponents = [u - 127 for u in second]
            if any(u > 127 or u + top > 127 for u in exponents):
                raise Refused
            scales = np.array([2.0**u for u in exponents], dtype=np.float32)
        else:
            scales = np.frombuffer(second, dtype="<f4")
        values = numbers * np.repeat(scales, how.block)[: len(codes)]
    if not np.isfinite(scales).all() or not np.isfinite(values).all():
        raise Refused
    return values


LEVELS = {"DRIVE1": (-1, 1), "DRIVE2": (-10, -3, 3, 10)}


def mix(x: int) -> int:
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def random_bits(seed: int, t: int, i: int) -> int:
    """The 32 random bits of value i of block t."""
    low, high = mix(seed % 2**32), mix((seed >> 32) % 2**32 ^ 0x9E3779B9)
    first, r, lane_number = 1024 * t, i // 32, i % 32
    lane = mix((mix((first + lane_number) % 2**32 ^ low) + mix(((first >> 32) + high) % 2**32)) % 2**32)
    row = mix((mix(32 + r ^ high) + low) % 2**32)
    x = (lane ^ row) * 0x9E3779B1 % 2**32
    return (x ^ x >> 15) * 0x85EBCA77 % 2**32


def hadamard(values: list[int]) -> list[int]:
    """The product with H, by halves: of the sums and of the differences of what their indices differ in the top bit."""
    if len(values) == 1:
        return values
    half = len(values) // 2
    upper, lower = values[:half], values[half:]
    sums = hadamard([a + b for a, b in zip(upper, lower, strict=True)])
    return sums + hadamard([a - b for a, b in zip(upper, lower, strict=True)])


def rotate_back(codes: list[int], second: bytes, third: bytes, n: int, how: Method) -> np.ndarray:
    """The values of codes of DRIVE1 or DRIVE2, of which there are more than values."""
    scales, seed = np.frombuffer(second, dtype="<f4"), int.from_bytes(third, "little", signed=True)
    most = 32768 * LEVELS[how.name][-1]
    if not np.isfinite(scales).all() or any(abs(float(s)) * most > float(np.finfo(np.float32).max) for s in scales):
        raise Refused
    values: list[np.float32] = []
    for t, scale in enumerate(scales):
        c = [LEVELS[how.name][code] for code in codes[1024 * t : 1024 * t + 1024]]
        bits = [random_bits(seed, t, i) for i in range(len(c))]
        inner = [-x if b >> 30 & 1 else x for x, b in zip(hadamard(c), bits, strict=True)]
        u = [-x if b >> 31 else x for x, b in zip(hadamard(inner), bits, strict=True)]
        values += list(scale * np.array(u, dtype=np.float32) + np.float32(0))
    return np.array(values[:n], dtype=np.float32)


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


def order(code: int, how: Method) -> int:
    """The number of a code in the order of the values; of floats, -0 is next below 0."""
    half = 2 ** (how.width - 1)
    if how.order == "unsigned" or code < half:
        return code
    return -1 - (code - half) if how.order == "sign-magnitude" else code - 2 * half


def code_at(place: int, how: Method) -> int:
    """The code of a number, counted modulo 2^W."""
    half = 2 ** (how.width - 1)
    place %= 2 * half
    if how.order == "sign-magnitude" and place >= half:
        return half + (2 * half - 1 - place)
    return place


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


def padded(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def read_frame(data: bytes, sent: list[int] | None = None) -> Frame:
    """Read a frame; refuse what the page says must be refused. ``sent`` are the codes that a difference is to."""
    if len(data) < 16 or data[:4] != b"FOMC" or data[4] != 4 or data[5] > 2:
        raise Refused
    kind, tag, h = data[5:8]
    d, coding, difference, f = data[12:16]
    if coding > 2 or difference > (coding > 0) or d > 8 or f > 8 or h > 16:
        raise Refused
    begin = 16 + 8 * (d + f) + padded(h, 8)
    if len(data) < begin:
        raise Refused
    numbers = [int(x) for x in np.frombuffer(data, dtype="<u8", count=d + f, offset=16)]
    shape, lengths = tuple(numbers[:d]), numbers[d:]
    header = data[16 + 8 * (d + f) : begin]
    if any(header[h:]):
        raise Refused
    how = method(tag, header[:h])
    n = math.prod(shape)
    if math.prod(size or 1 for size in shape) > 2**48:
        raise Refused
    scales = 8 if not how.block else math.ceil(n / how.block) * (1 if how.order == "sign-magnitude" else 4)
    sizes = [4 * words(n, how.width), scales] + [8] * (how.name in LEVELS)
    if (
        len(lengths) != len(sizes)
        or lengths[1:] != sizes[1:]
        or len(data) != begin + sum(padded(x, 4) for x in lengths)
    ):
        raise Refused
    if (lengths[0] != sizes[0] if coding == 0 else lengths[0] >= sizes[0]) or sum(sizes) > 256 * len(data):
        raise Refused
    if int.from_bytes(data[8:12], "little") != low_xxh3(data[:8] + data[12:]):
        raise Refused
    fields = []
    for length in lengths:
        fields.append(data[begin : begin + length])
        if any(data[begin + length : begin + padded(length, 4)]):
            raise Refused
        begin += padded(length, 4)
    written, second = fields[:2]
    values = n
    if how.name in LEVELS:
        n = 32 * words(n, how.width) // how.width
    if difference:
        if sent is None or len(sent) != n or int.from_bytes(written[:4], "little") != low_xxh3(pack(sent, how.width)):
            raise Refused
        written = written[4:]
    codes = unpack(written, n, how.width) if coding == 0 else read_planes(written, n, how.width, coding)
    if difference:
        assert sent is not None
        steps = [-(u + 1) // 2 if u % 2 else u // 2 for u in codes]
        codes = [code_at(order(old, how) + step, how) for old, step in zip(sent, steps, strict=True)]
    if how.name in LEVELS:
        return Frame(kind, how.name, shape, rotate_back(codes, second, fields[2], values, how).reshape(shape))
    return Frame(kind, how.name, shape, decode(codes, second, how).reshape(shape))


def tensor_digest(dtype: str, shape: list[int], data: bytes) -> str:
    dimensions = ",".join(str(size) for size in shape)
    return xxhash.xxh3_64_hexdigest(f"{dtype}[{dimensions}]".encode() + data)


def text_digest(texts: dict[str, str]) -> str:
    """The digest of all entries of the metadata but that of the digest itself."""
    covered = b""
    for name, text in sorted((name.encode(), text.encode()) for name, text in texts.items()):
        covered += len(name).to_bytes(8, "little") + name + len(text).to_bytes(8, "little") + text
    return xxhash.xxh3_64_hexdigest(covered)


INTERCHANGE = {"MXFP8": "F8_E4M3", "MXFP8E5M2": "F8_E5M2", "MXFP6": "F6_E2M3", "MXFP6E3M2": "F6_E3M2", "MXFP4": "F4"}


def read_elements(how: dict, elements: tuple[dict, bytes], scales: tuple[dict, bytes]) -> np.ndarray:
    """Read a variable that was written for other programs: its elements and their scales, with their entries."""
    pairs = {name: pair for pair, name in OCP.items()}
    if how["format"] not in pairs or how["draws"][1:] not in ([], [0]):
        raise Refused
    e, m = pairs[how["format"]]
    width, shape, n = 1 + e + m, how["shape"], math.prod(how["shape"])
    blocks, last = math.ceil(n / 32), shape[-1] if shape else 1
    expected = [
        (INTERCHANGE[how["format"]], shape if last * width % 8 == 0 else [32 * blocks]),
        ("F8_E8M0", [*shape[:-1], last // 32] if last % 32 == 0 else [blocks]),
    ]
    if [(entry["dtype"], entry["shape"]) for entry, _ in (elements, scales)] != expected:
        raise Refused
    strings = np.unpackbits(np.frombuffer(elements[1], dtype=np.uint8), bitorder="little").reshape(-1, width)
    codes = [int(code) for code in strings @ (1 << np.arange(width))]
    if any(codes[n:]) or any(abs(number(code, e, m)) > OCP_LARGEST[how["format"]] for code in codes):
        raise Refused
    return decode(codes[:n], scales[1], Method(how["format"], width, 32, "sign-magnitude", e, m)).reshape(shape)


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
    stored = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        stored[name] = entry, data[8 + length + begin : 8 + length + end]
        if digests[name] != tensor_digest(entry["dtype"], entry["shape"], stored[name][1]):
            raise Refused
    result = {}
    for name, how in described["variables"].items():
        if described.get("interchange", False):
            result[name] = read_elements(how, stored.pop(name), stored.pop(name + "_scale"))
            continue
        base = read_frame(stored.pop(name)[1])
        formats, frames, values = [how["format"]], [base], base.values
        if how["draws"][1:] not in ([], [0]):
            update = read_frame(stored.pop(name + ".update")[1])
            values = values + update.values
            formats, frames = [*formats, how["update_format"]], [base, update]
        for kind, (format, frame) in enumerate(zip(formats, frames, strict=True)):
            found = (frame.kind, frame.method, list(frame.shape))
            if found != (kind, format, how["shape"]):
                raise Refused
        if not np.isfinite(values).all():
            raise Refused
        result[name] = values
    for name, (entry, raw) in stored.items():
        result[name] = np.frombuffer(raw, dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return result | {further: result[name] for further, name in described["tied"].items()}
