"""What a training step takes at the batches that people train with: peak memory, time, and the gradient's error.

    python -m benchmarks.memory [--json out.json] [--rounds 3] [--steps 3] [--batches 1x4 4x10] [--variants fp32 ...]

The model is the application's FastConformer-Large (about 115 M parameters, CTC head), a batch ``4x10`` is four
utterances of ten seconds, and there is one thread. Each variant runs in a process of its own, again in every round, so
that what else the machine does falls on all of them. Rows ``{variant, batch, seconds, parameters, activations,
optimizer, checkpointing, parameter_bytes, peak_rss_bytes, peak_ratio, speed_ratio, gradient_error}``: the peak is that
of the process above its level after the imports; the ratios are medians over rounds, to ``fp32`` at the same batch
(peak: less is better, speed: more is better). The error of the gradient is the norm of its difference to the gradient
with exact activations, relative to the norm of that, for the same parameters and dropout; None without packed ones.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fedomc
from benchmarks.training import LEARNING_RATE, held, memory, values

FP32, EIGHT_BITS, FOUR_BITS = "FP32", "S1E4M3", "INT4"
FRAMES_PER_SECOND, TOKENS_PER_SECOND, VOCABULARY = 100, 3, 1024
BATCHES = ("1x4", "4x10", "8x15")


@dataclass(frozen=True)
class Variant:
    """How a model is trained.

    Attributes:
        parameters: ``FP32``, a format, or ``int8 (torchao)``.
        activations: ``FP32``, ``BF16`` by autocast, or a format.
        optimizer: and the format of its state; SGD has none.
        checkpointing: whether each layer is computed again in the backward pass.
        in_backward: whether each variable is stepped, and its gradient dropped, in the backward pass.
    """

    parameters: str = FP32
    activations: str = FP32
    optimizer: str = "SGD"
    checkpointing: bool = False
    in_backward: bool = True

    @property
    def packs_activations(self) -> bool:
        """Whether activations are held as codes."""
        return self.activations not in (FP32, "BF16")


VARIANTS = {
    "fp32": Variant(in_backward=False),
    "fp32-in-backward": Variant(),
    "bf16-autocast": Variant(activations="BF16", in_backward=False),
    "fp32-checkpointed": Variant(checkpointing=True, in_backward=False),
    "fp32+8": Variant(activations=EIGHT_BITS),
    "torchao-int8": Variant("int8 (torchao)", in_backward=False),
    **{
        f"{format}{suffix}": Variant(format, activations, checkpointing=suffix.endswith("checkpointed"))
        for format in ("S1E3M7", "S1E2M3")
        for suffix, activations in (
            ("", FP32), ("+8", EIGHT_BITS), ("+4", FOUR_BITS),
            ("-checkpointed", FP32), ("+8-checkpointed", EIGHT_BITS), ("+4-checkpointed", FOUR_BITS),
        )
    },
}  # fmt: skip


def main() -> None:
    """Run all variants in turn, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--rounds", type=int, default=3, help="how often each variant runs")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a run, after one that is not")
    parser.add_argument("--batches", nargs="+", default=list(BATCHES), help="utterances x seconds")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="fp32 always runs")
    parser.add_argument("--model", default="large", choices=("tiny", "large"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(run(**json.loads(options.worker))))
        return
    names = list(dict.fromkeys(("fp32", *options.variants)))
    jobs = [(batch, name) for batch in options.batches for name in names]
    print(f"{len(jobs)} set-ups x {options.rounds} rounds, up to 6 GB of memory", flush=True)
    runs: dict[tuple[str, str], list[dict[str, Any] | None]] = {job: [] for job in jobs}
    for number in range(1, options.rounds + 1):
        for batch, name in jobs:
            packs = VARIANTS[name].packs_activations
            job = {"variant": name, "batch": batch, "model": options.model, "steps": options.steps}
            found = in_process(job)
            if found is not None and packs and number == 1:
                found |= in_process({**job, "steps": 0}) or {}
            runs[batch, name].append(found)
            print(f"round {number} of {options.rounds}: {batch} {name}", flush=True)
        rows = [found for batch, name in jobs if (found := row(batch, name, runs))]
        if options.json:  # after each round: a run may be stopped
            options.json.write_text(json.dumps({"rounds": number, "model": options.model, "rows": rows}, indent=2))
    for line in table(rows):
        print(line)


def in_process(job: dict[str, Any]) -> dict[str, Any] | None:
    """Run a set-up in a process of its own; None if it fails, as it may for want of memory."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "benchmarks.memory", "--worker", json.dumps(job)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        print(f"{job} failed: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}", flush=True)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(batch: str, name: str, runs: dict[tuple[str, str], list[dict[str, Any] | None]]) -> dict[str, Any] | None:
    """Sum up the runs of a set-up, against those of fp32 in the same rounds; None if there were none."""
    pairs = [(a, b) for a, b in zip(runs[batch, name], runs[batch, "fp32"], strict=True) if a and b]
    if not pairs:
        return None
    utterances, seconds = map(int, batch.split("x"))
    how = asdict(VARIANTS[name])
    del how["in_backward"]
    return {
        "variant": name,
        "batch": utterances,
        "seconds": seconds,
        **how,
        "parameter_bytes": pairs[0][0]["parameter_bytes"],
        "peak_rss_bytes": statistics.median(a["peak_rss_bytes"] for a, _ in pairs),
        "step_seconds_median": statistics.median(a["step_seconds"] for a, _ in pairs),
        "peak_ratio": statistics.median(a["peak_rss_bytes"] / b["peak_rss_bytes"] for a, b in pairs),
        "speed_ratio": statistics.median(b["step_seconds"] / a["step_seconds"] for a, b in pairs),
        "gradient_error": next((a["gradient_error"] for a, _ in pairs if "gradient_error" in a), None),
    }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Give the lines of the table."""
    yield f"{'':<6} {'':<24} {'parameters':>10} {'peak':>15} {'step':>9} {'speed':>7} {'error of gradient':>18}"
    for r in rows:
        error = "" if r["gradient_error"] is None else f"{r['gradient_error']:.2%}"
        yield (
            f"{r['batch']}x{r['seconds']:<4} {r['variant']:<24} {r['parameter_bytes'] / 1e6:>7.0f} MB "
            f"{r['peak_rss_bytes'] / 1e6:>7.0f} MB {r['peak_ratio']:>4.0%} {r['step_seconds_median']:>7.3f} s "
            f"{r['speed_ratio']:>6.2f}x {error:>18}"
        )


# ---- one variant, in its own process -------------------------------------------------------------------------------


def run(variant: str, batch: str, model: str, steps: int) -> dict[str, Any]:
    """Train a few steps and report time and memory; with no steps, report the error of the gradient."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    how = VARIANTS[variant]
    trained, loss, start = prepare(how, batch, model)
    if not steps:
        return {"gradient_error": gradient_error(trained, loss, how.activations)}
    optimizer = None
    if how.in_backward:
        fedomc.step_in_backward(trained, torch.optim.SGD, lr=LEARNING_RATE)
    else:
        optimizer = torch.optim.SGD(trained.parameters(), lr=LEARNING_RATE)
    taken = []
    with fedomc.compress_activations(trained, how.activations) if how.packs_activations else nullcontext():
        for _ in range(steps + 1):
            began = time.thread_time()
            loss().backward()  # type: ignore[no-untyped-call]
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            taken.append(time.thread_time() - began)
    return {
        "step_seconds": statistics.median(taken[1:]),
        "peak_rss_bytes": memory("VmHWM") - start,
        "parameter_bytes": sum(map(held, trained.parameters())),
    }


def prepare(how: Variant, batch: str, size: str) -> tuple[nn.Module, Callable[[], Tensor], int]:
    """Build the model and its loss; give also the memory before them."""
    from fedomc_speech.model import build

    utterances, seconds = map(int, batch.split("x"))
    model = build(size, VOCABULARY)
    if how.checkpointing:
        model.encoder.gradient_checkpointing_enable({"use_reentrant": False})
    features = torch.randn(utterances, FRAMES_PER_SECOND * seconds, model.mels)
    frames = torch.full((utterances,), features.shape[1])
    targets = torch.randint(1, VOCABULARY, (utterances, TOKENS_PER_SECOND * seconds))
    lengths = torch.full((utterances,), targets.shape[1])
    if "torchao" in how.parameters:
        from torchao.prototype.quantized_training import int8_weight_only_quantized_training
        from torchao.quantization import quantize_

    start = memory("VmRSS")
    is_format = how.parameters.startswith("S1")
    selection = fedomc.CompressionPolicy.parse(f"{how.parameters}@0.9").select(model) if is_format else {}
    fedomc.materialize_(model, values(model), selection)
    if "torchao" in how.parameters:
        quantize_(model, int8_weight_only_quantized_training())
    model.train()
    precision: Callable[[], AbstractContextManager[Any]] = (
        partial(torch.autocast, "cpu", torch.bfloat16) if how.activations == "BF16" else nullcontext
    )

    def loss() -> Tensor:
        with precision():
            log_probabilities, found = model(features, frames)
        return nn.functional.ctc_loss(log_probabilities.transpose(0, 1).float(), targets, found, lengths)

    return model, loss, start


def gradient_error(model: nn.Module, loss: Callable[[], Tensor], activations: str) -> float:
    """Compare the gradients of one batch with exact and with packed activations, with the same dropout."""

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(1)
        model.zero_grad(set_to_none=True)
        loss().backward()  # type: ignore[no-untyped-call]
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    exact = gradients()
    with fedomc.compress_activations(model, activations):
        packed = gradients()
    difference = sum(float((packed[name] - exact[name]).square().sum()) for name in exact)
    return float((difference / sum(float(each.square().sum()) for each in exact.values())) ** 0.5)


if __name__ == "__main__":
    main()
