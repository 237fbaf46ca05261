"""What holding a pretrained language model in a format costs before any training: its perplexity and its bytes.

    python -m benchmarks.perplexity MODEL [--text FILE ...] [--formats S1E2M3/64 "NF4,*embed*=INT8" ...] [--json FILE]

MODEL is a folder in the layout of ``transformers`` or a GGUF file (``pip install gguf accelerate``); nothing is
downloaded. Without ``--text``, the texts are docstrings of SciPy. All weight matrices are held in the format, also
embeddings, except those that match a pattern behind a comma. The rows are ``{format, bits, ratio, perplexity,
perplexity_ratio}``: ``bits`` are those of a parameter, ``ratio`` is to the FP32 model's bytes, and ``perplexity_ratio``
to its perplexity.
"""

import argparse
import copy
import inspect
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import scipy.linalg
import scipy.optimize
import scipy.signal
import scipy.stats
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedomc

FP32 = "FP32"
FORMATS = ("S1E3M7", "INT8", "S1E4M3", "S1E2M3", "S1E2M3/64", "NF4", "NF4/32", "MXFP4", "NF4,*embed*=S1E2M3/64")
DOCUMENTED = (scipy.optimize.minimize, scipy.signal.butter, scipy.stats.ttest_ind, scipy.linalg.lstsq)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of transformers, or a GGUF file")
    parser.add_argument("--text", type=Path, nargs="+", help="files of text that the model was not trained on")
    parser.add_argument("--tokens", type=int, default=400, help="tokens of each text, from its beginning")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="FORMAT[,PATTERN=FORMAT ...]")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = loaded(options.model)
    texts = [file.read_text(encoding="utf-8") for file in options.text] if options.text else documentation()
    tokens = [tokenizer(text, return_tensors="pt").input_ids[:, : options.tokens] for text in texts]  # [1, T] each
    began = time.perf_counter()
    plain = perplexity(model, tokens)
    print(
        f"{sum(t.numel() for t in tokens)} tokens; {len(options.formats)} formats: about "
        f"{(time.perf_counter() - began) * len(options.formats) / 60:.0f} minutes",
        flush=True,
    )
    rows = []
    for row in measured(model, plain, tokens, options.formats):
        rows.append(row)
        print(
            f"{row['format']:<28} {row['bits']:>6.2f} bits {row['ratio']:>6.1%} of FP32  perplexity "
            f"{row['perplexity']:>8.3f}  {row['perplexity_ratio'] - 1:>+8.1%}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def loaded(path: Path) -> tuple[nn.Module, Any]:
    """Read a model in FP32 and its tokenizer."""
    if not path.exists():
        sys.exit(f"{path} does not exist: name a model's folder or a GGUF file")
    place: dict[str, Any] = {"local_files_only": True}
    folder = path
    if path.is_file():
        folder, place["gguf_file"] = path.parent, path.name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **place)
    return model.eval(), AutoTokenizer.from_pretrained(folder, **place)


def documentation() -> list[str]:
    """Return some of SciPy's docstrings."""
    return [inspect.getdoc(each) or "" for each in DOCUMENTED]


def perplexity(model: nn.Module, texts: Sequence[Tensor]) -> float:
    """Return the exponential of the mean loss of a token; each text is ``[1, T]``."""
    loss = count = 0.0
    with torch.no_grad():
        for tokens in texts:
            predicted = tokens.shape[1] - 1
            loss += float(model(tokens, labels=tokens).loss) * predicted
            count += predicted
    return math.exp(loss / count)


def measured(
    model: nn.Module, plain: float, texts: Sequence[Tensor], formats: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row for FP32 and for each format, one copy of the model at a time."""
    for name in (FP32, *formats):
        held = model if name == FP32 else fedomc.compress_(copy.deepcopy(model), policy_of(name))
        ratio = fedomc.parameter_bytes(held).ratio
        found = plain if name == FP32 else perplexity(held, texts)
        yield {
            "format": name, "bits": 32 * ratio, "ratio": ratio, "perplexity": found, "perplexity_ratio": found / plain,
        }  # fmt: skip


def policy_of(text: str) -> fedomc.CompressionPolicy:
    """Read ``FORMAT`` or ``FORMAT,PATTERN=FORMAT``."""
    formats, *exceptions = text.split(",")
    by_name = dict(exception.split("=") for exception in exceptions)
    return fedomc.CompressionPolicy.parse(formats, format_by_name=by_name)


if __name__ == "__main__":
    main()
