"""The codec's C++ kernels for CPU tensors, as operator implementations.

The environment variable ``FEDOMC_NATIVE`` selects them: ``auto``, the default, uses the kernels if they can be loaded,
``1`` requires them, and ``0`` uses the reference instead.

Tensors are passed as DLPack capsules made by ``to_dlpack``, because a call of ``__dlpack__`` takes longer than a small
kernel.
"""

import importlib
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack  # type: ignore[attr-defined]

from fedomc._torch import dispatch_is_watched


def load(setting: str) -> ModuleType | None:
    """Load the extension with the kernels.

    Args:
        setting: ``0`` does not load it, ``1`` raises an error if it cannot be loaded, and ``auto`` only warns then.

    Returns:
        The extension, or None if the reference is to be used.

    Raises:
        ImportError: the extension cannot be loaded and the setting is ``1``.
        ValueError: the setting is none of the three.
    """
    if setting not in ("0", "1", "auto"):
        raise ValueError(f"FEDOMC_NATIVE={setting!r} is not a valid setting: use 0, 1 or auto")
    if setting == "0":
        return None
    try:
        return importlib.import_module("fedomc.codec._native")
    except ImportError as error:
        if setting == "1":
            raise
        warnings.warn(
            f"fedomc's native codec cannot be loaded ({error}); the much slower reference is used instead. "
            "Reinstall fedomc with a C++ compiler available, or set FEDOMC_NATIVE=0 to silence this warning",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


_UNSIGNED = 2**64 - 1

extension = load(os.environ.get("FEDOMC_NATIVE", "auto"))
"""The extension, or None if the reference is used."""


def absmax(values: Tensor, out: Tensor) -> None:
    """See ``reference.absmax``."""
    out.fill_(_extension().absmax(to_dlpack(values), torch.get_num_threads()))


def decode(words: Tensor, scale_offset: Tensor, e: int, m: int, out: Tensor) -> None:
    """See ``reference.decode``."""
    _extension().decode(to_dlpack(words), to_dlpack(scale_offset), e, m, to_dlpack(out), torch.get_num_threads())


def decode_sum(
    words: Tensor, scale_offset: Tensor, e: int, m: int,
    update_words: Tensor, update_scale_offset: Tensor, update_e: int, update_m: int, out: Tensor,
) -> None:  # fmt: skip
    """See ``reference.decode_sum``."""
    _extension().decode_sum(
        to_dlpack(words), to_dlpack(scale_offset), e, m, to_dlpack(update_words), to_dlpack(update_scale_offset),
        update_e, update_m, to_dlpack(out), torch.get_num_threads(),
    )  # fmt: skip


def decode_add(words: Tensor, scale_offset: Tensor, e: int, m: int, weight: float, out: Tensor) -> None:
    """See ``reference.decode_add``."""
    _extension().decode_add(
        to_dlpack(words), to_dlpack(scale_offset), e, m, weight, to_dlpack(out), torch.get_num_threads()
    )


def decode_add_difference(
    words: Tensor, scale_offset: Tensor, e: int, m: int,
    subtrahend_words: Tensor, subtrahend_scale_offset: Tensor, subtrahend_e: int, subtrahend_m: int,
    weight: float, out: Tensor,
) -> None:  # fmt: skip
    """See ``reference.decode_add_difference``."""
    _extension().decode_add_difference(
        to_dlpack(words), to_dlpack(scale_offset), e, m, to_dlpack(subtrahend_words),
        to_dlpack(subtrahend_scale_offset), subtrahend_e, subtrahend_m, weight, to_dlpack(out),
        torch.get_num_threads(),
    )  # fmt: skip


def add_difference(values: Tensor, subtrahend: Tensor, weight: float, out: Tensor) -> None:
    """See ``reference.add_difference``."""
    _extension().add_difference(
        to_dlpack(values), to_dlpack(subtrahend), weight, to_dlpack(out), torch.get_num_threads()
    )


def encode(
    values: Tensor, e: int, m: int, exponent: int, seed: int | None, start: int,
    words: Tensor, sums: Tensor, status: Tensor,
) -> None:  # fmt: skip
    """See ``reference.encode``."""
    _extension().encode(
        to_dlpack(values), e, m, exponent, seed is not None, seed or 0, start, to_dlpack(words), to_dlpack(sums),
        to_dlpack(status), torch.get_num_threads(),
    )  # fmt: skip


def update(
    words: Tensor, scale_offset: Tensor, e: int, m: int, gradient: Tensor, alpha: float, rescale: bool,
    seed: int | None, out: Tensor, out_scale_offset: Tensor, status: Tensor,
) -> None:  # fmt: skip
    """See ``reference.update``."""
    _extension().update(
        to_dlpack(words), to_dlpack(scale_offset), e, m, to_dlpack(gradient), alpha, rescale, seed is not None,
        seed or 0, to_dlpack(out), to_dlpack(out_scale_offset), to_dlpack(status), torch.get_num_threads(),
    )  # fmt: skip


def block_decode(words: Tensor, scales: Tensor, kind: int, e: int, m: int, block: int, out: Tensor) -> None:
    """See ``reference_blocks.block_decode``."""
    _extension().block_decode(
        to_dlpack(words), to_dlpack(scales), kind, e, m, block, to_dlpack(out), torch.get_num_threads()
    )


def block_decode_sum(
    words: Tensor, scales: Tensor, kind: int, e: int, m: int, block: int,
    update_words: Tensor, update_scales: Tensor, update_kind: int, update_e: int, update_m: int, update_block: int,
    out: Tensor,
) -> None:  # fmt: skip
    """See ``reference_blocks.block_decode_sum``."""
    _extension().block_decode_sum(
        to_dlpack(words), to_dlpack(scales), kind, e, m, block, to_dlpack(update_words), to_dlpack(update_scales),
        update_kind, update_e, update_m, update_block, to_dlpack(out), torch.get_num_threads(),
    )  # fmt: skip


def block_encode(
    values: Tensor, kind: int, e: int, m: int, block: int, seed: int | None, start: int,
    words: Tensor, scales: Tensor, status: Tensor,
) -> None:  # fmt: skip
    """See ``reference_blocks.block_encode``."""
    _extension().block_encode(
        to_dlpack(values), kind, e, m, block, seed is not None, seed or 0, start, to_dlpack(words), to_dlpack(scales),
        to_dlpack(status), torch.get_num_threads(),
    )  # fmt: skip


def block_update(
    words: Tensor, scales: Tensor, kind: int, e: int, m: int, block: int, gradient: Tensor, alpha: float,
    seed: int | None, out: Tensor, out_scales: Tensor, status: Tensor,
) -> None:  # fmt: skip
    """See ``reference_blocks.block_update``."""
    _extension().block_update(
        to_dlpack(words), to_dlpack(scales), kind, e, m, block, to_dlpack(gradient), alpha, seed is not None,
        seed or 0, to_dlpack(out), to_dlpack(out_scales), to_dlpack(status), torch.get_num_threads(),
    )  # fmt: skip


def rotated_decode(words: Tensor, scales: Tensor, bits: int, seed: int, start: int, out: Tensor) -> None:
    """See ``reference_rotation.rotated_decode``."""
    _extension().rotated_decode(
        to_dlpack(words), to_dlpack(scales), bits, seed & _UNSIGNED, start, to_dlpack(out), torch.get_num_threads()
    )


def rotated_encode(
    values: Tensor, bits: int, seed: int, start: int, unbiased: bool, words: Tensor, scales: Tensor
) -> None:  # fmt: skip
    """See ``reference_rotation.rotated_encode``."""
    _extension().rotated_encode(
        to_dlpack(values), bits, seed & _UNSIGNED, start, unbiased, to_dlpack(words), to_dlpack(scales),
        torch.get_num_threads(),
    )  # fmt: skip


def past_dispatcher(name: str, operator: Callable[..., None]) -> Callable[..., None]:
    """Return an operator that calls its kernel at once for plain CPU tensors, where no mode or profiler looks on.

    The way through the dispatcher takes longer than the kernel does for a few thousand values.
    """
    kernel: Callable[..., None] | None = globals().get(name)
    if extension is None or kernel is None:
        return operator

    def call(first: Tensor, *others: Any) -> None:
        if type(first) is Tensor and first.is_cpu and not dispatch_is_watched():
            kernel(first, *others)
        else:
            operator(first, *others)

    return call


def _extension() -> ModuleType:
    assert extension is not None
    return extension
