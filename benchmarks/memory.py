"""What a training step takes at the batches that people train with: peak memory, time, and the gradient's error.

    python -m benchmarks.memory [--json out.json] [--rounds 3] [--steps 3] [--models large gpt2] [--batches 1x4 4x10]
        [--variants fp32 ...]

``large`` is the application's FastConformer-Large (about 115 M parameters, CTC head), for which a batch ``4x10`` is
four utterances of ten seconds; ``gpt2`` is a transformer of GPT-2's size (124 M parameters, random weights), for which
``4x512`` is four sequences of 512 tokens. There is one thread. Each variant runs in a process of its own, again in
every round, so that what else the machine does falls on all of them.

Rows ``{model, variant, batch, seconds, tokens, parameters, activations, optimizer, checkpointing, head_slice,
parameter_bytes, peak_rss_bytes, predicted_bytes, step_seconds_median, peak_ratio, speed_ratio, gradient_error}``: the
peak is that of the process above its level after the imports; what ``fedomc.plan`` predicts of it is None for variants
that it does not plan. The ratios are medians over rounds, to FP32 with the same optimizer at the same batch (peak: less
is better, speed: more is better). Times are processor time of the thread. The error of the gradient is the norm of its
difference to the gradient with exact activations, relative to the norm of that, for the same parameters and dropout;
None without packed ones. The file names the processor, and grows by a row at a time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fedomc
from benchmarks.training import LEARNING_RATE, held, memory, values
from benchmarks.workers import try_worker
from fedomc._torch import processor_name

Job = tuple[str, str, str]
"""A model, a batch and a variant."""

FP32, EIGHT_BITS, FOUR_BITS = "FP32", "S1E4M3", "INT4"
STATE = "S1E4M3/64"
SGD, ADAMW, TORCHAO_ADAMW, PACKED_ADAMW = "SGD", "AdamW", "AdamW (torchao, 8 bits)", f"AdamW ({STATE})"
FRAMES_PER_SECOND, TOKENS_PER_SECOND, VOCABULARY = 100, 3, 1024
CONFORMER, TRANSFORMER = ("large", "tiny"), ("gpt2", "gpt2-tiny")
BATCHES = {"large": ("1x4", "4x10", "8x15"), "tiny": ("2x4",), "gpt2": ("4x512",), "gpt2-tiny": ("2x64",)}
HEAD_SLICE = 256


@dataclass(frozen=True)
class Variant:
    """How a model is trained.

    Attributes:
        parameters: ``FP32``, a format, or ``int8 (torchao)``.
        activations: ``FP32``, ``BF16`` by autocast, or a format.
        optimizer: and the format of its state; SGD has none.
        checkpointing: whether each layer is computed again in the backward pass.
        head_slice: the tokens of a language model whose logits are in memory at a time; 0 is all.
        in_backward: whether each variable is stepped, and its gradient dropped, in the backward pass.
    """

    parameters: str = FP32
    activations: str = FP32
    optimizer: str = SGD
    checkpointing: bool = False
    head_slice: int = 0
    in_backward: bool = True

    @property
    def packs_activations(self) -> bool:
        """Whether activations are held as codes."""
        return self.activations not in (FP32, "BF16")

    @property
    def baseline(self) -> str:
        """The variant that this one is compared with: FP32 with the same optimizer."""
        return "fp32" if self.optimizer == SGD else "fp32-adamw"


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
    "fp32-adamw": Variant(optimizer=ADAMW, in_backward=False),
    "torchao-adamw": Variant(optimizer=TORCHAO_ADAMW, in_backward=False),
    "packed-adamw": Variant(optimizer=PACKED_ADAMW),
    "S1E3M7+8-packed-adamw": Variant("S1E3M7", EIGHT_BITS, PACKED_ADAMW),
}  # fmt: skip
SLICED = {
    f"{name}-sliced": replace(VARIANTS[name], head_slice=HEAD_SLICE) for name in ("fp32-adamw", "S1E3M7+8-packed-adamw")
}
"""Variants of language models, whose logits take more memory than all else."""
VARIANTS |= SLICED


def variants_of(model: str) -> list[str]:
    """List the variants that are measured by default."""
    if model in CONFORMER:
        return [name for name in VARIANTS if name not in SLICED]
    return [name for name, how in VARIANTS.items() if how.optimizer != SGD]


def main() -> None:
    """Run all variants in turn, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--rounds", type=int, default=3, help="how often each variant runs")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a run, after one that is not")
    parser.add_argument("--models", nargs="+", default=["large", "gpt2"], choices=BATCHES)
    parser.add_argument("--batches", nargs="+", help="utterances x seconds, or sequences x tokens")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="what they are compared with always runs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(run(**json.loads(options.worker))))
        return
    jobs = [
        (model, batch, name)
        for model in options.models
        for batch in options.batches or BATCHES[model]
        for name in with_baselines(options.variants or variants_of(model))
    ]
    print(f"{len(jobs)} set-ups x {options.rounds} rounds, up to 6 GB of memory", flush=True)
    runs: dict[Job, list[dict[str, Any] | None]] = {job: [] for job in jobs}
    for number in range(1, options.rounds + 1):
        for model, batch, name in jobs:
            job = {"model": model, "batch": batch, "variant": name, "steps": options.steps}
            found = trained(job)
            if found is not None and number == 1:
                found |= trained({**job, "steps": 0}) or {}
            runs[model, batch, name].append(found)
            print(f"round {number} of {options.rounds}: {model} {batch} {name}", flush=True)
            rows = [found for job in jobs if (found := row(job, runs))]
            if options.json:  # after each run: it may be stopped
                settings = {"processor": processor_name(), "rounds": number, "steps": options.steps}
                options.json.write_text(json.dumps({**settings, "rows": rows}, indent=2))
    for line in table(rows):
        print(line)


def with_baselines(names: list[str]) -> list[str]:
    """List variants after all that they are compared with."""
    return list(dict.fromkeys([*(VARIANTS[name].baseline for name in names), *names]))


def trained(job: dict[str, Any]) -> dict[str, Any] | None:
    """Run a set-up in a process of its own; None if it fails."""
    return try_worker(str(job), "benchmarks.memory", "--worker", json.dumps(job))


def row(job: Job, runs: dict[Job, list[dict[str, Any] | None]]) -> dict[str, Any] | None:
    """Sum up the runs of a set-up, against its baseline's in the same rounds; None if there were none."""
    model, batch, name = job
    pairs = [(a, b) for a, b in zip(runs[job], runs[model, batch, VARIANTS[name].baseline], strict=False) if a and b]
    if not pairs:
        return None
    size, length = map(int, batch.split("x"))
    how = asdict(VARIANTS[name])
    del how["in_backward"]
    return {
        "model": model,
        "variant": name,
        "batch": size,
        "seconds": length if model in CONFORMER else None,
        "tokens": length if model in TRANSFORMER else None,
        **how,
        "parameter_bytes": pairs[0][0]["parameter_bytes"],
        "peak_rss_bytes": statistics.median(a["peak_rss_bytes"] for a, _ in pairs),
        "step_seconds_median": statistics.median(a["step_seconds"] for a, _ in pairs),
        "peak_ratio": statistics.median(a["peak_rss_bytes"] / b["peak_rss_bytes"] for a, b in pairs),
        "speed_ratio": statistics.median(b["step_seconds"] / a["step_seconds"] for a, b in pairs),
        **{key: pairs[0][0].get(key) for key in ("gradient_error", "predicted_bytes")},
    }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Give the lines of the table."""
    yield (
        f"{'':<16} {'':<30} {'parameters':>10} {'peak':>15} {'predicted':>10} {'step':>9} {'speed':>7} "
        f"{'error of gradient':>18}"
    )
    for r in rows:
        error = "" if r["gradient_error"] is None else f"{r['gradient_error']:.2%}"
        predicted = "" if r["predicted_bytes"] is None else f"{r['predicted_bytes'] / 1e6:.0f} MB"
        yield (
            f"{r['model']:<7} {r['batch']}x{r['seconds'] or r['tokens']:<6} {r['variant']:<30} "
            f"{r['parameter_bytes'] / 1e6:>7.0f} MB {r['peak_rss_bytes'] / 1e6:>7.0f} MB {r['peak_ratio']:>4.0%} "
            f"{predicted:>10} {r['step_seconds_median']:>7.3f} s {r['speed_ratio']:>6.2f}x {error:>18}"
        )


# ---- one variant, in its own process -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a variant trains.

    Attributes:
        model: without values until ``prepare`` fills it.
        example: the arguments of its forward pass.
        loss: maps its output to a scalar.
    """

    model: nn.Module
    example: tuple[Tensor, ...]
    loss: Callable[[Any], Tensor]

    def compute(self, how: Variant) -> Tensor:
        """Run the forward pass, under autocast if the variant wants it, and return the loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=how.activations == "BF16"):
            output = self.model(*self.example)
        return self.loss(output)


def run(variant: str, batch: str, model: str, steps: int) -> dict[str, Any]:
    """Train a few steps and report time and memory; with no steps, the prediction and the error of the gradient."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    how = VARIANTS[variant]
    task = (conformer if model in CONFORMER else transformer)(model, batch, how)
    if not steps:
        found = {"predicted_bytes": predicted_bytes(task, how)} if how.in_backward else {}
        if how.packs_activations:
            prepare(task.model, how)
            found["gradient_error"] = gradient_error(task, how)
        return found
    start = prepare(task.model, how)
    step = stepper(task.model, how)
    taken = []
    with fedomc.compress_activations(task.model, how.activations) if how.packs_activations else nullcontext():
        for _ in range(steps + 1):
            began = time.thread_time()
            task.compute(how).backward()  # type: ignore[no-untyped-call]
            step()
            taken.append(time.thread_time() - began)
    return {
        "step_seconds": statistics.median(taken[1:]),
        "peak_rss_bytes": memory("VmHWM") - start,
        "parameter_bytes": sum(map(held, task.model.parameters())),
    }


def predicted_bytes(task: Task, how: Variant) -> int:
    """Predict the peak from shapes alone."""
    policy = how.parameters if how.parameters == FP32 else fedomc.CompressionPolicy.parse(f"{how.parameters}@0.9")
    plan = fedomc.plan(
        task.model, task.example, "1 TB", loss=task.loss, parameters=[policy], activations=[how.activations],
        state_formats=[STATE if how.optimizer == PACKED_ADAMW else FP32], checkpointing=False,  # or enabled already
        optimizer_class=torch.optim.SGD if how.optimizer == SGD else torch.optim.AdamW, lr=LEARNING_RATE,
    )  # fmt: skip
    return plan.chosen.peak_bytes


def stepper(model: nn.Module, how: Variant) -> Callable[[], object]:
    """Make what is called after each backward pass: a step, or nothing where variables are stepped in backward."""
    kind = torch.optim.SGD if how.optimizer == SGD else torch.optim.AdamW
    if how.in_backward:
        state_format = STATE if how.optimizer == PACKED_ADAMW else None
        fedomc.step_in_backward(model, kind, lr=LEARNING_RATE, state_format=state_format)
        return lambda: None
    if how.optimizer == TORCHAO_ADAMW:
        from torchao.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(model.parameters(), lr=LEARNING_RATE)
    else:
        optimizer = kind(model.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        # torchao's optimizer compiles its step, which takes a compiler of C++ and more memory than the step.
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def prepare(model: nn.Module, how: Variant) -> int:
    """Fill a model with values; return the memory before that."""
    if how.optimizer == TORCHAO_ADAMW:
        import torchao.optim  # noqa: F401
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
    return start


def conformer(size: str, batch: str, how: Variant) -> Task:
    """Make the task of the application's model."""
    from fedomc_speech.model import build

    utterances, seconds = map(int, batch.split("x"))
    model = build(size, VOCABULARY)
    if how.checkpointing:
        model.encoder.gradient_checkpointing_enable({"use_reentrant": False})
    features = torch.randn(utterances, FRAMES_PER_SECOND * seconds, model.mels)
    frames = torch.full((utterances,), features.shape[1])
    targets = torch.randint(1, VOCABULARY, (utterances, TOKENS_PER_SECOND * seconds))
    lengths = torch.full((utterances,), targets.shape[1])

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        log_probabilities, found = output
        return nn.functional.ctc_loss(log_probabilities.transpose(0, 1).float(), targets, found, lengths)

    return Task(model, (features, frames), loss)


def transformer(size: str, batch: str, how: Variant) -> Task:
    """Make the task of a model of GPT-2's architecture, whose loss is a part of it so that its head is packed too."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from fedomc_llm.training import loss_of

    sequences, length = map(int, batch.split("x"))
    small = {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 512} if size == "gpt2-tiny" else {}
    config = GPT2Config(**small, bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    if how.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(config.vocab_size, (sequences, length))

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: Tensor) -> Tensor:
            return loss_of(self.model, tokens, how.head_slice)

    return Task(Loss(), (tokens,), lambda loss: loss)


def gradient_error(task: Task, how: Variant) -> float:
    """Compare the gradients of one batch with exact and with packed activations, with the same dropout."""

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(1)
        task.model.zero_grad(set_to_none=True)
        task.compute(how).backward()  # type: ignore[no-untyped-call]
        return {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}

    exact = gradients()
    with fedomc.compress_activations(task.model, how.activations):
        packed = gradients()
    difference = sum(float((packed[name] - exact[name]).square().sum()) for name in exact)
    return float((difference / sum(float(each.square().sum()) for each in exact.values())) ** 0.5)


if __name__ == "__main__":
    main()
