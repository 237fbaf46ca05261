"""The kernels in C++, for CPU tensors; ``FEDOMC_NATIVE=0`` keeps to the reference, ``1`` insists on the kernels.

Tensors are handed over as DLPack capsules: asking them through ``__dlpack__`` takes longer than a small kernel.
"""

import importlib
import os
import warnings
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]


def load(wanted: str) -> ModuleType | None:
    """Load the extension.

    Args:
        wanted: ``0`` (do not), ``1`` (raise if it cannot be loaded) or ``auto`` (warn then).

    Raises:
        ImportError: it cannot be loaded, and ``1`` was wanted.
        ValueError: ``wanted`` is something else.
    """
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"FEDOMC_NATIVE={wanted!r}: use 0, 1 or auto")
    if wanted == "0":
        return None
    try:
        return importlib.import_module("fedomc.codec._native")
    except ImportError as error:
        if wanted == "1":
            raise
        warnings.warn(
            f"fedomc's native codec cannot be loaded ({error}); the much slower reference serves. "
            "Install fedomc where a C++ compiler is, or set FEDOMC_NATIVE=0 to say that this is meant",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


extension = load(os.environ.get("FEDOMC_NATIVE", "auto"))
"""The extension, or None where the reference serves."""


def largest(values: Tensor, out: Tensor) -> None:
    """See ``reference.largest``."""
    out.fill_(_extension().largest(to_dlpack(values), torch.get_num_threads()))


def decode(words: Tensor, e: int, m: int, scale: float, offset: float, out: Tensor) -> None:
    """See ``reference.decode``."""
    _extension().decode(to_dlpack(words), e, m, scale, offset, to_dlpack(out), torch.get_num_threads())


def decode_sum(
    words: Tensor, e: int, m: int, scale: float, offset: float,
    update_words: Tensor, update_e: int, update_m: int, update_scale: float, update_offset: float, out: Tensor,
) -> None:  # fmt: skip
    """See ``reference.decode_sum``."""
    _extension().decode_sum(
        to_dlpack(words), e, m, scale, offset, to_dlpack(update_words), update_e, update_m, update_scale, update_offset,
        to_dlpack(out), torch.get_num_threads(),
    )  # fmt: skip


def decode_add(words: Tensor, e: int, m: int, scale: float, offset: float, weight: float, out: Tensor) -> None:
    """See ``reference.decode_add``."""
    _extension().decode_add(to_dlpack(words), e, m, scale, offset, weight, to_dlpack(out), torch.get_num_threads())


def decode_add_difference(
    words: Tensor, e: int, m: int, scale: float, offset: float,
    less_words: Tensor, less_e: int, less_m: int, less_scale: float, less_offset: float, weight: float, out: Tensor,
) -> None:  # fmt: skip
    """See ``reference.decode_add_difference``."""
    _extension().decode_add_difference(
        to_dlpack(words), e, m, scale, offset, to_dlpack(less_words), less_e, less_m, less_scale, less_offset, weight,
        to_dlpack(out), torch.get_num_threads(),
    )  # fmt: skip


def add_difference(values: Tensor, less: Tensor, weight: float, out: Tensor) -> None:
    """See ``reference.add_difference``."""
    _extension().add_difference(to_dlpack(values), to_dlpack(less), weight, to_dlpack(out), torch.get_num_threads())


def encode(
    values: Tensor, e: int, m: int, exponent: int, seed: int | None, start: int,
    words: Tensor, sums: Tensor, largest: Tensor,
) -> None:  # fmt: skip
    """See ``reference.encode``."""
    found = _extension().encode(
        to_dlpack(values),
        e,
        m,
        exponent,
        seed is not None,
        seed or 0,
        start,
        to_dlpack(words),
        to_dlpack(sums),
        torch.get_num_threads(),
    )
    largest.fill_(found)


def update(
    words: Tensor, e: int, m: int, scale: float, offset: float, gradient: Tensor, alpha: float, exponent: int,
    seed: int | None, out: Tensor, sums: Tensor, largest: Tensor,
) -> None:  # fmt: skip
    """See ``reference.update``."""
    found = _extension().update(
        to_dlpack(words), e, m, scale, offset, to_dlpack(gradient), alpha, exponent, seed is not None, seed or 0,
        to_dlpack(out), to_dlpack(sums), torch.get_num_threads(),
    )  # fmt: skip
    largest.fill_(found)


def _extension() -> ModuleType:
    assert extension is not None
    return extension
