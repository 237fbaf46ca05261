"""What fine-tuning a language model takes: peak memory, time, bytes, and the perplexity that it reaches.

    python -m benchmarks.finetune [--json out.json] [--model PATH] [--steps 8] [--variants lora:S1E2M3/64:S1E4M3/64 ...]

PATH is a model's folder or a GGUF file (``pip install gguf``), which is first written in each format, as the owner of a
model would; the default is the small model of ``apps/llm``. Each variant runs in a process of its own: it loads what
was written, trains on one role of Shakespeare with AdamW that steps in the backward pass, and measures the role's
held-out text. Rows ``{model, method, base_format, adapter_format, steps, loss, perplexity, peak_rss_bytes, peak_ratio,
step_seconds, speed_ratio, down_bytes, up_bytes, seed, perplexity_ratio}`` and the settings: the peak is that of the
process above its level after the imports; the ratios are to FP32 with the same method and seed (peak and perplexity:
less is better, speed: more is better); bytes are of a client's message down and up; the seed chooses the adapters'
first values and the batches. ``BF16`` is a model in bfloat16; ``bnb-nf4`` a base in four bits of bitsandbytes.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fedomc
from benchmarks.training import memory
from benchmarks.workers import try_worker
from fedomc._torch import processor_name
from fedomc.flower import collect
from fedomc.huggingface import attach_quantizer
from fedomc_llm import client, models, pretraining, texts, training
from fedomc_llm.settings import FP32, LORA, Variant

BF16, BNB = "BF16", "bnb-nf4"
ADAPTERS = "S1E4M3/64"
VARIANTS = (
    "full:FP32", "full:BF16", f"full:{fedomc.DEFAULT}",
    "lora:FP32", "lora:BF16", f"lora:INT8:{ADAPTERS}", f"lora:S1E4M3/64:{ADAPTERS}", f"lora:S1E2M3/64:{ADAPTERS}",
    f"lora:{BNB}",
)  # fmt: skip
ROLE = "hamlet"


def main() -> None:
    """Run all variants in turn, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--model", type=Path, help="folder of a model, or a GGUF file")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="FP32 of each method always runs")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each variant runs with each")
    parser.add_argument("--batch", type=int, default=2, help="sequences in a step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", default="all-linear", help="names of the layers that get adapters")
    parser.add_argument("--held-out", type=int, default=8, help="sequences that are measured")
    parser.add_argument("--head-slice", type=int, default=0, help="classes with logits in memory at a time; 0: all")
    parser.add_argument("--checkpointing", action="store_true", help="compute layers again in the backward pass")
    parser.add_argument("--activations", default="", help="format in which activations are held")
    parser.add_argument("--pretraining-steps", type=int, default=60, help="of the small model")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(run(**json.loads(options.worker))))
        return
    names = list(dict.fromkeys([f"{each.split(':')[0]}:{FP32}" for each in options.variants] + options.variants))
    given = ("steps", "batch", "length", "rank", "targets", "held_out", "head_slice", "checkpointing", "activations")
    settings = {name: getattr(options, name) for name in given}
    steps = f"{options.steps} steps of {options.batch}x{options.length} tokens"
    print(f"{len(names)} variants x {len(options.seeds)} seeds, each {steps}", flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = options.model or pretraining.prepared(Path(folder), options.pretraining_steps, 0)
        written = write_all(str(place), names, Path(folder))
        for seed, name in itertools.product(options.seeds, names):
            job = {"variant": name, "path": written[name.split(":")[1]], "seed": seed, **settings}
            if (found := in_process(job)) is None:
                continue
            found["seed"] = seed
            rows.append({"model": options.model.name if options.model else "embedded", **found, **settings})
            rows[-1] |= ratios(rows)
            print(line(name, rows[-1]), flush=True)
            if options.json:  # after each: a run may be stopped
                options.json.write_text(json.dumps({"processor": processor_name(), "rows": rows}, indent=2))


def write_all(path: str, names: list[str], folder: Path) -> dict[str, str]:
    """Write the model in each format that a variant needs, as a folder; return the folders."""
    written: dict[str, str] = {}
    for format in dict.fromkeys(name.split(":")[1] for name in names):
        dense = {FP32: torch.float32, BF16: torch.bfloat16, BNB: torch.float32}.get(format)
        if format == fedomc.DEFAULT or "+" in format or (dense is torch.float32 and Path(path).is_dir()):
            if Path(path).is_dir():
                written[format] = path  # packed as it is read
                continue
            dense = torch.float32
        kind = str(dense or format).replace("/", "_")
        written[format] = str(folder / kind)
        if not (folder / kind).exists():
            model = models.load(path, FP32 if dense is not None else format)
            (model.to(dense) if dense is not None else attach_quantizer(model)).save_pretrained(folder / kind)
            models.tokenizer(path).save_pretrained(folder / kind)
    return written


def in_process(job: dict[str, Any]) -> dict[str, Any] | None:
    """Run a variant in a process of its own; None if it fails, as it may for want of a package or of memory."""
    return try_worker(job["variant"], "benchmarks.finetune", "--worker", json.dumps(job))


def ratios(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Compare the last row with FP32 by the same method and of the same seed; None if that failed."""
    last = rows[-1]
    alike = (last["method"], last["seed"], FP32)
    fp32 = next((row for row in rows if (row["method"], row["seed"], row["base_format"]) == alike), None)
    if fp32 is None:
        return dict.fromkeys(("peak_ratio", "speed_ratio", "perplexity_ratio"))
    return {
        "peak_ratio": last["peak_rss_bytes"] / fp32["peak_rss_bytes"],
        "speed_ratio": fp32["step_seconds"] / last["step_seconds"],
        "perplexity_ratio": last["perplexity"] / fp32["perplexity"],
    }


def line(name: str, row: dict[str, Any]) -> str:
    """Return a row of the table."""
    more, peak, speed = (row[f"{key}_ratio"] for key in ("perplexity", "peak", "speed"))
    return (
        f"{name:<32} perplexity {row['perplexity']:>8.3f} {'' if more is None else f'{more - 1:+.1%}':>6}  "
        f"peak {row['peak_rss_bytes'] / 1e6:>7.0f} MB {'' if peak is None else f'{peak:.0%}':>4}  "
        f"step {row['step_seconds']:>7.3f} s {'' if speed is None else f'{speed:.2f}x':>6}  "
        f"down {row['down_bytes'] / 1e6:.2f} MB  up {row['up_bytes'] / 1e6:.2f} MB"
    )


# ---- one variant, in its own process -------------------------------------------------------------------------------


def run(
    variant: str, path: str, steps: int, batch: int, length: int, rank: int, targets: str, held_out: int,
    head_slice: int, checkpointing: bool, activations: str, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Load, train and measure."""
    torch.set_num_threads(1)
    method, base_format, *rest = variant.split(":")
    adapter_format = rest[0] if rest else FP32
    role = next(i for i, text in enumerate(texts.read()) if text.name == ROLE)
    trained, measured = client.tokenized("", path, length, held_out, role)
    start = memory("VmRSS")
    model = loaded(path, base_format)
    if method == LORA:
        model = models.with_adapters(model, rank, targets, seed=seed)
    began = time.thread_time()
    training.train_locally(
        model, trained, steps=steps, batch=batch, learning_rate=1e-3 if method == LORA else 1e-4, seed=seed,
        checkpointing=checkpointing, activations=activations, head_slice=head_slice,
    )  # fmt: skip
    seconds = (time.thread_time() - began) / steps
    peak = memory("VmHWM") - start
    loss, _ = training.held_out_loss(model, measured, batch, head_slice)
    down, up = message_bytes(model, method, adapter_format)
    return {
        "method": method, "base_format": base_format, "adapter_format": adapter_format, "steps": steps, "loss": loss,
        "perplexity": training.perplexity(loss), "peak_rss_bytes": peak, "step_seconds": seconds, "down_bytes": down,
        "up_bytes": up,
    }  # fmt: skip


def loaded(path: str, format: str) -> nn.Module:
    """Load a base model in FP32, bfloat16, four bits of bitsandbytes, or a format."""
    if format not in (BF16, BNB):
        return models.load(path, format)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if format == BNB:
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        options = {"dtype": torch.float32, "quantization_config": quantized, "device_map": "cpu"}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **options)
    return model


def message_bytes(model: nn.Module, method: str, adapter_format: str) -> tuple[int, int]:
    """Return the bytes of the arrays that a client with this model receives and sends."""
    policy = Variant(method, FP32, adapter_format).policy(0)
    if policy is not None:
        adapters = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        fedomc.compress_(model, policy.select(adapters))
    up = sum(len(array.data) for array in collect(model).values())
    packed = [p for p in model.parameters() if isinstance(p, fedomc.CompressedTensor) and p.update is not None]
    return up + sum(p.base.nbytes - (p.nbytes - p.base.nbytes) for p in packed), up


if __name__ == "__main__":
    main()
