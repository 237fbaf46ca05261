"""Models from folders: plain, packed, without values, with adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from typer.testing import CliRunner

import fedomc
from fedomc.flower import collect, install
from fedomc_llm import cli, models, pretraining, training
from fedomc_llm.errors import ModelError, RunStopped


def test_a_skeleton_that_is_filled_is_the_model(tiny: Path) -> None:
    model, skeleton = models.load(str(tiny)), models.skeleton(str(tiny))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    install(skeleton, RecordDict({"arrays": collect(model)}))
    tokens = torch.arange(32).view(2, 16)
    assert torch.equal(training.loss_of(skeleton, tokens), training.loss_of(model, tokens))
    assert models.fp32_bytes(str(tiny)) == sum(parameter.nbytes for parameter in model.parameters())


def test_a_base_is_packed_once_and_read_packed(tiny: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["pack", str(tiny), str(tmp_path / "packed"), "--format", "S1E2M3/64"])
    assert done.exit_code == 0 and "% of FP32" in done.output, done.output
    places = (str(tiny), str(tmp_path / "packed"))
    assert len({fedomc.base_digest(models.adapted(place, "S1E2M3/64", 4, "q_proj", 0)) for place in places}) == 1
    assert models.tokenizer(places[1]).decode(models.tokenizer(places[0])("to be")["input_ids"]) == "to be"
    with pytest.raises(ModelError, match="packed in S1E2M3/64, not FP32"):
        models.load(places[1])


@pytest.mark.parametrize("targets", ["q_proj v_proj", "all-linear"])
def test_adapters_alone_are_trained(tiny: Path, targets: str) -> None:
    model = models.adapted(str(tiny), "S1E2M3/64", 4, targets, 0)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 2 * (2 if targets != "all-linear" else 7) and all("lora_" in name for name in names)
    assert fedomc.parameter_bytes(model).total < 0.5 * models.fp32_bytes(str(tiny))


def test_what_cannot_be_read_is_named(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"missing' does not exist on this node"):
        models.load(str(tmp_path / "missing"))
    with pytest.raises(ModelError, match="cannot be read"):
        models.load(str(tmp_path))
    with pytest.raises(ModelError, match="targets='w_proj'"):
        models.adapted(str(tiny), "FP32", 4, "w_proj", 0)


def test_the_embedded_model_is_pretrained_once(tmp_path: Path) -> None:
    losses: list[float] = []
    folder = pretraining.prepared(tmp_path, 6, 0, lambda step, loss: losses.append(loss) or False)
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5
    assert pretraining.prepared(tmp_path, 6, 0, lambda step, loss: True) == folder  # it is there
    with pytest.raises(RunStopped):
        pretraining.prepared(tmp_path, 5, 0, lambda step, loss: True)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_the_embeddings_of_a_skeleton_are_tied_to_its_head_where_the_models_are(tiny: Path, tmp_path: Path) -> None:
    model = models.load(str(tiny))
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    skeleton = models.skeleton(str(tmp_path))
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight
    install(skeleton, RecordDict({"arrays": collect(models.load(str(tmp_path)))}))
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight
    assert models.fp32_bytes(str(tmp_path)) < models.fp32_bytes(str(tiny))


@pytest.mark.parametrize("format", ["FP32", "S1E4M3/64"])
def test_sliced_logits_give_the_same_loss_and_gradient(tiny: Path, format: str) -> None:
    model = models.adapted(str(tiny), format, 4, "all-linear", 0)
    sequences = torch.arange(60).view(2, 30)
    found = []
    for head_slice in (0, 7):
        model.zero_grad()
        loss = training.loss_of(model, sequences, head_slice)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(found[0], found[1])
    model.get_base_model().config.final_logit_softcapping = 30.0
    with pytest.raises(ModelError, match="head_slice=7"):
        training.loss_of(model, sequences, 7)


@pytest.mark.parametrize("lora", [False, True])
def test_training_learns_packed_and_activations_may_be_packed_too(tiny: Path, lora: bool) -> None:
    sequences = torch.randint(97, 101, (8, 32), generator=torch.Generator().manual_seed(0))
    options = {"steps": 6, "batch": 4, "learning_rate": 1e-2, "seed": 0}
    found = []
    for checkpointing, activations in ((False, ""), (True, ""), (False, "S1E4M3"), (True, "S1E4M3")):
        if lora:
            model = models.adapted(str(tiny), "S1E4M3/64", 4, "all-linear", 0)
        else:
            model = fedomc.compress_(models.load(str(tiny)))
        before, tokens = training.held_out_loss(model, sequences, 3)
        result = training.train_locally(
            model, sequences, **options, checkpointing=checkpointing, activations=activations
        )
        assert tokens == 8 * 31 and result.tokens == 6 * 4 * 31 and result.held_bytes > 0
        found.append(training.held_out_loss(model, sequences, 3)[0])
        assert found[-1] < before - 0.3
    assert found == pytest.approx([found[0]] * 4, rel=0.2)


@pytest.mark.parametrize("head_slice", [0, 7])
def test_activations_are_packed_with_sliced_logits_too(
    tiny: Path, head_slice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    handles, pack = [], fedomc.compress_activations

    def remembered(*arguments: Any) -> fedomc.PackedActivations:
        handles.append(pack(*arguments))
        return handles[-1]

    monkeypatch.setattr(fedomc, "compress_activations", remembered)
    model = models.adapted(str(tiny), "S1E4M3/64", 4, "all-linear", 0)
    options = {"steps": 1, "batch": 4, "learning_rate": 1e-2, "seed": 0, "activations": "S1E4M3"}
    training.train_locally(model, torch.randint(97, 101, (8, 32)), **options, head_slice=head_slice)
    [handle] = handles
    assert 0 < handle.last.held < handle.last.saved / 2
