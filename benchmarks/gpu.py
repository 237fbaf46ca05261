"""Measures the codec and a training step on a CUDA device, against copies of FP32 tensors and training in FP32.

    python -m benchmarks.gpu [--json out.json] [--values 1048576 268435456] [--models conformer llama] [--steps 5]

Without a device it says so and exits with status 2. ``--dry-run`` runs everything on the CPU, in small, so that the
code can be tested; it measures nothing.

Rows of the codec: ``{format, op, values, seconds, copy_seconds, copy_ratio}``, with the times of the operation and of a
device-to-device copy of the FP32 tensor, each the median of rounds in turn. Rows of training:
``{model, variant, parameters, step_seconds, peak_bytes}``: a step is forward, backward and optimizer, and the peak is
that of the device's memory during the steps. The models have random weights: the application's FastConformer-Large, and
a Llama of a billion parameters. Peers that are not installed are named and left out.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fedomc
from fedomc import codec
from fedomc.methods import Packed, encode, parse_method

FORMATS = ("S1E2M3", "S1E3M7", "S1E5M10", "S1E2M3/64")
SIZES = (2**20, 2**22, 2**24, 2**26, 2**28)
ROUNDS = 11
VARIANTS = {
    "fp32": "SGD",
    "bf16-autocast": "SGD, forward under autocast to bfloat16, parameters in FP32",
    "bf16": "SGD, parameters in bfloat16",
    "S1E3M7": "SGD, 90 % of the weights",
    "S1E3M7-autocast": "SGD, 90 % of the weights, forward under autocast to bfloat16",
    "bitsandbytes": "its 8-bit Adam, forward under autocast to bfloat16",
}
MODELS = ("conformer", "llama")
NO_DEVICE = 2
"""The exit status without a device."""

VOCABULARY, TOKENS, FRAMES = 1024, 40, 400
LLAMA = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32000,
}  # fmt: skip
SMALL_LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64,
}  # fmt: skip

Rows = list[dict[str, Any]]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--values", nargs="+", type=int, default=list(SIZES), help="values in a tensor")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after two that are not")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU and in small; measures nothing")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print("there is no CUDA device here: nothing was measured", file=sys.stderr)
        raise SystemExit(NO_DEVICE)
    device = torch.device("cpu" if options.dry_run else "cuda")
    name = "dry run on the CPU" if options.dry_run else torch.cuda.get_device_name()
    print(f"{name}, codec: {codec.backend(device)}")
    kernels = [row for values in options.values for row in codec_rows(values, device)]
    steps = [row for model in options.models for row in step_rows(model, options.steps, device)]
    for row in (*kernels, *steps):
        print("  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))
    if options.json is not None:
        found = {"device": name, "torch": torch.__version__, "codec": kernels, "training": steps}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def codec_rows(values: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure each operation of each format, in turn with a copy of the FP32 tensor."""
    x = torch.randn(values, device=device) * 0.05
    out = torch.empty_like(x)
    for format in FORMATS:
        packed = encode(x, parse_method(format), name="x")
        for op, operation in operations(packed, x, out).items():
            found = seconds((operation, partial(out.copy_, x)), device)
            yield {
                "format": format, "op": op, "values": values, "seconds": found[0], "copy_seconds": found[1],
                "copy_ratio": found[1] / found[0],
            }  # fmt: skip


def operations(packed: Packed, x: Tensor, out: Tensor) -> dict[str, Callable[[], object]]:
    """Return what is measured: whole operations as training calls them."""
    return {
        "decode": partial(packed.decode, out),
        "encode": partial(packed.rewrite, lambda start, stop: x[start:stop], "scaled", "stochastic", 1, "x"),
        "update": partial(packed.add_, x, -1e-3, "scaled", "stochastic", 1, "x"),
    }


def seconds(operations: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Return the median times of operations, measured in turn after a round that is not counted."""
    taken = [[timed(operation, device) for operation in operations] for _ in range(ROUNDS + 1)][1:]
    return [statistics.median(times) for times in zip(*taken, strict=True)]


def timed(operation: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call, on the device's clock if it has one."""
    if device.type != "cuda":
        began = time.perf_counter()
        operation()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    operation()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def step_rows(model: str, steps: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Measure the training step of a model in each variant."""
    for variant in VARIANTS:
        if variant == "bitsandbytes" and (find_spec(variant) is None or device.type != "cuda"):
            print(f"{variant} is not installed or has no device: left out")
            continue
        gc.collect()
        step, parameters = prepared(model, variant, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        taken = [timed(step, device) for _ in range(steps + 2)][2:]
        yield {
            "model": model, "variant": variant, "parameters": parameters, "step_seconds": statistics.median(taken),
            "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        }  # fmt: skip
        del step  # with its model


def prepared(name: str, variant: str, device: torch.device) -> tuple[Callable[[], None], int]:
    """Build a model in a variant; return its step and the number of its parameters."""
    torch.manual_seed(0)
    model, loss = {"conformer": conformer, "llama": llama}[name](device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if variant.startswith("S1"):
        policy = fedomc.CompressionPolicy.parse(f"{variant.removesuffix('-autocast')}@0.9")
        fedomc.compress_(model, policy.select(model))
    if variant == "bf16":
        model.to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if variant == "bitsandbytes":
        import bitsandbytes

        optimizer = bitsandbytes.optim.Adam8bit(model.parameters(), lr=1e-4)
    is_narrow = variant.endswith("autocast") or variant == "bitsandbytes"

    def step() -> None:
        precision: AbstractContextManager[Any] = (
            torch.autocast(device.type, torch.bfloat16) if is_narrow else nullcontext()
        )
        with precision:
            found = loss(next(model.parameters()).dtype)
        found.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, parameters


def conformer(device: torch.device) -> tuple[nn.Module, Callable[[torch.dtype], Tensor]]:
    """Build the application's large model, and its loss on one utterance of four seconds."""
    from fedomc_speech.model import build

    model = build("large" if device.type == "cuda" else "tiny", VOCABULARY, seed=0).to(device).train()
    features = torch.randn(1, FRAMES, model.mels, device=device)
    frames = torch.full((1,), FRAMES, device=device)
    targets = torch.randint(1, VOCABULARY, (1, TOKENS), device=device)
    lengths = torch.full((1,), TOKENS, device=device)

    def loss(dtype: torch.dtype) -> Tensor:
        log_probabilities, found = model(features.to(dtype), frames)
        return nn.functional.ctc_loss(log_probabilities.transpose(0, 1).float(), targets, found, lengths)

    return model, loss


def llama(device: torch.device) -> tuple[nn.Module, Callable[[torch.dtype], Tensor]]:
    """Build a Llama of a billion parameters, and its loss on 1024 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes, length = (LLAMA, 1024) if device.type == "cuda" else (SMALL_LLAMA, 16)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(device).train()
    tokens = torch.randint(2, sizes["vocab_size"], (1, length), device=device)
    return model, lambda dtype: model(input_ids=tokens, labels=tokens).loss


if __name__ == "__main__":
    main()
