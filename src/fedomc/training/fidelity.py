"""Measures how closely codes hold the values of variables, and words the warning for those that they hold badly.

[Note: variables that a format cannot hold]
A format with one scale for a whole variable has few codes left for most values if a few are far larger, as in most
pretrained transformers. The lost share of a variable shows it: the errors' magnitudes over those of the values, in the
mean over blocks of 1024 values. A ratio of norms would not show it, as a single large value can outweigh all others.
Without outliers the share depends on the format alone: 3% in S1E2M3, 5% in S1E2M2, 8% in NF4, 11% in S1E2M1. S1E2M3
loses 6% or less of half of MiniLM's 40 matrices, but 49% to 99% of five, and fine-tuning loses 4 to 15 points in all
four cells of ``docs/results/recipes.md``. In the models of the other cells no variable loses more than 23% in any
format that was tried, and in MiniLM none more than 29% with scales by block.
"""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedomc.codec import BLOCK, CHUNK
from fedomc.methods import Encoding, Packed

LOST_LIMIT = 0.35
"""A variable of which a larger share is lost triggers a warning."""

_STRETCH = CHUNK // 2  # values that are decoded at a time: 128 KB
_TINY = torch.finfo(torch.float32).tiny
_NAMED = 3  # how many variables a warning lists by name


class Distance(NamedTuple):
    """How far a variable's decoded values are from the original ones.

    Attributes:
        error: the sum of the squared differences.
        size: the sum of the squared original values.
        lost_share: the share of the values' magnitudes that is lost, in the mean over blocks.
    """

    error: float
    size: float
    lost_share: float


def measure(packed: Packed, values: Tensor) -> Distance:
    """Compare a packed variable with the flat values that it holds; decodes 128 KB at a time."""
    error = size = lost = 0.0
    scratch = torch.empty(min(_STRETCH, values.numel()), dtype=torch.float32, device=values.device)
    for start in range(0, values.numel(), _STRETCH):
        part = values[start : start + _STRETCH].float()
        difference = packed.decode(scratch[: part.numel()], start).sub_(part)
        error += float(torch.dot(difference, difference))
        size += float(torch.dot(part, part))
        lost += _lost(difference, part)
    return Distance(error, size, lost / max(1, values.numel()))


def _lost(difference: Tensor, values: Tensor) -> float:
    """Return the number of values times the lost share of their block, summed over blocks."""
    whole = values.numel() // BLOCK * BLOCK
    found = 0.0
    for part in (slice(0, whole), slice(whole, None)):
        count = BLOCK if part.stop else values.numel() - whole
        if values[part].numel():
            lost, magnitude = (
                torch.linalg.vector_norm(x[part].view(-1, count), 1, dim=1) for x in (difference, values)
            )
            found += count * float((lost / magnitude.clamp(min=_TINY)).sum())
    return found


def warning_of(distances: Mapping[str, Distance], format: str = "") -> str | None:
    """Return the warning for variables of which more than ``LOST_LIMIT`` is lost; None if there are none.

    Args:
        distances: how far each variable is from its values, by qualified name.
        format: what the variables are held in, for the text.
    """
    shares = {name: distance.lost_share for name, distance in distances.items()}
    worst = sorted((name for name, share in shares.items() if share > LOST_LIMIT), key=lambda name: -shares[name])
    if not worst:
        return None
    named = ", ".join(f"{shares[name]:.0%} of {name}" for name in worst[:_NAMED])
    others = f" and parts of {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
    return (
        f"{format or 'the format'} cannot hold {len(worst)} of {len(shares)} variables: it loses {named}{others}. Most "
        "of their values are too small for the scale: use scales by block (such as S1E2M3/64), more exponent bits "
        "(such as S1E4M3), or leave these variables out with exclude=[...]; fedomc.advise compares formats"
    )


def warn_of_losses(distances: Mapping[str, Distance], selection: Mapping[str, Encoding], stacklevel: int) -> None:
    """Warn once of the variables of a model that their formats cannot hold, if there are any.

    Args:
        distances: how far each variable is from its values, by qualified name.
        selection: how the variables are encoded.
        stacklevel: which caller the warning points to, as in ``warnings.warn`` called instead of this function.
    """
    text = warning_of(distances, "+".join(dict.fromkeys(str(how.format) for how in selection.values())))
    if text is not None:
        warnings.warn(text, stacklevel=stacklevel + 1)
