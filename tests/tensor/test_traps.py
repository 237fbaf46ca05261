"""What models, autograd and the tools of torch do to parameters: the right result, or an error that names the way out.

The oracle is the plain model: with S1E8M23 every bit of what comes out is the same. Traps of ``step_in_backward``
alone, such as ``clip_grad_norm_`` after it, are in ``test_optim``; autocast is in ``test_ops``.
"""

import copy
import datetime
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn, optim
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from fedomc import CompressedTensor, NonFiniteError, decompress_, step_in_backward
from tests.conftest import (
    Twice,
    allocations,
    assert_same_parameters,
    compressed,
    dense,
    randn,
    run_processes,
    same_bits,
)

X = randn(2, 5, 8)
IDS = torch.tensor([[1, 2, 3], [0, 3, 3]])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.embedding(ids).tanh())


class Attention(nn.Module):
    """Multi-head attention; the same tensor for query, key and value, or not."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.attention, self.same = nn.MultiheadAttention(8, 2, batch_first=True), same

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.same else x.flip(1)
        return self.attention(x, other, other, need_weights=not self.same)[0]


class First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "two layers": (two_layers, X),
    "module called twice": (Twice, X),
    "tied weights": (Tied, IDS),
    "attention, q is k is v": (lambda: Attention(True), X),
    "attention, q is not k": (lambda: Attention(False), X),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), X),
    "lstm": (lambda: First(nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)), X),
    "gru": (lambda: First(nn.GRU(8, 6, 2, batch_first=True)), X),
}


def build(name: str = "two layers", format: str = "S1E8M23", **kwargs: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """Return a plain model, a compressed copy of it, and an input."""
    torch.manual_seed(0)
    make, x = MODELS[name]
    plain = make()
    return plain, compressed(plain, format, "none" if format == "S1E8M23" else "scaled-affine", **kwargs), x


def loss(model: nn.Module, x: Tensor, step: int = 0) -> Tensor:
    return model(x + step if x.is_floating_point() else x).square().sum()


def train(model: nn.Module, x: Tensor, steps: int = 3, make: Callable[..., optim.Optimizer] = optim.SGD) -> Tensor:
    """Train with an ordinary optimizer; return what the model gives then."""
    optimizer = make(model.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, x, step).backward()
        optimizer.step()
    return model(x)


def leaf(x: Tensor) -> Tensor:
    return x.clone().requires_grad_() if x.is_floating_point() else x


def assert_same_gradients(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert p.grad is not None and same_bits(p.grad, q.grad), name


def assert_compressed(model: nn.Module) -> None:
    assert all(isinstance(p, CompressedTensor) for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
class TestModels:
    def test_training(self, name: str) -> None:
        plain, packed, x = build(name)
        train(plain, x)
        train(packed, x)
        assert_same_parameters(plain, packed)
        assert_compressed(packed)

    def test_step_in_backward(self, name: str) -> None:
        plain, packed, x = build(name)
        train(plain, x)
        step_in_backward(packed, optim.SGD, lr=0.05)
        for step in range(3):
            loss(packed, x, step).backward()
        assert_same_parameters(plain, packed)

    def test_frozen_weights(self, name: str) -> None:
        plain, packed, x = build(name)
        before = copy.deepcopy(packed)
        for model in (plain, packed):
            for at, p in enumerate(model.parameters()):
                p.requires_grad_(at % 2 == 1)
            if name != "tied weights":  # which has one parameter, now frozen
                train(model, x)
            assert not [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
        assert_same_parameters(plain, packed)
        for p, q in zip(packed.parameters(), before.parameters(), strict=True):
            assert same_bits(dense(p), dense(q)) == (not p.requires_grad)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_evaluation_and_training_again(self, name: str, mode: Callable[[], Any]) -> None:
        """Some layers take another path in evaluation, such as the fused one of transformer layers."""
        plain, packed, x = build(name)
        outputs = []
        for model in (plain, packed):
            with mode():
                outputs.append(model.eval()(x).clone())
            train(model.train(), x)
        torch.testing.assert_close(*outputs)
        assert_same_parameters(plain, packed)

    def test_a_deep_copy_is_a_model_of_its_own(self, name: str) -> None:
        plain, packed, x = build(name)
        other = copy.deepcopy(packed)
        train(other, x)
        assert_same_parameters(plain, packed)
        train(plain, x)
        assert_same_parameters(plain, other)


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m,
        copy.deepcopy,
        lambda m: m.to("cpu"),
        lambda m: pickle.loads(pickle.dumps(m)),  # noqa: S301
        lambda m: [m, m.load_state_dict(m.state_dict(), assign=True)][0],
        lambda m: [m, m.layer.flatten_parameters()][0],
    ],
    ids=["compress_", "deepcopy", "to", "pickle", "assign", "flatten_parameters"],
)
def test_flat_weights_are_the_parameters(name: str, change: Callable[[nn.Module], nn.Module]) -> None:
    plain, packed, x = build(name)
    packed = change(packed)
    flat = packed.layer._flat_weights
    assert len(flat) > 4 and all(a is b for a, b in zip(flat, packed.layer.parameters(), strict=True))
    train(plain, x)
    train(packed, x)
    assert_same_parameters(plain, packed)


class TestOrderOfPasses:
    def test_gradients_accumulate(self) -> None:
        plain, packed, x = build("module called twice")
        for model in (plain, packed):
            for _ in range(2):
                loss(model, x).backward()
            first, second = loss(model, x), loss(model, x, 1)
            first.backward()
            second.backward()
        assert_same_gradients(plain, packed)

    def test_retained_graph(self) -> None:
        plain, packed, x = build("module called twice")
        for model in (plain, packed):
            once = loss(model, x)
            once.backward(retain_graph=True)
            once.backward()
        assert_same_gradients(plain, packed)

    def test_second_backward_pass_without_a_graph_is_an_error(self) -> None:
        _, packed, x = build()
        once = loss(packed, x)
        once.backward()
        with pytest.raises(RuntimeError, match="second time"):
            once.backward()

    @pytest.mark.parametrize("name", ["two layers", "module called twice", "attention, q is not k"])
    def test_double_backward(self, name: str) -> None:
        *models, x = build(name)
        for model in models:
            leaves = leaf(x)
            (first,) = torch.autograd.grad(model(leaves).pow(3).sum(), leaves, create_graph=True)
            first.square().sum().backward()
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            assert p.grad is None or same_bits(p.grad, q.grad), name

    @pytest.mark.parametrize("change", [lambda p: p.add_(1), lambda p: p.mul_(2), lambda p: p.copy_(torch.ones(8, 8))])
    def test_a_change_between_the_passes_is_an_error(self, change: Callable[[Tensor], object]) -> None:
        _, packed, x = build("module called twice")
        once = loss(packed, x)
        with torch.no_grad():
            change(packed.layer.weight)
        with pytest.raises(RuntimeError, match=r"layer\.weight was changed in place"):
            once.backward()

    @pytest.mark.parametrize("make", [optim.SGD, optim.Adam])
    @pytest.mark.parametrize("how", [{}, {"foreach": True}, {"fused": True}], ids=["for loop", "foreach", "fused"])
    @pytest.mark.parametrize("again", [lambda model, x, first: loss(model, x), lambda model, x, first: first])
    def test_two_forward_passes_then_two_backward_passes_with_a_step_in_each(
        self,
        again: Callable[[nn.Module, Tensor, Tensor], Tensor],
        how: dict[str, bool],
        make: Callable[..., optim.Optimizer],
    ) -> None:
        _, packed, x = build("module called twice")
        step_in_backward(packed, make, lr=0.1, **how)
        first = loss(packed, x)
        second = again(packed, x, first)
        first.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"layer\.weight was changed.*step_in_backward"):
            second.backward()
        loss(packed, x).backward()  # and all is well again

    def test_a_changed_activation_is_an_error(self) -> None:
        _, packed, x = build()
        x = x.clone()
        once = packed(x).sum()
        x.add_(1)
        with pytest.raises(RuntimeError, match="a tensor was changed in place"):
            once.backward()

    def test_activations_in_place(self) -> None:
        plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU(inplace=True))
        packed = compressed(plain)
        train(plain, X)
        train(packed, X)
        assert_same_parameters(plain, packed)

    @pytest.mark.parametrize("stepping", [False, True])
    def test_exceptions_leave_nothing_behind(self, stepping: bool) -> None:
        plain, packed, x = build("module called twice")
        handle = step_in_backward(packed, optim.SGD, lr=0.05) if stepping else None
        with pytest.raises(RuntimeError):
            packed(torch.zeros(2, 3))
        hook = packed.layer.register_full_backward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss(packed, x).backward()
        hook.remove()
        with torch.no_grad(), pytest.raises(NonFiniteError, match=r"layer\.weight"):
            packed.layer.weight.mul_(float("nan"))
        packed.zero_grad()
        train(plain, x)
        if handle is None:
            train(packed, x)
        else:
            packed.load_state_dict(build("module called twice")[0].state_dict())  # the bias may have been stepped
            for step in range(3):
                loss(packed, x, step).backward()
        assert_same_parameters(plain, packed)


@pytest.mark.parametrize("reentrant", [True, False])
class TestCheckpoint:
    def test_gradients(self, reentrant: bool) -> None:
        plain, packed, x = build("transformer layer")
        for model in (plain, packed):
            y = checkpoint(model, leaf(x), use_reentrant=reentrant)
            checkpoint(model, y, use_reentrant=reentrant).sin().sum().backward()
        for p, q in zip(plain.parameters(), packed.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad)

    def test_drops_activations(self, reentrant: bool) -> None:
        model = compressed(nn.Sequential(*(nn.Linear(16, 16) for _ in range(8))))
        x = torch.randn(4096, 16, requires_grad=True)
        graph: list[Tensor] = []
        kept = sum(allocations(lambda: graph.append(checkpoint(model, x, use_reentrant=reentrant))))
        assert kept < 2 * x.nbytes

    def test_step_in_backward(self, reentrant: bool) -> None:
        plain, packed, x = build("module called twice")
        step_in_backward(packed, optim.SGD, lr=0.05)
        if reentrant:
            with pytest.raises(RuntimeError, match=r"use_reentrant=False.*accumulate\(\)"):
                checkpoint(packed, leaf(x), use_reentrant=True).square().sum().backward()
            assert_same_parameters(plain, packed)
            train(plain, x, 1)
            loss(packed, x).backward()  # and no gradient of that pass is left
            assert_same_parameters(plain, packed)
            return
        train(plain, x, 1)
        checkpoint(packed, leaf(x), use_reentrant=False).square().sum().backward()
        for p, q in zip(plain.parameters(), packed.parameters(), strict=True):
            torch.testing.assert_close(q.dequantize(), p.detach())

    @pytest.mark.parametrize("accumulate", [True, False])
    def test_step_in_backward_with_a_shared_module(self, reentrant: bool, accumulate: bool) -> None:
        """Its gradient is complete only when all its uses were differentiated."""
        plain, packed, x = build("module called twice")
        train(nn.Sequential(plain, nn.Tanh(), plain), x, 1)
        stepping = step_in_backward(packed, optim.SGD, lr=0.05)
        y = checkpoint(packed, leaf(x), use_reentrant=reentrant).tanh()
        y = checkpoint(packed, y, use_reentrant=reentrant)
        if accumulate:
            with stepping.accumulate():
                y.square().sum().backward()
        elif reentrant:
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                y.square().sum().backward()
            return
        else:
            y.square().sum().backward()
        torch.testing.assert_close(packed.layer.weight.dequantize(), plain.layer.weight.detach())


def reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model


def assigned(model: nn.Module) -> nn.Module:
    """Build a model without values and give it those of another."""
    with torch.device("meta"):
        empty = two_layers()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    empty.load_state_dict(torch.load(file, weights_only=True), assign=True)
    return empty


def hooked(model: nn.Module) -> nn.Module:
    """Load through hooks of the state_dict, as libraries add them for other names."""

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in list(state):
            state[f"old.{name}"] = state.pop(name)

    def back(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in list(state):
            state[name.removeprefix("old.")] = state.pop(name)

    model.register_state_dict_post_hook(rename)
    model.register_load_state_dict_pre_hook(back)
    state = model.state_dict()
    assert all(name.startswith("old.") and isinstance(p, CompressedTensor) for name, p in state.items())
    with torch.no_grad():
        for p in model.parameters():
            state[f"old.{next(n for n, q in model.named_parameters() if q is p)}"] = p.clone()
            p.zero_()
    model.load_state_dict(state)
    return model


class TestSavedAndMoved:
    @pytest.mark.parametrize("how", [{}, {"format": "S1E3M7"}, {"format": "S1E2M3", "update_format": "S1E2M1"}])
    @pytest.mark.parametrize(
        "change",
        [
            reloaded,
            assigned,
            hooked,
            copy.deepcopy,
            lambda m: pickle.loads(pickle.dumps(m)),  # noqa: S301
            lambda m: m.to("cpu"),
            lambda m: m.float(),
            lambda m: m.to(memory_format=torch.channels_last),
            lambda m: m.share_memory(),
        ],
        ids=[
            "torch.save", "assign", "state_dict hooks", "deepcopy", "pickle", "to", "float", "memory format",
            "share_memory",
        ],
    )  # fmt: skip
    def test_it_is_the_same_and_trains(self, change: Callable[[nn.Module], nn.Module], how: dict[str, str]) -> None:
        _, packed, x = build(**how)
        train(packed, x)
        expected = copy.deepcopy(packed)
        model = change(packed)
        assert_compressed(model)
        assert_same_parameters(expected, model)
        train(model, x)
        train(expected, x)
        assert_same_parameters(expected, model)

    @pytest.mark.parametrize("how", [{}, {"format": "S1E2M3", "update_format": "S1E2M1"}])
    def test_in_another_process(self, how: dict[str, str], tmp_path: Path) -> None:
        _, packed, x = build(**how)
        train(packed, x)
        expected = copy.deepcopy(packed)
        run_processes(_train_and_save, 1, packed, tmp_path / "found")
        model = build(**how)[1]
        model.load_state_dict(torch.load(tmp_path / "found", weights_only=True))
        train(expected, x)
        assert_same_parameters(expected, model)

    def test_moves_in_the_midst_of_training(self) -> None:
        plain, packed, x = build()
        for model in (plain, packed):
            optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            for step in range(3):
                optimizer.zero_grad()
                loss(model, x, step).backward()
                model.to("cpu")
                optimizer.step()
        assert_same_parameters(plain, packed)

    def test_a_move_between_forward_and_backward_is_an_error(self) -> None:
        _, packed, x = build()
        once = loss(packed, x)
        packed.to("cpu")
        with pytest.raises(RuntimeError, match="change the device/dtype before running forward"):
            once.backward()
        loss(packed, x).backward()

    def test_a_wider_precision_is_an_error_that_changes_nothing(self) -> None:
        plain, packed, x = build()
        with pytest.raises(RuntimeError, match=r"0\.weight is compressed.*decompress_"):
            packed.double()
        train(plain, x)
        train(packed, x)
        assert_same_parameters(plain, packed)

    def test_another_precision_after_decompressing(self) -> None:
        plain, packed, x = build()
        assert torch.equal(decompress_(packed).bfloat16()(x.bfloat16()), plain.bfloat16()(x.bfloat16()))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")
    def test_no_gpu(self) -> None:
        plain, packed, x = build()
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
            packed.cuda()
        assert torch.equal(packed(x), plain(x))

    @pytest.mark.parametrize("start", ["cpu", "meta"])
    @pytest.mark.parametrize("how", [{}, {"update_format": "S1E8M23"}])
    def test_emptied_and_filled(self, start: str, how: dict[str, str]) -> None:
        plain, packed, x = build(**how)
        packed.to(start)
        assert all(p.device.type == start and isinstance(p, CompressedTensor) for p in packed.parameters())
        packed.to_empty(device="cpu")
        assert_compressed(packed)
        assert len(packed[0].weight.parts) == 1 + len(how)
        packed.load_state_dict(plain.state_dict())
        if how:  # in two parts steps are added to the update
            torch.testing.assert_close(packed(x), plain(x))
            return
        train(plain, x)
        train(packed, x)
        assert_same_parameters(plain, packed)


def functional(model: nn.Module, x: Tensor) -> Tensor:
    return functional_call(model, dict(model.named_parameters()), (x,))


def halved(model: nn.Module, x: Tensor) -> Tensor:
    return functional_call(model, {name: p.detach() * 0.5 for name, p in model.named_parameters()}, (x,))


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.reshape(-1) for g in gradients.values()])


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    return flat(grad(lambda p: functional_call(model, p, (x,)).square().sum())(values_of(model)))


def gradient_per_sample(model: nn.Module, x: Tensor) -> Tensor:
    one = grad(lambda p, row: functional_call(model, p, (row,)).square().sum())
    return flat(vmap(one, (None, 0))(values_of(model), x))


def parameter_jvp(model: nn.Module, x: Tensor) -> Tensor:
    values = values_of(model)
    ones = {name: torch.ones_like(value) for name, value in values.items()}
    return jvp(lambda p: functional_call(model, p, (x,)), (values,), (ones,))[1]


def forward_mode(model: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def ensemble(model: nn.Module, x: Tensor) -> Tensor:
    parameters, buffers = stack_module_state([model, copy.deepcopy(model)])  # type: ignore[list-item]
    return vmap(lambda p, b: functional_call(model, (p, b), (x,)))(parameters, buffers)


@pytest.mark.parametrize(
    "transform",
    [
        functional,
        halved,
        gradient,
        gradient_per_sample,
        parameter_jvp,
        forward_mode,
        ensemble,
        lambda m, x: jacrev(m)(x[0]),
        lambda m, x: vmap(m)(x),
        lambda m, x: torch.autograd.functional.jacobian(m, x[0]),
        lambda m, x: torch.autograd.functional.hessian(lambda y: m(y).square().sum(), x[0, 0]),
    ],
    ids=[
        "functional_call", "functional_call of others", "grad", "grad per sample", "jvp", "forward mode", "ensemble",
        "jacrev", "vmap", "jacobian", "hessian",
    ],
)  # fmt: skip
def test_transforms_of_functions(transform: Callable[[nn.Module, Tensor], Tensor]) -> None:
    plain, packed, x = build()
    found, expected = (transform(model, x) for model in (packed, plain))
    assert torch.equal(found, expected)
    train(plain, x)
    train(packed, x)
    assert_same_parameters(plain, packed)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


REPARAMETRIZATIONS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any]]] = {
    "parametrize": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
    "weight_norm": (parametrizations.weight_norm, lambda layer: parametrize.remove_parametrizations(layer, "weight")),
    "old weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": (
        parametrizations.spectral_norm,
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
    "old spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "orthogonal": (parametrizations.orthogonal, lambda layer: parametrize.remove_parametrizations(layer, "weight")),
    "prune": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        lambda layer: prune.remove(layer, "weight"),
    ),
    "prune rows": (
        lambda layer: prune.ln_structured(layer, "weight", 0.3, n=2, dim=0),
        lambda layer: prune.remove(layer, "weight"),
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", REPARAMETRIZATIONS)
class TestReparametrized:
    def test_training_and_removal(self, name: str) -> None:
        apply, remove = REPARAMETRIZATIONS[name]
        plain, packed, x = build()
        for model in (plain, packed):
            torch.manual_seed(1)
            apply(model[0])
            train(model, x)
        assert_same_parameters(plain, packed)
        assert torch.equal(packed(x), plain(x))
        for model in (plain, packed):
            remove(model[0])
            train(model, x)
        assert_same_parameters(plain, packed)

    def test_step_in_backward(self, name: str) -> None:
        plain, packed, x = build()
        for model in (plain, packed):
            torch.manual_seed(1)
            REPARAMETRIZATIONS[name][0](model[0])
        train(plain, x)
        step_in_backward(packed, optim.SGD, lr=0.05)
        for step in range(3):
            loss(packed, x, step).backward()
        assert_same_parameters(plain, packed)

    def test_a_coarse_format(self, name: str) -> None:
        _, packed, x = build(format="S1E3M7")
        apply, remove = REPARAMETRIZATIONS[name]
        apply(packed[0])
        train(packed, x)
        with torch.no_grad():
            before = packed(x)
            remove(packed[0])
            torch.testing.assert_close(packed(x), before, rtol=0.02, atol=0.02)


def test_grad_scaler() -> None:
    plain, packed, x = build()
    for model in (plain, packed):
        optimizer = optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        for step in range(4):
            optimizer.zero_grad()
            scale = float("inf") if step == 1 else 1.0  # this step is skipped
            scaler.scale(loss(model, x, step) * scale).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
    assert_same_parameters(plain, packed)


def test_optimizers_that_call_the_model_again() -> None:
    plain, packed, x = build()
    for model in (plain, packed):
        optimizer = optim.LBFGS(model.parameters(), lr=0.1)

        def closure(model: nn.Module = model, optimizer: optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            once = loss(model, x)
            once.backward()
            return once

        for _ in range(2):
            optimizer.step(closure)
    assert_same_parameters(plain, packed)


class TestAverages:
    @pytest.mark.parametrize(
        "how",
        [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, {"avg_fn": lambda old, new, count: 0.9 * old + 0.1 * new}],
        ids=["swa", "ema", "function"],
    )
    def test_averaged_models(self, how: dict[str, Any]) -> None:
        plain, packed, x = build()
        averages = [AveragedModel(model, **how) for model in (plain, packed)]
        for _ in range(3):
            for model, average in zip((plain, packed), averages, strict=True):
                train(model, x, 1)
                average.update_parameters(model)
        assert_same_parameters(*averages)
        assert_compressed(averages[1].module)

    def test_a_plain_average_of_a_coarse_model(self) -> None:
        """An average in a coarse format would round its own small changes away."""
        _, packed, x = build(format="S1E3M7")
        average = AveragedModel(decompress_(copy.deepcopy(packed)), multi_avg_fn=get_ema_multi_avg_fn(0.999))
        expected = [dense(p) for p in packed.parameters()]
        for step in range(3):
            train(packed, x, 1)
            average.update_parameters(packed)
            if step == 0:  # the first takes the values
                expected = [dense(p) for p in packed.parameters()]
            else:
                expected = [e.lerp(dense(p), 1 - 0.999) for e, p in zip(expected, packed.parameters(), strict=True)]
        for e, p in zip(expected, average.module.parameters(), strict=True):
            assert not isinstance(p, CompressedTensor)
            torch.testing.assert_close(p.detach(), e, rtol=1e-6, atol=1e-7)

    def test_parameters_as_one_vector(self) -> None:
        plain, packed, x = build()
        vectors = [nn.utils.parameters_to_vector(model.parameters()) for model in (plain, packed)]
        assert torch.equal(*vectors)
        for model in (plain, packed):
            nn.utils.vector_to_parameters(vectors[0].detach() * 2, model.parameters())
            train(model, x)
        assert_same_parameters(plain, packed)
        assert_compressed(packed)


class TestOverflow:
    """Base and update are finite each; their sum must not become an infinity."""

    @pytest.mark.parametrize("format", ["S1E8M23", "S1E8M7", "S1E3M7"])
    @pytest.mark.parametrize(
        "change",
        [
            lambda p, x: p.add_(x),
            lambda p, x: p.sub_(x, alpha=-1),
            lambda p, x: p.add_(1e38).add_(1e38).add_(3e38),
            lambda p, x: p.mul_(2),
            lambda p, x: p.addcmul_(x, torch.ones_like(x)),
            lambda p, x: torch._foreach_add_([p], [x]),
            lambda p, x: p.view(-1)[1500:].add_(x[1500:]),
        ],
        ids=["add_", "sub_", "numbers", "mul_", "addcmul_", "foreach", "view"],
    )
    def test_a_sum_beyond_float32_is_an_error_that_changes_nothing(
        self, change: Callable[[Tensor, Tensor], object], format: str
    ) -> None:
        x = torch.ones(2000)
        x[1500] = 3e38
        p = CompressedTensor.from_dense(x, format, update_format=format, name="decoder.weight")
        with pytest.raises(NonFiniteError, match=r"decoder\.weight"):
            change(p, x)
        values = p.dequantize()
        assert values.isfinite().all()
        p.add_(x, alpha=0.01)
        torch.testing.assert_close(p.dequantize(), values + 0.01 * x, rtol=0.01, atol=1e34 if format == "S1E3M7" else 0)

    def test_a_sum_within_float32_is_none(self) -> None:
        x = torch.full((2000,), 3e38)
        p = CompressedTensor.from_dense(x, "S1E8M23", update_format="S1E8M23")
        for change in (lambda: p.add_(x, alpha=-1), lambda: p.add_(x), lambda: p.copy_(torch.full((2000,), 1e38))):
            change()
            assert p.dequantize().isfinite().all()
        torch.testing.assert_close(p.dequantize(), torch.full((2000,), 1e38))


class TestDistributed:
    """Two real processes on this machine, whose gradients DistributedDataParallel averages."""

    def test_data_parallel(self, tmp_path: Path) -> None:
        run_processes(_data_parallel, 2, tmp_path)
        plain, _, _ = build()
        optimizer = optim.SGD(plain.parameters(), lr=0.05)
        for step in range(3):
            optimizer.zero_grad()
            for rank in range(2):
                (loss(plain, randn(4, 8, seed=rank), step) / 2).backward()
            optimizer.step()
        ranks = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
        for case in CASES:
            for name, p in plain.named_parameters():
                assert same_bits(*(rank[case][name] for rank in ranks)), (case, name)
                torch.testing.assert_close(ranks[0][case][name], p.detach())
        assert all(rank["error"].startswith("the gradient of") for rank in ranks)
        assert all("DistributedDataParallel" in rank["error"] and "accumulate()" in rank["error"] for rank in ranks)


CASES = ("optimizer", "bucket views", "accumulate", "accumulate, bucket views")


def _data_parallel(rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = datetime.timedelta(seconds=30)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", timeout, 2, rank)
    found: dict[str, Any] = {}
    x = randn(4, 8, seed=rank)
    for case in CASES:
        model = build()[1]
        if rank == 1:
            with torch.no_grad():
                model[0].weight.add_(1)  # the first process's values count
        parallel = DistributedDataParallel(model, gradient_as_bucket_view="views" in case)
        if "accumulate" in case:
            stepping = step_in_backward(model, optim.SGD, lr=0.05)
            for step in range(3):
                parallel.zero_grad()  # buckets are built anew around what is left in .grad
                with stepping.accumulate():
                    loss(parallel, x, step).backward()
        else:
            train(parallel, x)
        found[case] = (
            values_of(decompress_(model))
            if "accumulate" not in case
            else {name: p.dequantize() for name, p in model.named_parameters()}
        )
    model = build()[1]
    parallel = DistributedDataParallel(model)
    step_in_backward(model, optim.SGD, lr=0.05)
    try:
        loss(parallel, x).backward()
    except RuntimeError as error:
        found["error"] = str(error)
    torch.save(found, folder / str(rank))
    os._exit(0)  # a reducer that was stopped in the midst of its work is not to be waited for


@pytest.mark.parametrize("update_format", [None, "S1E4M14"], ids=["one part", "two parts"])
def test_what_another_process_adds_is_seen(update_format: str | None) -> None:
    p = CompressedTensor.from_dense(torch.zeros(64, 64), "S1E4M14", update_format=update_format)
    run_processes(_add_one, 1, p.share_memory_())
    assert torch.equal(p.dequantize(), torch.ones(64, 64))


def _add_one(rank: int, p: CompressedTensor) -> None:
    p.add_(1.0)


def _train_and_save(rank: int, model: nn.Module, path: Path) -> None:
    assert_compressed(model)
    train(model, X)
    torch.save(model.state_dict(), path)
