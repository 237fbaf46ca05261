"""Measures the memory and time of a training step of a large model, against FP32, bfloat16 and torchao's int8.

    python -m benchmarks.training [--json out.json] [--rounds 5] [--steps 4] [--variants fp32 S1E3M7] [--model large]

The model is the application's FastConformer-Large with a CTC head (about 115 M parameters), or the size that
``--model`` names. The batch is one utterance of four seconds or, for some variants, four of ten seconds, and one thread
is used. Each variant runs in a process of its own in every round, so that other load on the machine affects all
variants alike. Rows ``{variant, checkpointing, batch, parameters, parameter_bytes, peak_rss_bytes, step_seconds_median,
speed_ratio}``: the peak is that of the process above its level after the imports, and the ratio is the median over
rounds of the time of ``fp32`` at the same batch divided by that of the variant; a value above 1 is faster. The speed
under autocast, relative to FP32 under autocast, is the quotient of their two ratios. The file names the processor.

A second table shows how the cost grows with size: stacks of linear layers of hidden sizes 256 to 2048.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fedomc
from benchmarks.workers import try_worker
from fedomc._torch import processor_name

VARIANTS = {
    "fp32": "backward, then a step of SGD",
    "fp32-in-backward": "each variable stepped, its gradient dropped, in backward",
    "fp32-autocast": "forward under autocast to bfloat16",
    "bf16": "parameters in bfloat16",
    "torchao-int8": "int8 per row, stochastic rounding",
    "S1E4M14": "90 % of the weights",
    "S1E3M7": "90 % of the weights",
    "S1E3M7-autocast": "90 % of the weights, forward under autocast to bfloat16",
    "S1E4M3": "90 % of the weights",
    "S1E2M3": "90 % of the weights",
    "S1E2M3+S1E2M1": "all weights, base and update",
}
IN_TABLE_OF_SIZES = ("fp32", "fp32-in-backward", "S1E3M7", "S1E2M3+S1E2M1")
IN_TABLE_OF_BATCHES = ("fp32", "S1E3M7", "S1E2M3", "S1E2M3+S1E2M1")
SIZES = (256, 512, 1024, 2048)
LAYERS = 8
LEARNING_RATE = 1e-3
FRAMES = {1: 400, 4: 1000}  # of each utterance, by the size of the batch
TOKENS, VOCABULARY = 40, 1024


def main() -> None:
    """Run all variants in turn, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--rounds", type=int, default=5, help="how often each variant runs")
    parser.add_argument("--steps", type=int, default=4, help="measured steps of a run, after one that is not")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="fp32 always runs")
    parser.add_argument("--no-sizes", action="store_true", help="without the second table")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="hidden sizes of the second table")
    parser.add_argument("--model", default="large", help="size of the application's model: large or tiny")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(run(**json.loads(options.worker), steps=options.steps, size=options.model)))
        return
    variants = list(dict.fromkeys(("fp32", *options.variants)))
    large = [{"variant": v, "checkpointing": c, "batch": 1} for c in (False, True) for v in variants]
    large += [{"variant": v, "checkpointing": False, "batch": 4} for v in variants if v in IN_TABLE_OF_BATCHES]
    stacks = [{"variant": v, "hidden": h} for h in options.sizes for v in variants if v in IN_TABLE_OF_SIZES]
    jobs = large + ([] if options.no_sizes else stacks)
    print(f"{len(jobs)} set-ups x {options.rounds} rounds, 5 to 15 seconds each, up to 2.5 GB of memory", flush=True)
    given = ("--steps", str(options.steps), "--model", options.model)
    runs: dict[str, list[dict[str, Any] | None]] = {json.dumps(job): [] for job in jobs}
    for number in range(1, options.rounds + 1):
        for job in jobs:
            key = json.dumps(job)
            runs[key].append(try_worker(key, "benchmarks.training", *given, "--worker", key))
        print(f"round {number} of {options.rounds} done", flush=True)
        rows = [found for job in jobs if (found := row(job, runs))]
        if options.json:  # after each round: a run may be stopped
            settings = {"processor": processor_name(), "rounds": number, "model": options.model}
            options.json.write_text(json.dumps({**settings, "rows": rows}, indent=2))
    for line in table(rows, options.model):
        print(line)


def row(job: dict[str, Any], runs: dict[str, list[dict[str, Any] | None]]) -> dict[str, Any] | None:
    """Sum up the runs of a set-up, against those of fp32 in the same rounds; None if there were none."""
    both = zip(runs[json.dumps(job)], runs[json.dumps({**job, "variant": "fp32"})], strict=True)
    pairs = [(a, b) for a, b in both if a and b]
    if not pairs:
        return None
    mine, fp32 = zip(*pairs, strict=True)
    seconds = [one["step_seconds"] for one in mine]
    return {
        **job,
        "parameters": mine[0]["parameters"],
        "parameter_bytes": mine[0]["parameter_bytes"],
        "peak_rss_bytes": statistics.median(one["peak_rss_bytes"] for one in mine),
        "step_seconds_median": statistics.median(seconds),
        "speed_ratio": statistics.median(b["step_seconds"] / a for a, b in zip(seconds, fp32, strict=True)),
        "parameter_ratio": mine[0]["parameter_bytes"] / fp32[0]["parameter_bytes"],
        "peak_ratio": statistics.median(
            a["peak_rss_bytes"] / b["peak_rss_bytes"] for a, b in zip(mine, fp32, strict=True)
        ),
    }


def table(rows: list[dict[str, Any]], model: str) -> Iterator[str]:
    """Give the lines of both tables."""
    yield f"{'':<34} {'parameters':>18} {'peak':>16} {'step':>9} {'speed':>7}"
    for r in rows:
        name = f"linear {r['hidden']}" if "hidden" in r else "checkpointed" if r["checkpointing"] else model
        name += f" x{r['batch']}" if r.get("batch", 1) > 1 else ""
        yield (
            f"{name:<15}{r['variant']:<19} {r['parameter_bytes'] / 1e6:>8.1f} MB {r['parameter_ratio']:>6.1%} "
            f"{r['peak_rss_bytes'] / 1e6:>7.0f} MB {r['peak_ratio']:>5.0%} {r['step_seconds_median']:>7.3f} s "
            f"{r['speed_ratio']:>6.2f}x"
        )


# ---- one variant, in its own process -------------------------------------------------------------------------------


def run(
    variant: str, steps: int, checkpointing: bool = False, hidden: int = 0, batch: int = 1, size: str = "large"
) -> dict[str, Any]:
    """Train a few steps; report the median time of one and the peak of memory."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    step, parameters, held, start = prepare(variant, checkpointing, hidden, size, batch)
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return {
        "step_seconds": statistics.median(seconds[1:]),
        "peak_rss_bytes": memory("VmHWM") - start,
        "parameters": parameters,
        "parameter_bytes": held,
    }


def prepare(
    variant: str, checkpointing: bool, hidden: int, size: str, utterances: int
) -> tuple[Callable[[], None], int, int, int]:
    """Build the model and its step; give also the count and bytes of its parameters and the memory before them."""
    if hidden:
        with torch.device("meta"):
            model: nn.Module = nn.Sequential(*(nn.Linear(hidden, hidden) for _ in range(LAYERS)))
        batch = torch.randn(32, hidden)
    else:
        from fedomc_speech.model import build

        model = build(size, VOCABULARY)
        if checkpointing:
            model.encoder.gradient_checkpointing_enable({"use_reentrant": False})
        lengths = torch.full((utterances,), FRAMES[utterances])
        batch = torch.randn(utterances, FRAMES[utterances], model.mels)
        targets = torch.randint(1, VOCABULARY, (utterances, TOKENS))
    if variant == "torchao-int8":
        from torchao.prototype.quantized_training import int8_weight_only_quantized_training
        from torchao.quantization import quantize_

    start = memory("VmRSS")
    autocast, variant = variant.endswith("-autocast"), variant.removesuffix("-autocast")
    dtype = torch.bfloat16 if variant == "bf16" else torch.float32
    selection: dict[str, fedomc.Encoding] = {}
    if variant.startswith("S1"):
        policy = fedomc.CompressionPolicy.parse(variant, fraction=1.0 if "+" in variant else 0.9)
        selection = policy.select(model)
    fedomc.materialize_(model.to(dtype), values(model), selection)
    if variant == "torchao-int8":
        quantize_(model, int8_weight_only_quantized_training())
    model.train()

    stepped = not (variant == "fp32" or variant == "bf16" or variant == "torchao-int8")
    optimizer = None
    if stepped:
        fedomc.step_in_backward(model, torch.optim.SGD, lr=LEARNING_RATE)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def loss() -> torch.Tensor:
        if hidden:
            return model(batch).square().mean()
        log_probabilities, frames = model(batch.to(dtype), lengths)
        # [T, B, vocabulary]; there is no CTC loss in bfloat16
        return nn.functional.ctc_loss(
            log_probabilities.transpose(0, 1).float(), targets, frames, torch.full((utterances,), TOKENS)
        )

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = loss()
        found.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step, sum(p.numel() for p in model.parameters()), sum(map(held, model.parameters())), start


def held(tensor: Any) -> int:
    """Count the bytes of a tensor or, of one that is made of others, theirs."""
    if isinstance(tensor, fedomc.CompressedTensor) or not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(held(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def values(model: Any) -> Iterator[tuple[str, Any]]:
    """Give values of a trained model's size for one parameter or buffer after the other; for tied ones once."""
    once = {id(tensor): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, tensor in once.values():
        if tensor.dim() > 1:
            yield name, torch.randn(tensor.shape).mul_(tensor[0].numel() ** -0.5).to(tensor.dtype)
        elif tensor.is_floating_point():
            yield name, torch.full(tensor.shape, float("weight" in name), dtype=tensor.dtype)
        else:
            yield name, torch.zeros(tensor.shape, dtype=tensor.dtype)


def memory(field: str) -> int:
    """Read a size of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
