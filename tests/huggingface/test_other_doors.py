"""What else is done with models of ``transformers``: it works on a packed model, or an error names the way out."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

import fedomc
from fedomc import CompressedTensor, CompressionPolicy, PolicyError
from fedomc.huggingface import OMCConfig, attach_quantizer

TOKENS = torch.arange(12).view(2, 6)
FORMAT = "S1E3M7"


def plain(*, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def packed_names(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, CompressedTensor)}


def values(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_activations_are_packed_with_gradient_checkpointing(packed: bool, reentrant: bool) -> None:
    model = fedomc.compress_(plain(), FORMAT) if packed else plain()
    tokens = torch.arange(128).view(1, 128)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected = gradients()
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    with fedomc.compress_activations(model, "INT8") as packing:
        found = gradients()
    layer_input = 4 * tokens.numel() * model.config.hidden_size
    assert packing.last.saved >= layer_input > packing.last.held / 2
    for name, gradient in expected.items():
        assert torch.linalg.norm(found[name] - gradient) < 0.02 * torch.linalg.norm(gradient), name


@pytest.mark.parametrize("format", [FORMAT, "S1E2M3/64+S1E2M1/64"])
def test_accelerate_trains_saves_its_state_and_goes_on_from_it(tmp_path: Path, format: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = fedomc.compress_(plain(), format)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    names = packed_names(model)

    def step() -> dict[str, torch.Tensor]:
        accelerator.backward(model(input_ids=TOKENS, labels=TOKENS).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return values(model)

    before = values(model)
    saved = step()
    assert names and packed_names(model) == names and all(not torch.equal(saved[x], before[x]) for x in names)
    accelerator.save_state(str(tmp_path), safe_serialization=False)
    expected = step()
    accelerator.load_state(str(tmp_path))
    assert packed_names(model) == names
    for found, wanted in ((values(model), saved), (step(), expected)):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("way", ["save_state", "save_model", "save_pretrained"])
def test_what_cannot_write_a_packed_model_says_what_can(tmp_path: Path, way: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(fedomc.compress_(plain(), FORMAT))
    with pytest.raises(
        RuntimeError,
        match=r"weight is compressed.*fedomc\.save_model.*decompress_.*attach_quantizer.*safe_serialization=False",
    ):
        if way == "save_pretrained":
            model.save_pretrained(tmp_path)
        elif way == "save_state":
            accelerator.save_state(str(tmp_path))
        else:
            accelerator.save_model(model, str(tmp_path))
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "selection", ["S1E3M7", "S1E2M3/64+S1E2M1/64", "S1E3M7@0.5", CompressionPolicy("S1E2M3/64", exclude=["*embed*"])]
)
def test_with_a_quantizer_attached_a_packed_model_is_saved(tmp_path: Path, selection: Any, tied: bool) -> None:
    model = attach_quantizer(fedomc.compress_(plain(tied=tied), selection))
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert packed_names(again) == packed_names(model)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert p.dtype is q.dtype and torch.equal(p.detach(), q.detach())
        if isinstance(p, CompressedTensor):
            assert p.encoding == q.encoding  # type: ignore[attr-defined]
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    "policy",
    [
        CompressionPolicy("S1E3M7", rounding="nearest"),
        CompressionPolicy("S1E3M7", transform="affine"),
        CompressionPolicy("S1E3M7", format_by_name={"lm_head*": "S1E2M3/64"}),
    ],
)
def test_what_a_configuration_does_not_describe_is_refused(policy: CompressionPolicy) -> None:
    model = fedomc.compress_(plain(), policy)
    with pytest.raises(PolicyError, match=r"weight is Encoding.*describe it as.*fedomc\.save_model"):
        attach_quantizer(model)
    assert getattr(model, "hf_quantizer", None) is None
    with pytest.raises(PolicyError, match="no parameter of the model is compressed"):
        attach_quantizer(plain())


def test_what_is_not_packed_as_the_configuration_says_is_not_saved(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path / "plain")
    cls = transformers.LlamaForCausalLM
    model = cls.from_pretrained(tmp_path / "plain", quantization_config=OMCConfig(FORMAT))
    fedomc.decompress_(model, ["lm_head*"])
    with pytest.raises(PolicyError, match=r"lm_head\.weight is dense, but S1E3M7 in.*attach_quantizer.*dequantize"):
        model.save_pretrained(tmp_path / "refused")
    attach_quantizer(model).save_pretrained(tmp_path / "partly")
    again = cls.from_pretrained(tmp_path / "partly")
    assert packed_names(again) == packed_names(model) and "lm_head.weight" not in packed_names(again)
    fedomc.compress_(fedomc.decompress_(model), "S1E2M3/64")
    with pytest.raises(PolicyError, match=r"embed_tokens\.weight is S1E2M3/64, but S1E3M7 in"):
        model.save_pretrained(tmp_path / "refused")
    model.dequantize()
    model.save_pretrained(tmp_path / "dense")
    assert not packed_names(cls.from_pretrained(tmp_path / "dense"))


@pytest.mark.parametrize("count", [100, 140])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_resized_when_they_are_dense(tmp_path: Path, count: int, tied: bool) -> None:
    plain(tied=tied).save_pretrained(tmp_path / "plain")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=OMCConfig(FORMAT))
    before, names = values(model), packed_names(model)
    with pytest.raises(RuntimeError, match=r"embed_tokens\.weight is compressed.*decompress_"):
        model.resize_token_embeddings(count)
    assert packed_names(model) == names and model.get_input_embeddings().num_embeddings == 128

    resized = ["*embed_tokens*"] if tied else ["*embed_tokens*", "lm_head*"]
    fedomc.decompress_(model, resized).resize_token_embeddings(count)
    policy = CompressionPolicy(CompressionPolicy.parse(FORMAT).format, include=resized)
    fedomc.compress_(model, policy)
    assert packed_names(model) == names
    for name, p in model.named_parameters():
        both = min(len(p), len(before[name]))
        torch.testing.assert_close(p.detach()[:both], before[name][:both], rtol=2**-7, atol=1e-3)
    model.save_pretrained(tmp_path / "packed")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits) and model(TOKENS).logits.shape[-1] == count
