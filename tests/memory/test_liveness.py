from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedomc import CompressedTensor, Encoding, FloatFormat
from fedomc.memory.liveness import FunctionTracker, Lifetime, StorageTracker, VariableTracker
from fedomc.memory.shapes import ShapeMode
from tests.conftest import randn

S1E2M3 = Encoding(FloatFormat(2, 3))


def nothing() -> nn.Module:
    return nn.Module()


def held(lives: StorageTracker) -> tuple[int, int]:
    most = lives.most(lambda life: life.nbytes)
    return most.transients, most.peak


def test_a_storage_lives_from_the_operator_that_makes_it_to_the_last_that_knows_it() -> None:
    lives = StorageTracker(nothing(), None)
    with lives:
        a = torch.zeros(10)
        b = a + 1
        del a
        c = b.view(2, 5)[0]
        del b
        d = c.clone()
    assert [(life.nbytes, life.birth, life.death) for life in lives.lives] == [(40, 1, 2), (40, 2, None), (20, 5, None)]
    assert held(lives) == (80, 80)
    del c, d
    assert all(life.death == 5 for life in lives.lives[1:])


def test_what_is_there_before_counts_as_what_it_is() -> None:
    model, x = nn.BatchNorm1d(8), randn(4, 8)
    lives = StorageTracker(model, {"x": [x]})
    with lives:
        x.add_(1)
    most = lives.most(lambda life: life.nbytes)
    assert (most.parameters, most.buffers, most.transients) == (64, 72, 0)


def test_kinds_hold_from_the_beginning() -> None:
    lives = StorageTracker(nothing(), None)
    with lives:
        kept, later = torch.zeros(10), torch.zeros(5)
        lives.tag_alive("activations")
        gradient = torch.zeros(3)
        lives.tag("gradients", {"one": [gradient, None]})
        lives.tag("optimizer", later)
        lives.tag("optimizer", torch.ones(2).numpy())
    most = lives.most(lambda life: life.nbytes)
    assert (most.activations, most.optimizer, most.gradients, most.transients) == (40, 20, 12, 8)
    assert kept.numel() == 10 and most.peak == 40 + 20 + 12 + 8


def test_operators_on_the_parts_of_a_compressed_tensor_are_seen() -> None:
    weight = CompressedTensor.from_dense(randn(64, 64), "S1E2M3")
    lives = StorageTracker(nothing(), weight)
    with lives:
        decoded = weight + 0.0
    assert held(lives)[0] == 2 * decoded.nbytes


def uses_of(run: Callable[[nn.Module], object]) -> list[tuple[str, int, int | None]]:
    """Run a linear layer of 4 to 6 and return what is done with its weight, and when."""
    model = nn.Linear(4, 6, bias=False)
    uses = VariableTracker(model, None)
    with uses, FunctionTracker(uses), torch.no_grad():
        run(model)
    assert all(life.variable == "weight" for life in uses.lives if life.kind in ("decoded", "added", "written"))
    return [(life.kind, life.birth, life.death) for life in uses.lives[1:] if life.variable]


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda model: model(torch.ones(2, 4)), [("panel", 2, 3)]),  # after ones, while linear runs t and mm
        (lambda model: model.weight.abs(), [("decoded", 1, 1)]),
        (lambda model: model.weight.detach().data, []),
        (lambda model: model.weight.add_(torch.ones(6, 4)), [("added", 2, 2)]),
        (lambda model: model.weight.mul_(2.0).addcmul_(torch.ones(6, 4), model.weight),
         [("written", 1, 1), ("written", 3, 3), ("decoded", 3, 3)]),
    ],
)  # fmt: skip
def test_a_variable_is_used_while_a_function_or_an_operator_runs(
    run: Callable[[nn.Module], object], expected: list[tuple[str, int, int]]
) -> None:
    assert uses_of(run) == expected


def test_a_node_decodes_from_its_first_operator_on() -> None:
    model, x = nn.Linear(4, 6, bias=False), randn(2, 4).requires_grad_()
    uses = VariableTracker(model, x)
    with uses, FunctionTracker(uses):
        out = torch.mm(x, model.weight.view(4, 6)).sum()
        before = uses.moment
        out.backward()
    decoded = [life for life in uses.lives if life.kind == "decoded" and life.birth > before]
    gradient = next(life for life in uses.lives if life.nbytes == 96 and life.birth > before)
    assert len(decoded) == 1  # its first operator makes the gradient of the weight, before it reads the weight
    assert decoded[0].birth <= gradient.birth < uses.moment
    assert decoded[0].death is not None and decoded[0].death >= gradient.birth + 2


@pytest.mark.parametrize("frozen", [False, True])
def test_a_linear_layer_decodes_before_it_makes_its_gradient(frozen: bool) -> None:
    model, x = nn.Linear(4, 6, bias=False).requires_grad_(not frozen), randn(2, 4).requires_grad_()
    uses = VariableTracker(model, x)
    with uses, FunctionTracker(uses):
        out = model(x).sum()
        before = uses.moment
        out.backward()
    assert any(life.kind == "panel" for life in uses.lives if life.birth > before) == frozen


def test_formats_change_what_a_use_costs() -> None:
    model = nn.Linear(64, 64, bias=False)
    uses = VariableTracker(model, None)
    uses.lives += [Lifetime(0, 1, 1, "decoded", "weight"), Lifetime(0, 2, 2, "added", "weight"), Lifetime(100, 1, 1)]
    uses.moment = 2
    plain, packed = uses.most_in({}), uses.most_in({"weight": S1E2M3})
    codes = 4 * (4096 * 6 // 32) + 8
    assert (plain.parameters, plain.transients, plain.peak) == (4 * 4096, 100, 4 * 4096 + 100)
    assert (packed.parameters, packed.transients) == (codes, 4 * 4096 + 100)
    assert packed.peak == codes + 4 * 4096 + 100
    uses.lives[1:] = [Lifetime(0, 1, 1, "panel", "weight")]
    assert uses.most_in({"weight": S1E2M3}).transients == 4 * 4096
    uses.lives[1:] = [Lifetime(0, 2, 2, "added", "weight")]
    assert uses.most_in({"weight": S1E2M3}).transients == codes


def test_shapes_compute_integers_and_no_floats() -> None:
    shapes = ShapeMode()
    lengths, x = torch.tensor([2, 5]), shapes.copy(randn(2, 5))
    with shapes:
        mask = torch.arange(5) < lengths[:, None]
        chosen = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]).masked_select(mask)
        y = (x * mask).sum()
    assert chosen.tolist() == [1, 2, 6, 7, 8, 9, 10] and mask.sum() == 7
    assert y.shape == () and type(y) is not Tensor
    with shapes:
        assert y.item() == 1.0 and not bool(y > 0)
        assert type(mask.float()) is type(y)


def test_a_copy_of_shapes_shares_nothing() -> None:
    shapes = ShapeMode()
    tokens, weight = torch.tensor([1, 2]), nn.Parameter(randn(2, 3), requires_grad=False)
    copied, faked = shapes.copy(tokens), shapes.copy(weight)
    assert torch.equal(copied, tokens) and copied.data_ptr() != tokens.data_ptr()
    assert isinstance(faked, nn.Parameter) and not faked.requires_grad and faked.shape == (2, 3)
    assert str(shapes.copy(weight.to("meta")).device) == "cpu" and shapes.copy("text") == "text"
