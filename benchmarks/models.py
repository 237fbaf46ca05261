"""Whether models that nobody here wrote train as they should when compressed: no speed, but bits, losses and bytes.

    python -m benchmarks.models [--json out.json] [--models GPT2LMHeadModel torch.nn.LSTM]

A row is a model in a format: ``{model, parameters, format, loss_fp32, loss_lossless, bit_identical, largest_difference,
loss_first, loss_last, fp32_last, parameter_bytes, predicted_bytes, fp32_bytes, wrong}``. The first figures say whether
S1E8M23, stepped in backward, gives every bit of plain training: losses and variables after 3 steps, and the largest
difference, relative for what is larger than 1; a model whose sums are taken in another order may differ by 1e-6. Then
the loss of memorising one batch for 20 steps must fall, and a model hold as many bytes as shapes and formats say. What
is not so is listed in ``wrong``, and the exit code is 1. A model that cannot be trained has no other figures.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.architectures import ARCHITECTURES, Architecture, loss
from fedomc import CompressedTensor, CompressionPolicy, compress_, parameter_bytes, step_in_backward

LOSSLESS = [
    CompressionPolicy("S1E8M23", transform="none", weight_matrices_only=False, exclude=exclude)
    for exclude in ((), ("*bias*",))
]
"""All variables, and without the biases: a layer whose bias is plain takes another way."""
POLICIES = {
    "S1E3M7@0.9": CompressionPolicy("S1E3M7", fraction=0.9),
    "S1E2M3+S1E2M1": CompressionPolicy("S1E2M3", update_format="S1E2M1", rounding="stochastic"),
}
COMPARED, MEMORISED = 3, 20
"""Steps after which plain and lossless training are compared, and steps that memorise the batch."""
CLIP_NORM = 1.0
TOLERANCE = 1e-6


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    names = [architecture.name for architecture in ARCHITECTURES]
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args()
    rows = []
    print(f"{'model':32}{'parameters':>11} lossless   {'format':14}{'loss':>16}{'FP32':>8}{'bytes':>9}{'of FP32':>9}")
    for architecture in (one for one in ARCHITECTURES if one.name in options.models):
        try:
            found = measure(architecture)
        except Exception as error:  # of one model: the others are measured all the same
            found = []
            rows.append({"model": architecture.name, "wrong": [f"{type(error).__name__}: {error}"]})
            print(f"{architecture.name:32}", *rows[-1]["wrong"], flush=True)
        for row in found:
            rows.append(row)
            same = "same bits " if row["bit_identical"] else f"{row['largest_difference']:<10.1e}"
            print(
                f"{row['model']:32}{row['parameters']:>11} {same} {row['format']:14}{row['loss_first']:>7.3f} ->"
                f"{row['loss_last']:>6.3f}{row['fp32_last']:>8.3f}{row['parameter_bytes']:>9}"
                f"{row['parameter_bytes'] / row['fp32_bytes']:>9.1%}",
                *row["wrong"],
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=2))
    sys.exit(any(row["wrong"] for row in rows))


def measure(architecture: Architecture) -> list[dict[str, Any]]:
    """Train a model plainly, losslessly and in each format; return a row a format."""
    plain, losses = trained(architecture, None, COMPARED)
    _, memorised = trained(architecture, None, MEMORISED)
    difference = 0.0
    for lossless in LOSSLESS:
        packed, packed_losses = trained(architecture, lossless, COMPARED)
        found = largest_difference([*values_of(plain), losses], [*values_of(packed), packed_losses])
        difference = max(difference, found)
    rows = []
    for name, policy in POLICIES.items():
        model, memorising = trained(architecture, policy, MEMORISED)
        held = parameter_bytes(model)
        row = {
            "model": architecture.name, "parameters": held.fp32 // 4, "format": name,
            "loss_fp32": float(losses[-1]), "loss_lossless": float(packed_losses[-1]),
            "bit_identical": difference == 0, "largest_difference": difference,
            "loss_first": float(memorising[0]), "loss_last": float(memorising[-1]), "fp32_last": float(memorised[-1]),
            "parameter_bytes": held.total, "predicted_bytes": predicted_bytes(plain, policy), "fp32_bytes": held.fp32,
        }  # fmt: skip
        rows.append({**row, "wrong": wrong(row)})
    return rows


def wrong(row: Mapping[str, Any]) -> list[str]:
    """Say what of a row is not as it should be."""
    checks = {
        f"lossless training differs by {row['largest_difference']:.1e}": row["largest_difference"] <= TOLERANCE,
        "the loss is not finite": math.isfinite(row["loss_last"]),
        "the loss does not fall": row["loss_last"] < 0.9 * row["loss_first"],
        f"{row['predicted_bytes']} bytes were predicted": row["parameter_bytes"] == row["predicted_bytes"],
    }
    return [message for message, holds in checks.items() if not holds]


def trained(architecture: Architecture, policy: CompressionPolicy | None, steps: int) -> tuple[nn.Module, Tensor]:
    """Build a model and train it on its one batch.

    Args:
        architecture: which model.
        policy: compresses it, and it is stepped in backward; None trains it plainly.
        steps: how many. Each draws its dropout from its number.

    Returns:
        The model and the losses ``[steps]``.
    """
    model, batch = architecture.make()
    rate = architecture.learning_rate
    if policy is not None:
        compress_(model, policy.select(model))
        step_in_backward(model, torch.optim.SGD, lr=rate, clip_norm=CLIP_NORM)
    losses = []
    with torch.random.fork_rng(devices=[]):
        for step in range(steps):
            torch.manual_seed(step)
            found = loss(model(**batch))
            found.backward()
            losses.append(found.detach())
            if policy is None:
                step_plainly(model, rate)
    return model, torch.stack(losses)


def step_plainly(model: nn.Module, rate: float) -> None:
    """Take the step that ``step_in_backward`` takes, as everybody would."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            nn.utils.clip_grad_norm_([parameter], CLIP_NORM)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    optimizer.step()
    optimizer.zero_grad()


def values_of(model: nn.Module) -> list[Tensor]:
    """Return the dense values of all variables and buffers, which training changes."""
    state = [*model.parameters(), *model.buffers()]
    return [x.dequantize() if isinstance(x, CompressedTensor) else x.detach() for x in state]


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest difference, relative where a value is larger than 1; 0 only if every bit is the same."""
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.numel() and not torch.equal(bits(a), bits(b)):
            difference = (a.double() - b.double()).abs() / a.double().abs().clamp(min=1)
            largest = max(largest, 1e-45, float(difference.nan_to_num(math.inf).max()))
    return largest


def bits(values: Tensor) -> Tensor:
    """Return the bits of float32 values, which tell -0 from 0; others as they are."""
    return values.contiguous().view(torch.int32) if values.dtype is torch.float32 else values


def predicted_bytes(model: nn.Module, policy: CompressionPolicy) -> int:
    """Predict what the variables of a plain model hold when compressed, from shapes and the bits of the formats.

    Codes are packed in blocks of 32 rows of 32 lanes; the last block has the rows that it needs, and each lane fills
    whole 32-bit words. A part has a factor and an offset, 4 bytes each.
    """
    selection = policy.select(model)
    total = 0
    for name, parameter in model.named_parameters():
        if name not in selection:
            total += 4 * math.prod(parameter.shape)
            continue
        full, rest = divmod(math.prod(parameter.shape), 1024)
        for part in str(selection[name]).split("+"):
            e, m = map(int, part.removeprefix("S1E").split("M"))
            rows = math.ceil(rest / 32)
            words = full * 32 * (1 + e + m) + 32 * math.ceil(rows * (1 + e + m) / 32)
            total += 4 * words + 8
    return total


if __name__ == "__main__":
    main()
