"""The models: the embedded one, and whatever ``transformers`` reads from a folder or a GGUF file."""

import functools
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import init_empty_weights
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

import fedomc
from fedomc.huggingface import OMCConfig
from fedomc_llm.errors import ModelError
from fedomc_llm.settings import FP32

logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a run shows its own

ADAPTERS = "*lora_*"
"""The name pattern of adapters."""


def embedded() -> nn.Module:
    """Return the embedded model, a Llama of about 0.9 M random parameters whose tokens are bytes."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the bytes of UTF-8."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False
    )


@functools.lru_cache(maxsize=2)
def tokenizer(path: str) -> Any:
    """Read the tokenizer of a model.

    Raises:
        ModelError: there is none.
    """
    return _read(AutoTokenizer.from_pretrained, path)


def skeleton(path: str) -> nn.Module:
    """Build a model without values, for ``install`` to fill: its parameters are on the meta device, its buffers real.

    Raises:
        ModelError: the path is neither a model's folder nor a GGUF file.
    """
    with init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            _config(path), dtype=torch.float32
        )
    model.tie_weights()  # type: ignore[operator]  # each parameter was moved by itself
    return model


def load(path: str, format: str = FP32) -> nn.Module:
    """Read a model in FP32, or packed: a folder's tensors one by one, while a GGUF file is first read as a whole.

    Args:
        path: a model's folder, which may hold it packed in the same format, or a GGUF file.
        format: in which the model is held.

    Raises:
        ModelError: the path is neither, or the model there is packed in another format.
    """
    packed = getattr(_config(path), "quantization_config", None)
    if packed is not None and _format_of(packed) != format:
        raise ModelError(
            f"model={path} is packed in {_format_of(packed) or packed}, not {format}: name a folder with the model in "
            f"FP32 or bfloat16, or fine-tune adapters on it as lora:{_format_of(packed)}"
        )
    options: dict[str, Any] = {"dtype": torch.float32}
    if format != FP32 and packed is None and not Path(path).is_file():
        options["quantization_config"] = OMCConfig(format)
    model: nn.Module = _read(AutoModelForCausalLM.from_pretrained, path, **options)
    if Path(path).is_file():
        # transformers has decoded it, but still takes it for quantized, and would refuse to save it
        model.hf_quantizer = None  # type: ignore[assignment]
        del model.config.quantization_config  # type: ignore[union-attr]
        if format != FP32:
            fedomc.compress_(model, format)
    return model


def adapted(path: str, format: str, rank: int, targets: str, seed: int) -> nn.Module:
    """Read a frozen base model and add adapters, whose first values depend on the seed.

    Raises:
        ModelError: the model cannot be read, or has no layers of these names.
    """
    return with_adapters(load(path, format), rank, targets, seed)


def with_adapters(base: nn.Module, rank: int, targets: str, seed: int) -> nn.Module:
    """Freeze a model and add adapters.

    Raises:
        ModelError: the model has no layers of these names.
    """
    torch.manual_seed(seed)
    layers = targets if targets == "all-linear" else targets.split()
    try:
        return peft.get_peft_model(
            base, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, task_type="CAUSAL_LM")
        )
    except ValueError as error:
        raise ModelError(f"targets={targets!r}: {error}") from None


def fp32_bytes(path: str) -> int:
    """Return the bytes of a model's parameters in FP32.

    Raises:
        ModelError: as for ``skeleton``.
    """
    return fedomc.parameter_bytes(skeleton(path)).fp32


def _config(path: str) -> Any:
    return _read(AutoConfig.from_pretrained, path)


def _format_of(packed: Any) -> str | None:
    values = packed if isinstance(packed, dict) else packed.to_dict()
    return values.get("format") if values.get("quant_method") == "fedomc" else None


def _read(reader: Any, path: str, **options: Any) -> Any:
    """Let ``transformers`` read something from a folder or a GGUF file, never from the network."""
    place = Path(path).expanduser()
    options["local_files_only"] = True
    if place.is_file():
        place, options["gguf_file"] = place.parent, place.name
    if not place.is_dir():
        raise ModelError(f"model={path!r} does not exist on this node: name a model's folder or a GGUF file")
    try:
        return reader(place, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model={path!r} cannot be read: {' '.join(str(error).split())}") from None
