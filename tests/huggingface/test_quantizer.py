"""Checkpoints are packed as they are read, saved packed, and read back bit for bit."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fedomc
from fedomc import CompressedTensor
from fedomc.errors import PayloadError, PolicyError
from fedomc.huggingface import OMCConfig
from tests.conftest import randn

TOKENS = {"input_ids": torch.arange(12).view(2, 6)}
SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "pad_token_id": 0}
VIT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
WHISPER = {
    "vocab_size": 128, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_mel_bins": 16,
    "max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0, "decoder_start_token_id": 1,
}  # fmt: skip
T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
ARCHITECTURES: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "BertModel": ({**SMALL, "intermediate_size": 96}, TOKENS),
    "RobertaForMaskedLM": ({**SMALL, "intermediate_size": 96}, TOKENS),
    "GPT2LMHeadModel": ({"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}, TOKENS),
    "LlamaForCausalLM": (LLAMA, TOKENS),
    "Gemma3ForCausalLM": ({**LLAMA, "head_dim": 16}, TOKENS),
    "T5ForConditionalGeneration": (T5, {**TOKENS, "decoder_input_ids": torch.arange(8).view(2, 4)}),
    "ViTModel": (VIT, {"pixel_values": randn(2, 3, 16, 16)}),
    "WhisperForConditionalGeneration": (
        WHISPER, {"input_features": randn(2, 16, 40), "decoder_input_ids": torch.arange(8).view(2, 4)}
    ),
    "MixtralForCausalLM": ({**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, TOKENS),
    "MambaForCausalLM": ({"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}, TOKENS),
}  # fmt: skip


def saved(name: str, path: Path, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """Save a small model in several files; return its class and a batch."""
    torch.manual_seed(0)
    cls, (options, batch) = getattr(transformers, name), ARCHITECTURES[name]
    cls(cls.config_class(**options)).to(dtype).save_pretrained(path, max_shard_size="100KB")
    return cls, {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**batch)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    cls, batch = saved(name, tmp_path / "plain", dtype)
    expected = fedomc.compress_(cls.from_pretrained(tmp_path / "plain"), "S1E3M7")
    packed = cls.from_pretrained(tmp_path / "plain", quantization_config=OMCConfig("S1E3M7"))
    for (key, p), q in zip(expected.named_parameters(), packed.parameters(), strict=True):
        assert type(p) is type(q) and p.dtype is q.dtype and torch.equal(p.detach(), q.detach()), key
    assert any(isinstance(p, CompressedTensor) and p.dtype is dtype for p in packed.parameters())
    assert torch.equal(output(packed, batch), output(expected, batch))
    packed.save_pretrained(tmp_path / "packed")
    again = cls.from_pretrained(tmp_path / "packed")
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["format"] == "S1E3M7"
    for (key, p), q in zip(packed.named_parameters(), again.parameters(), strict=True):
        assert type(p) is type(q) and p.dtype is q.dtype, key
        if isinstance(p, CompressedTensor):
            assert all(map(torch.equal, p.base.fields, q.base.fields)), key
    assert torch.equal(output(again, batch), output(packed, batch))


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    cls, _ = saved("LlamaForCausalLM", tmp_path / "plain", torch.float32)
    return cls.from_pretrained(tmp_path / "plain", quantization_config=OMCConfig("S1E2M3/64+S1E2M1/64"))


def test_a_packed_model_lies_in_its_file_and_training_does_not_change_it(tmp_path: Path) -> None:
    cls, _ = saved("LlamaForCausalLM", tmp_path / "plain", torch.float32)
    cls.from_pretrained(tmp_path / "plain", quantization_config=OMCConfig("S1E3M7")).save_pretrained(
        tmp_path / "packed"
    )
    [file] = (tmp_path / "packed").glob("*.safetensors")
    before = file.read_bytes()
    model = cls.from_pretrained(tmp_path / "packed")
    ranges = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(file.name)
    ]
    packed = [p for p in model.parameters() if isinstance(p, CompressedTensor)]
    assert packed and all(any(a <= p.base.codes.data_ptr() < b for a, b in ranges) for p in packed)
    values = [p.dequantize() for p in packed]
    fedomc.step_in_backward(model, torch.optim.SGD, lr=1.0)
    model(**TOKENS, labels=TOKENS["input_ids"]).loss.backward()
    assert not any(torch.equal(p.dequantize(), value) for p, value in zip(packed, values, strict=True))
    assert file.read_bytes() == before


def test_trained_variables_in_two_parts_are_not_saved_in_silence(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "before")
    fedomc.step_in_backward(llama, torch.optim.SGD, lr=0.1)
    llama(**TOKENS, labels=TOKENS["input_ids"]).loss.backward()
    with pytest.raises(PolicyError, match=r"embed_tokens\.weight has been trained in two parts.*save_model"):
        llama.save_pretrained(tmp_path / "after")


def test_a_dtype_that_is_not_compressed_is_refused_as_by_compress(tmp_path: Path) -> None:
    cls, _ = saved("BertModel", tmp_path, torch.float32)
    with pytest.raises(PolicyError, match=r"is torch\.float64, but only float32, bfloat16, float16 are compressed"):
        cls.from_pretrained(tmp_path, quantization_config=OMCConfig("S1E3M7"), dtype=torch.float64)


def test_a_misspelt_argument_is_an_error_and_a_further_entry_of_a_file_is_none() -> None:
    with pytest.raises(TypeError, match="exlude"):
        OMCConfig("S1E3M7", exlude=["lm_head*"])  # type: ignore[call-arg]
    stored = {**OMCConfig("S1E3M7", exclude=["lm_head*"]).to_dict(), "of_a_later_version": 1}
    assert OMCConfig.from_dict(stored).to_dict() == OMCConfig("S1E3M7", exclude=["lm_head*"]).to_dict()


def test_only_what_is_asked_for_is_packed(tmp_path: Path) -> None:
    cls, _ = saved("LlamaForCausalLM", tmp_path, torch.float32)
    config = OMCConfig("S1E3M7", exclude=["*embed_tokens*", "lm_head*"])
    model = cls.from_pretrained(tmp_path, quantization_config=config)
    packed = {name for name, p in model.named_parameters() if isinstance(p, CompressedTensor)}
    assert packed and not any("embed" in name or "lm_head" in name for name in packed)


def test_one_warning_names_what_the_format_cannot_hold(tmp_path: Path) -> None:
    cls, _ = saved("LlamaForCausalLM", tmp_path / "plain", torch.float32)
    plain = cls.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.mlp.up_proj.weight[0, 0] = 10.0
    plain.save_pretrained(tmp_path / "outliers", max_shard_size="100KB")
    with pytest.warns(
        UserWarning, match=r"S1E2M3 cannot hold 2 of \d+ variables.*layers\.[01]\.mlp\.up_proj"
    ) as caught:
        model = cls.from_pretrained(tmp_path / "outliers", quantization_config=OMCConfig("S1E2M3"))
    assert sum("cannot hold" in str(warning.message) for warning in caught) == 1
    model.save_pretrained(tmp_path / "packed")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*cannot hold")
        cls.from_pretrained(tmp_path / "packed")  # was told when it was packed
        cls.from_pretrained(tmp_path / "outliers", quantization_config=OMCConfig("S1E2M3/64"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[:-1], "bytes do not hold"),
        (lambda x: torch.cat((x[:-1], x[-1:] ^ 1)), "checksum"),
        (lambda x: torch.zeros(64, 64), "but should be packed"),
    ],
    ids=["cut off", "damaged", "dense"],
)
def test_a_spoiled_file_is_refused(llama: Any, tmp_path: Path, spoil: Any, message: str) -> None:
    llama.save_pretrained(tmp_path / "packed")
    path, name = tmp_path / "packed" / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        texts = file.metadata()
    save_file({**tensors, name: spoil(tensors[name])}, path, texts)
    with pytest.raises(PayloadError, match=rf"{name}.*{message}"):
        type(llama).from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_trains_and_saves_what_it_trained(tmp_path: Path, bf16: bool) -> None:
    cls, _ = saved("LlamaForCausalLM", tmp_path / "plain", torch.float32)
    model = cls.from_pretrained(tmp_path / "plain", quantization_config=OMCConfig("S1E3M7"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.arange(8) * 3
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, save_steps=2,
        max_grad_norm=1.0, learning_rate=1e-2, bf16=bf16, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": tokens, "labels": tokens}] * 8
    trainer = transformers.Trainer(model, arguments, train_dataset=data)  # type: ignore[arg-type]
    assert trainer.train().training_loss > 0
    for name, p in model.named_parameters():
        assert isinstance(p, CompressedTensor) is isinstance(before[name], CompressedTensor), name
        assert not torch.equal(p.detach(), before[name]), name
    again = cls.from_pretrained(tmp_path / "run" / "checkpoint-2")
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert type(p) is type(q) and torch.equal(p.detach(), q.detach()), name
