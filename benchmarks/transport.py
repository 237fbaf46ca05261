"""Measures the bytes between a server and a client of the application's large model, and the speed of encoding them.

    python -m benchmarks.transport [--json out.json] [--weights large.safetensors] [--rounds 7] [--model large]

The weights are those of FastConformer-Large (115 M parameters), or of the size that `--model` names, after some steps
of AdamW on the corpus `digits`, which the application synthesises: real features and a real loss, a few minutes on one
core. With `--weights` they are stored in a file and loaded from it the next time. For each format, a client is then
filled from a message, trains a few steps on one speaker's utterances and replies, with and without entropy coding. In
both directions every byte of frames and dense arrays is counted, including headers.

Rows `{format, unquantized_format, entropy_coding, direction, bytes, ratio, encode_mb_s, decode_mb_s, zstd_ratio}`: the
bytes of the whole payload and their share of the FP32 payload; the speeds of encoding (for the downlink with
transformation and quantization) and decoding, in MB of FP32 values per second; and the median over rounds of the time
of `zstd -1` on the FP32 bytes divided by that of encoding, measured in turn: a value above 1 is faster. The speeds are
those of the compressed variables of one encoder layer, on one thread. Rows of the uplink also have `change`, the norm
of the client's change relative to that of the weights. For comparison there are `zstd -1` and `gzip` of the FP32 bytes
and float16: NVFlare's filter if nvflare is installed, otherwise the cast that it performs.
"""

import argparse
import gzip
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

import fedomc
from fedomc.flower import collect, install
from fedomc.flower.arrays import STYPE, framed_array, packed_array, read_packed
from fedomc.flower.config import CONFIG, to_config
from fedomc.methods import Packed, encode
from fedomc.serialization import frame
from fedomc.serialization.uplink import UplinkConfig, reply_frame
from fedomc_speech import corpus, features, model
from fedomc_speech.corpus.base import Utterance
from fedomc_speech.tokens import Tokenizer, tokenizer_for

EXCLUDED = ("*.bias_u", "*.bias_v")
SPEED_LAYERS = {"large": "encoder.layers.5.", "tiny": "encoder.layers.1."}
"""The layer of each model whose variables are timed."""
BATCH = 4

Operation = Callable[[], object]


@dataclass(frozen=True)
class Way:
    """One of the formats that are measured."""

    format: str
    fraction: float = 0.9
    unquantized_format: str | None = None

    @property
    def policy(self) -> fedomc.CompressionPolicy:
        """How it compresses."""
        return fedomc.CompressionPolicy.parse(self.format, fraction=self.fraction, exclude=EXCLUDED)


WAYS = (
    Way("S1E4M14"),
    Way("S1E3M7"),
    Way("S1E4M3"),
    Way("S1E2M3"),
    Way("S1E2M3+S1E2M1", 1.0),
    Way("S1E3M7>S1E2M1"),
    Way("S1E3M7>DRIVE2"),
    Way("S1E3M7>DRIVE1"),
    Way("S1E2M3+S1E2M1>DRIVE1", 1.0),
    Way("S1E3M7", unquantized_format="S1E5M10"),
    Way("S1E3M7", unquantized_format="S1E8M23"),
)


def main() -> None:
    """Train, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--weights", type=Path, help="file of the trained weights; made if it is not there")
    parser.add_argument("--steps", type=int, default=100, help="of the training")
    parser.add_argument("--client-steps", type=int, default=4, help="of a client")
    parser.add_argument("--client-optimizer", choices=("Adam", "SGD"), default="Adam", help="of a client")
    parser.add_argument("--client-rate", type=float, default=1e-4, help="learning rate of a client")
    parser.add_argument("--formats", nargs="+", help="those to measure; all by default")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each speed")
    parser.add_argument("--model", choices=SPEED_LAYERS, default="large", help="size of the application's model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with corpus.progress_bar() as progress:
        loaded = corpus.load("digits", progress=progress)
    tokenizer = tokenizer_for(loaded)
    weights = trained(options, loaded, tokenizer)
    fp32 = sum(len(array.data) for array in collect(weights).values())
    print(f"{sum(p.numel() for p in weights.parameters()) / 1e6:.1f} M parameters, FP32 payload {fp32 / 1e6:.1f} MB")
    print(
        f"{'':<22}{'others':<9}{'coded':<10}{'':<6}{'bytes':>14}{'of FP32':>10}"
        f"{'encode':>13}{'decode':>13}{'against zstd -1':>17}"
    )
    prefix = SPEED_LAYERS[options.model]
    layer = [p.detach() for name, p in weights.named_parameters() if name.startswith(prefix) and p.dim() > 1]
    baseline = Baseline([as_bytes(value) for value in layer], options.rounds, prefix)
    rows = []
    for row in peers(weights, layer, baseline, fp32):
        rows.append(row)
        show(row)
    share = corpus.split(loaded.train, "speaker")[0]
    client = Client(
        share, tokenizer, options.client_optimizer, options.client_rate, options.client_steps, options.model
    )
    for way in (way for way in WAYS if not options.formats or way.format in options.formats):
        for row in measured(way, weights, client, baseline, fp32):
            rows.append(row)
            show(row)
    check(rows)
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key not in ("json", "weights")}
        options.json.write_text(json.dumps({"settings": settings, "fp32_bytes": fp32, "rows": rows}, indent=2))


def show(row: dict[str, Any]) -> None:
    """Print a line of the table."""
    print(
        f"{row['format']:<22}{row['unquantized_format']:<9}"
        f"{'yes' if row['entropy_coding'] else 'no':<10}{row['direction']:<6}"
        f"{row['bytes']:>14,}{row['ratio']:>10.2%}{row['encode_mb_s']:>8.0f} MB/s{row['decode_mb_s']:>8.0f} MB/s"
        f"{row['zstd_ratio']:>16.2f}x" + (f"   changed {row['change']:.2%}" if "change" in row else ""),
        flush=True,
    )


def check(rows: list[dict[str, Any]]) -> None:
    """Check what must hold on any machine: entropy coding makes nothing larger."""
    plain = {key(row): row["bytes"] for row in rows if not row["entropy_coding"]}
    for row in rows:
        assert row["bytes"] <= plain.get(key(row), row["bytes"]), row


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """Tell rows apart but for entropy coding."""
    return row["format"], row["unquantized_format"], row["direction"]


# ---- training -------------------------------------------------------------------------------------------------------


def trained(options: argparse.Namespace, loaded: corpus.Corpus, tokenizer: Tokenizer) -> model.SpeechModel:
    """Give the trained model: from the file of weights, or trained now."""
    if options.weights and options.weights.exists():
        network = model.build(options.model, tokenizer.vocab_size)
        print(f"weights from {options.weights}")
        return fedomc.load_model(network, options.weights)  # type: ignore[return-value]
    network = model.build(options.model, tokenizer.vocab_size, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4, fused=True)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    began, losses = time.monotonic(), []
    for step, loss in enumerate(batches(network, loaded.train, tokenizer, options.steps), 1):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        losses.append(float(loss.detach()))
        if step % 10 == 0:
            rate = (time.monotonic() - began) / step
            print(
                f"step {step} of {options.steps}, loss {statistics.mean(losses[-10:]):.2f}, "
                f"{rate * (options.steps - step):.0f} s to go",
                flush=True,
            )
    if options.weights:
        fedomc.save_model(network, options.weights)
    return network


def batches(
    network: model.SpeechModel, utterances: tuple[Utterance, ...], tokenizer: Tokenizer, steps: int
) -> Iterator[Tensor]:
    """Give the loss of one batch after the other, the same in every run."""
    order = list(utterances)
    random.Random(0).shuffle(order)  # noqa: S311
    torch.manual_seed(0)
    network.train()
    for step in range(steps):
        chosen = [order[(step * BATCH + i) % len(order)] for i in range(BATCH)]
        ready = features.pad([features.log_mel(utterance.audio(), network.mels) for utterance in chosen])
        yield network.ctc_loss(ready.features, ready.frames, [tokenizer.encode(u.text) for u in chosen])


@dataclass(frozen=True)
class Client:
    """Who trains what it was sent."""

    utterances: tuple[Utterance, ...]
    tokenizer: Tokenizer
    optimizer: str
    rate: float
    steps: int
    model: str

    def train(self, network: model.SpeechModel) -> None:
        """Train in place, compressed as it is."""
        stepping = fedomc.step_in_backward(network, getattr(torch.optim, self.optimizer), lr=self.rate)
        for loss in batches(network, self.utterances, self.tokenizer, self.steps):
            loss.backward()
        stepping.remove()


# ---- ours -----------------------------------------------------------------------------------------------------------


def measured(
    way: Way, weights: model.SpeechModel, client: Client, baseline: "Baseline", fp32: int
) -> Iterator[dict[str, Any]]:
    """Send a model to a client and back, with and without entropy coding."""
    packed = {zipped: message(way, weights, zipped) for zipped in (False, True)}
    network = model.build(client.model, weights.head.out_features)
    install(network, packed[True])
    client.train(network)
    change = changed(weights, network)
    for zipped, down in packed.items():
        up = collect(network, down)
        common = {
            "format": way.format,
            "fraction": way.fraction,
            "unquantized_format": way.unquantized_format or "FP32",
            "entropy_coding": zipped,
        }
        for direction, arrays in (("down", down["arrays"]), ("up", up)):
            size = sum(len(array.data) for array in arrays.values())
            speeds = speed(direction, way, weights, network, packed[zipped], zipped, baseline)
            row = {**common, "direction": direction, "bytes": size, "ratio": size / fp32, **speeds}
            yield {**row, "change": change} if direction == "up" else row


def message(way: Way, weights: model.SpeechModel, zipped: bool) -> RecordDict:
    """Put a payload together as ``OMCStrategy`` does, for one client."""
    policy, arrays = way.policy, collect(weights)
    selection = policy.select(weights, round=1, client=0)
    unquantized_format = None if way.unquantized_format is None else fedomc.FloatFormat.parse(way.unquantized_format)
    others = policy.compressible(weights) if unquantized_format is not None else {}
    record = ArrayRecord()
    for name, array in arrays.items():
        values = torch.from_numpy(array.numpy())
        if name in selection:
            assert isinstance(policy.format, fedomc.FloatFormat)
            array = packed_array(encode(values, policy.format), tuple(values.shape), entropy_coding=zipped)
        elif name in others and unquantized_format is not None:
            array = packed_array(
                encode(values, unquantized_format), tuple(values.shape), frame.DENSE, entropy_coding=zipped
            )
        record[name] = array
    how = to_config(
        policy.encoding(round=1, client=0),
        entropy_coding=zipped,
        unquantized_format=unquantized_format,
        unquantized=selection.unquantized if policy.uplink is not None and unquantized_format is None else (),
    )
    return RecordDict({"arrays": record, CONFIG: how})


def changed(before: model.SpeechModel, after: model.SpeechModel) -> float:
    """Return how large the client's change is: the norm of all updates by that of all weights."""
    moved = total = 0.0
    sent = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        if isinstance(parameter, fedomc.CompressedTensor):
            old = sent[name].detach()
            if parameter.update is not None:
                step = parameter.update.decode(torch.empty(parameter.numel()))
            else:
                rounded = encode(old, parameter.base.method).decode(torch.empty(parameter.numel()))
                step = parameter.base.decode(torch.empty(parameter.numel())) - rounded
            moved += float(step.double().square().sum())
            total += float(old.double().square().sum())
    return (moved / total) ** 0.5


def speed(
    direction: str, way: Way, weights: model.SpeechModel, network: model.SpeechModel, sent: RecordDict, zipped: bool,
    baseline: "Baseline",
) -> dict[str, float]:  # fmt: skip
    """Measure the compressed variables of one layer: values to bytes down, packed codes to bytes up, and back."""
    arrays: Mapping[str, Array] = sent["arrays"]  # type: ignore[assignment]
    trained_, values = dict(network.named_parameters()), dict(weights.named_parameters())
    names = [name for name in arrays if name.startswith(baseline.prefix) and arrays[name].stype == STYPE]
    names = [name for name in names if isinstance(trained_[name], fedomc.CompressedTensor)]
    known = {name: read_packed(arrays[name], name, copy=False).packed for name in names}
    assert isinstance(way.policy.format, fedomc.FloatFormat)
    fmt, asked = way.policy.format, UplinkConfig(way.policy.encoding(round=1, client=0), zipped)

    def down() -> dict[str, Array]:
        shapes = {name: tuple(values[name].shape) for name in names}
        return {n: packed_array(encode(values[n], fmt), shapes[n], entropy_coding=zipped) for n in names}

    def up() -> dict[str, Array]:
        result = {}
        for name in names:
            p: Any = trained_[name]
            needed = p.update is None and (zipped or asked.uplink is not None)
            data = reply_frame(p, read_packed(arrays[name], name, copy=False) if needed else None, asked, name)
            assert data is not None
            result[name] = framed_array(data, tuple(p.shape))
        return result

    coded = {"down": down, "up": up}[direction]
    ready = coded()
    out = torch.empty(max(values[name].numel() for name in names))

    def back() -> list[Packed]:
        found = [
            read_packed(ready[n], n, copy=True, sent=known[n] if direction == "up" else None).packed for n in names
        ]
        if direction == "up":  # the server adds values up, a client keeps the codes
            for packed in found:
                packed.decode(out[: packed.numel])
        return found

    return baseline.speeds(coded, back, sum(values[name].nbytes for name in names))


# ---- speeds and peers -----------------------------------------------------------------------------------------------


class Baseline:
    """``zstd -1`` of the FP32 bytes of a layer, timed in turn with whatever is measured."""

    def __init__(self, data: list[bytes], rounds: int, prefix: str) -> None:
        self.prefix = prefix
        self._data, self._rounds = data, rounds
        self._size = sum(map(len, data))

    def encode(self) -> list[bytes]:
        """Compress each variable."""
        return [zstandard.ZstdCompressor(level=1).compress(data) for data in self._data]

    def speeds(self, coded: Operation, back: Operation, size: int) -> dict[str, float]:
        """Time both operations; ``size`` is that of their values in FP32."""
        times = [(timed(self.encode), timed(coded), timed(back)) for _ in range(self._rounds)]
        return {
            "encode_mb_s": size / 1e6 / statistics.median(encoding for _, encoding, _ in times),
            "decode_mb_s": size / 1e6 / statistics.median(decoding for _, _, decoding in times),
            "zstd_ratio": statistics.median(zstd / self._size * size / encoding for zstd, encoding, _ in times),
        }


def timed(operation: Operation) -> float:
    """Return the seconds of a call."""
    began = time.perf_counter()
    operation()
    return time.perf_counter() - began


def peers(weights: model.SpeechModel, layer: list[Tensor], baseline: Baseline, fp32: int) -> Iterator[dict[str, Any]]:
    """Measure what others do to the FP32 bytes."""
    whole = [value.detach() for value in weights.state_dict().values()]
    size = sum(value.nbytes for value in layer)
    ways: list[tuple[str, Callable[[Tensor], Any], Callable[[Any], Any]]] = [
        ("FP32", as_bytes, lambda data: np.frombuffer(data, np.float32).copy()),
        ("zstd -1", lambda x: zstandard.ZstdCompressor(level=1).compress(as_bytes(x)), zstandard.decompress),
        ("gzip", lambda x: gzip.compress(as_bytes(x), 6), gzip.decompress),
        float16(),
    ]
    for name, forth, back in ways:
        data = [forth(value) for value in layer]
        found = baseline.speeds(partial(list_of, forth, layer), partial(list_of, back, data), size)
        if name == "FP32":
            total = fp32
        else:
            total = sum(len(forth(value)) if value.is_floating_point() else value.nbytes for value in whole)
        common = {
            "format": name,
            "fraction": 1.0,
            "unquantized_format": "-",
            "entropy_coding": name in ("zstd -1", "gzip"),
        }
        yield {**common, "direction": "both", "bytes": total, "ratio": total / fp32, **found}


def float16() -> tuple[str, Callable[[Tensor], bytes], Callable[[bytes], Any]]:
    """Give NVFlare's filter for float16, or the cast that it makes."""

    def back(data: bytes) -> Any:
        return np.frombuffer(data, np.float16).astype(np.float32)

    try:
        from nvflare.apis.fl_context import FLContext
        from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer
    except ImportError as error:
        print(f"NVFlare's filter cannot be used ({error}): the plain cast to float16 serves")
        return "fp16 cast", lambda x: x.to(torch.float16).numpy().tobytes(), back
    quantizer = ModelQuantizer("float16")

    def forth(x: Tensor) -> bytes:
        values: Any = quantizer.quantization({"x": x.numpy()}, FLContext())[0]["x"]
        return bytes(values.tobytes())

    return "NVFlare fp16", forth, back


def list_of(operation: Callable[[Any], Any], inputs: list[Any]) -> list[Any]:
    """Apply an operation to each input."""
    return [operation(value) for value in inputs]


def as_bytes(values: Tensor) -> bytes:
    """Return the bytes of dense values."""
    return bytes(values.numpy().tobytes())


if __name__ == "__main__":
    main()
