"""What autograd, modules and users do to packed activations: the gradient of plain torch, or an error that says so."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fedomc
from fedomc import NonFiniteError, compress_activations
from fedomc._torch import StorageWeakRef, saved_tensors_hooks
from fedomc.methods import parse_method
from tests.activations.conftest import Function, error, gradients
from tests.activations.models import MODELS, SEQUENCE, Checkpointed, X, build
from tests.conftest import same_bits


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("name", MODELS)
class TestModels:
    def test_a_lossless_format_gives_the_gradient_of_torch(self, name: str, compressed: bool, lossless: str) -> None:
        model, x = build(name, compressed)
        expected = gradients(model, x)
        with compress_activations(model, lossless) as packed:
            found = gradients(model, x)
        assert packed.last.saved > 0
        assert all(map(same_bits, found, expected))

    @pytest.mark.parametrize(("format", "most"), [("S1E4M3", 0.08), ("S1E4M3/64", 0.08), ("INT8", 0.03), ("INT4", 0.4)])
    def test_eight_bits_give_nearly_the_gradient_of_torch(
        self, name: str, compressed: bool, format: str, most: float
    ) -> None:
        model, x = build(name, compressed)
        expected = gradients(model, x)
        with compress_activations(model, format) as packed:
            assert 0 < error(gradients(model, x), expected) < most
        assert packed.last.ratio < 0.3
        assert all(map(same_bits, gradients(model, x), expected))  # it is removed

    def test_autocast(self, name: str, compressed: bool, lossless: str) -> None:
        """Parameters that autocast casts are not packed: they are saved as they are, in bfloat16."""
        model, x = build(name, compressed)

        def run() -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                return gradients(model, x)

        expected = run()
        with compress_activations(model, lossless):
            found = run()
        assert all(map(same_bits, found, expected))


# ---- memory --------------------------------------------------------------------------------------------------------


def test_what_many_operations_save_is_packed_once() -> None:
    model, x = build("self-attention")
    with compress_activations(model, "S1E4M3") as packed:
        model(x.clone().requires_grad_())
    method = parse_method("S1E4M3")
    assert packed.last.saved == 4 * x.nbytes  # x, query, key, value
    assert packed.last.held == 4 * method.nbytes(x.numel())


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_keeps_is_packed(reentrant: bool) -> None:
    model = Checkpointed(reentrant)
    with compress_activations(model, "S1E4M3") as packed:
        model(X)
    assert packed.last.saved == 3 * X.nbytes  # the inputs of the layer before, of the region and of the layer after


def test_an_activation_is_gone_as_soon_as_it_is_packed() -> None:
    alive: list[StorageWeakRef] = []

    def deep(x: Tensor, w: Tensor) -> Tensor:
        for _ in range(4):
            x = F.gelu(F.linear(x, w))
            alive.append(StorageWeakRef(x.untyped_storage()))
        return x.sum()

    model = Function(deep, 64, 64)
    with compress_activations(model, "S1E4M3"):
        loss = model(X)
    assert [each.expired() for each in alive] == [True] * 4
    alive.clear()
    loss = model(X)
    assert [each.expired() for each in alive] == [False, False, False, True]
    del loss


def test_an_address_that_is_used_again_is_another_activation(lossless: str) -> None:
    addresses: list[int] = []

    def many(x: Tensor, w: Tensor) -> Tensor:
        out = x[0] * 0
        for i in range(8):
            y = torch.full((64, 64), float(i)) + 1
            addresses.append(y.data_ptr())
            out = out + F.linear(y, w).sum() * (i + 1)
            del y
        return out

    model = Function(many, 64, 64)
    expected = gradients(model, X)
    with compress_activations(model, lossless):
        addresses.clear()
        found = gradients(model, X)
    assert len(set(addresses)) < 8  # otherwise the trap was not set
    assert all(map(same_bits, found, expected))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[::2],
        lambda x: x[..., 1:],
        lambda x: x.permute(2, 0, 1),
        lambda x: x.chunk(2, -1)[1],
        lambda x: x.unfold(1, 2, 1),
        lambda x: x[:, :1].expand(-1, 16, -1),
        lambda x: x.as_strided((64, 64, 4), (256, 1, 64)),
    ],
)
def test_any_strides(view: Callable[[Tensor], Tensor], lossless: str) -> None:
    model = Function(lambda x, w: (view(x * w) * F.gelu(view(x))).sum() + (x * w).square().sum(), 1)
    expected = gradients(model, X)
    with compress_activations(model, lossless) as packed:
        found = gradients(model, X)
    # Not to the last bit: torch has other loops for other strides.
    assert packed.last.saved > 0 and error(found, expected) < 1e-6


# ---- passes --------------------------------------------------------------------------------------------------------


def test_several_backward_passes_give_the_same_gradient() -> None:
    model, x = build()
    grads = []
    with compress_activations(model, "S1E4M3"):
        loss = model(x).square().mean()
    for retain in (True, True, False):
        model.zero_grad()
        loss.backward(retain_graph=retain)
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(same_bits(a, b) and same_bits(a, c) for a, b, c in zip(*grads, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_two_forward_passes_before_their_backward_passes(lossless: str) -> None:
    model, x = build()

    def both(first: Tensor) -> None:
        (first + model(2 * x).square().mean()).backward()

    expected = gradients(model, x, backward=both)
    with compress_activations(model, lossless):
        assert all(map(same_bits, gradients(model, x, backward=both), expected))


@pytest.mark.parametrize("name", ["network", "images", "checkpoint"])
def test_double_backward(name: str, lossless: str) -> None:
    model, x = build(name)

    def penalty(loss: Tensor) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        torch.stack([g.square().sum() for g in grads]).sum().backward()

    expected = gradients(model, x, backward=penalty)
    with compress_activations(model, lossless):
        found = gradients(model, x, backward=penalty)
    assert all(map(same_bits, found, expected))
    with compress_activations(model, "INT8"):
        assert 0 < error(gradients(model, x, backward=penalty), expected) < 0.1


def test_double_backward_of_attention(lossless: str) -> None:
    """Fused attention has no second derivative, here as in torch; the one with a trained mask does."""

    def with_mask(x: Tensor, w: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x + 1, x + 2, w)

    model = Function(with_mask, 16, 16)

    def penalty(loss: Tensor) -> None:
        torch.autograd.grad(loss, model.weight, create_graph=True)[0].square().sum().backward()

    expected = gradients(model, SEQUENCE, backward=penalty)
    with compress_activations(model, lossless):
        found = gradients(model, SEQUENCE, backward=penalty)
    torch.testing.assert_close(found, expected)


CHANGES: dict[str, tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], bool]] = {
    "packed, changed": (lambda x, w: (F.linear(h := x + 1, w), h.add_(1))[::-1], True),
    "packed, a view changed": (lambda x, w: (F.linear(h := x + 1, w), h[0].zero_())[::-1], True),
    "packed twice, changed between": (lambda x, w: (F.linear(h := x + 1, w) + F.linear(h.mul_(2), w), h)[::-1], True),
    "packed as a mask, changed": (lambda x, w: (F.relu(h := x + 1) * 1, h)[::-1], False),
    "result of relu, changed": (lambda x, w: ((h := F.relu(x)) * 1, h.add_(1))[::-1], True),
    "exact, changed": (lambda x, w: ((h := x.softmax(-1)) * 1, h.add_(1))[::-1], True),
    "parameter, changed": (lambda x, w: (F.linear(x, w), w.data, w.detach().add_(1))[::-2], True),
    "changed before it is saved": (lambda x, w: (F.linear((x + 1).add_(1), w), x)[::-1], False),
    "not saved, changed": (lambda x, w: ((h := F.linear(x, w)) * 1, h.add_(1))[::-1], False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_place_is_an_error_where_it_is_one_of_torch(name: str, lossless: str) -> None:
    change, raises = CHANGES[name]
    model = Function(lambda x, w: sum(part.sum() for part in change(x, w)), 64, 64)

    def run() -> list[Tensor] | str:
        try:
            return gradients(model, X)
        except RuntimeError as error:
            return str(error)

    expected = run()
    with compress_activations(model, lossless):
        found = run()
    if raises:
        assert isinstance(expected, str) and "modified by an inplace operation" in expected
        assert isinstance(found, str) and "modified by an inplace operation" in found
        assert ("softmax" if name == "exact, changed" else "relu" if "relu" in name else "linear") in found or (
            "an operation" in found
        )
    else:
        assert isinstance(expected, list) and isinstance(found, list)
        assert all(map(same_bits, found, expected))


def test_threads(lossless: str) -> None:
    model, x = build("images")
    expected = gradients(model, x)
    found: list[list[Tensor]] = []

    def run(model: nn.Module) -> None:
        leaf = x.clone().requires_grad_()
        model(leaf).square().mean().backward()
        found.append([leaf.grad])  # type: ignore[list-item]

    with compress_activations(model, lossless):
        threads = [threading.Thread(target=run, args=(model,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 3 and all(same_bits(each[0], expected[0]) for each in found)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_packed_without_gradients(mode: Callable[[], Any]) -> None:
    model, x = build()
    model.eval()
    with compress_activations(model, "S1E4M3") as packed, mode():
        out = model(x)
    assert same_bits(out, model(x)) and packed.last.saved == 0


def test_transforms_raise_the_error_of_torch() -> None:
    model = Function(F.linear, 64, 64)
    with compress_activations(model, "S1E4M3"), pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(lambda x: model(x).sum())(X)
    assert saved_tensors_hooks() is None


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "layer"), [("linear", nn.Linear(64, 64)), ("relu", nn.ReLU()), ("gelu", nn.GELU())])
def test_an_activation_that_is_not_finite_names_the_module(value: float, name: str, layer: nn.Module) -> None:
    inner = nn.Sequential(nn.Identity(), layer)
    model = nn.Sequential(nn.Linear(64, 64), inner, nn.Linear(64, 64))
    model[0].register_forward_hook(lambda module, args, out: out.clone().index_fill_(0, torch.tensor(3), value))
    with compress_activations(model, "S1E4M3"):
        with pytest.raises(NonFiniteError, match=rf"^1\.1 has an activation, saved by {name}, .* NaN or infinite"):
            model(X)
        assert saved_tensors_hooks() is None


def test_a_seed_makes_it_repeatable_and_each_pass_draws_anew() -> None:
    model, x = build()
    runs = {}
    for run, seed in (("first", 0), ("again", 0), ("other", 1)):
        with compress_activations(model, "S1E2M1", seed=seed):
            runs[run] = [gradients(model, x), gradients(model, x)]
    assert all(map(same_bits, runs["first"][0], runs["again"][0]))
    assert all(map(same_bits, runs["first"][1], runs["again"][1]))
    assert error(runs["other"][0], runs["first"][0]) > 0.01
    assert error(runs["first"][1], runs["first"][0]) > 0.01


def test_rounding_to_nearest_has_no_seed() -> None:
    model, x = build()
    found = []
    for seed in (0, 1):
        with compress_activations(model, "S1E2M1", rounding="nearest", seed=seed):
            found.append(gradients(model, x))
    assert all(map(same_bits, *found))


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_training_in_backward(compressed: bool) -> None:
    model, x = build(compressed=compressed)
    target = x.roll(1, 0)
    fedomc.step_in_backward(model, torch.optim.SGD, lr=0.05)
    losses = []
    with compress_activations(model, "S1E4M3"):
        for _ in range(30):
            loss = F.mse_loss(model(x), target)
            loss.backward()
            losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
