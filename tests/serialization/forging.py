"""Model files that were changed and signed again, so that a reader gets behind the digests."""

import json
from typing import Any

from tests.independent_reader import tensor_digest, text_digest


def signed(header: dict[str, Any], data: bytes) -> bytes:
    """Write a file with the digests of what it holds, as far as the header says where that is."""
    texts = header.get("__metadata__")
    if isinstance(texts, dict) and all(isinstance(text, str) for text in texts.values()):
        texts = {name: text for name, text in texts.items() if name != "fedomc.digest"}
        entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
        texts["fedomc.digests"] = json.dumps({key: _digest(entry, data) for key, entry in entries.items()})
        header = {**header, "__metadata__": {**texts, "fedomc.digest": text_digest(texts)}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def signed_again(file: bytes) -> bytes:
    """Give a damaged file digests that fit; if its header cannot be read, leave it as it is."""
    length = int.from_bytes(file[:8], "little")
    try:
        header = json.loads(file[8 : 8 + length])
    except ValueError:
        return file
    return signed(header, file[8 + length :]) if isinstance(header, dict) else file


def _digest(entry: Any, data: bytes) -> str:
    try:
        begin, end = entry["data_offsets"]
        return tensor_digest(entry["dtype"], entry["shape"], data[begin:end])
    except (KeyError, TypeError, ValueError):
        return ""
