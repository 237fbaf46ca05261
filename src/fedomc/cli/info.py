"""``fedomc info``: what a bug report needs to say about an installation."""

import importlib.metadata
import os
import platform
from typing import Any

import torch
import typer

from fedomc import __version__, codec
from fedomc._torch import processor_name
from fedomc.cli.output import Json, print_json
from fedomc.codec import native
from fedomc.tensor.ops import products

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "xxhash",
    "flwr",
    "nvflare",
    "transformers",
    "peft",
    "torchao",
    "zstandard",
)
"""Whose versions are shown, if they are installed."""

SETTINGS = ("FEDOMC_NATIVE", "FEDOMC_LEVEL", "FEDOMC_PRODUCTS", "OMP_NUM_THREADS")
"""The environment variables that change what fedomc does."""


def info(json: Json = False) -> None:
    """Show versions, codec, instruction set and devices: what a bug report needs."""
    found = collect()
    if json:
        print_json(found)
        return
    for name, value in found.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        for key, entry in entries:
            text = ", ".join(entry) if isinstance(entry, list) else str(entry)
            typer.echo(f"{f'{name} {key}'.strip():<24}{text}")


def collect() -> dict[str, Any]:
    """Collect what ``info`` shows, as JSON can hold it."""
    extension = native.extension
    return {
        "fedomc": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name() or "unknown",
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "codec": codec.backend("cpu"),
        "instruction set": "none" if extension is None else str(extension.level()),
        "instruction sets": [] if extension is None else list(extension.levels()),
        "products": f"{products.backend()} (rule for processor: {products.PROCESSOR})",
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count()))],
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
