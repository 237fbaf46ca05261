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


def held(tracker: StorageTracker) -> tuple[int, int]:
    peaks = tracker.peaks(lambda lifetime: lifetime.nbytes)
    return peaks.transients, peaks.peak


def test_a_storage_lives_from_the_operator_that_makes_it_to_the_last_that_knows_it() -> None:
    tracker = StorageTracker(nothing(), None)
    with tracker:
        a = torch.zeros(10)
        b = a + 1
        del a
        c = b.view(2, 5)[0]
        del b
        d = c.clone()
    assert [(lifetime.nbytes, lifetime.start, lifetime.end) for lifetime in tracker.lifetimes] == [
        (40, 1, 2),
        (40, 2, None),
        (20, 5, None),
    ]
    assert held(tracker) == (80, 80)
    del c, d
    assert all(lifetime.end == 5 for lifetime in tracker.lifetimes[1:])


def test_what_is_there_before_counts_as_what_it_is() -> None:
    model, x = nn.BatchNorm1d(8), randn(4, 8)
    tracker = StorageTracker(model, {"x": [x]})
    with tracker:
        x.add_(1)
    peaks = tracker.peaks(lambda lifetime: lifetime.nbytes)
    assert (peaks.parameters, peaks.buffers, peaks.transients) == (64, 72, 0)


def test_kinds_hold_from_the_beginning() -> None:
    tracker = StorageTracker(nothing(), None)
    with tracker:
        kept, later = torch.zeros(10), torch.zeros(5)
        tracker.tag_alive("activations")
        gradient = torch.zeros(3)
        tracker.tag("gradients", {"one": [gradient, None]})
        tracker.tag("optimizer", later)
        tracker.tag("optimizer", torch.ones(2).numpy())
    peaks = tracker.peaks(lambda lifetime: lifetime.nbytes)
    assert (peaks.activations, peaks.optimizer, peaks.gradients, peaks.transients) == (40, 20, 12, 8)
    assert kept.numel() == 10 and peaks.peak == 40 + 20 + 12 + 8


def test_operators_on_the_parts_of_a_compressed_tensor_are_seen() -> None:
    weight = CompressedTensor.from_dense(randn(64, 64), "S1E2M3")
    tracker = StorageTracker(nothing(), weight)
    with tracker:
        decoded = weight + 0.0
    assert held(tracker)[0] == 2 * decoded.nbytes


def uses_of(run: Callable[[nn.Module], object]) -> list[tuple[str, int, int | None]]:
    """Run a linear layer of 4 to 6 and return what is done with its weight, and when."""
    model = nn.Linear(4, 6, bias=False)
    tracker = VariableTracker(model, None)
    with tracker, FunctionTracker(tracker), torch.no_grad():
        run(model)
    assert all(
        lifetime.variable == "weight"
        for lifetime in tracker.lifetimes
        if lifetime.kind in ("decoded", "added", "written")
    )
    return [(lifetime.kind, lifetime.start, lifetime.end) for lifetime in tracker.lifetimes[1:] if lifetime.variable]


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
    tracker = VariableTracker(model, x)
    with tracker, FunctionTracker(tracker):
        out = torch.mm(x, model.weight.view(4, 6)).sum()
        before = tracker.moment
        out.backward()
    decoded = [lifetime for lifetime in tracker.lifetimes if lifetime.kind == "decoded" and lifetime.start > before]
    gradient = next(lifetime for lifetime in tracker.lifetimes if lifetime.nbytes == 96 and lifetime.start > before)
    assert len(decoded) == 1  # its first operator makes the gradient of the weight, before it reads the weight
    assert decoded[0].start <= gradient.start < tracker.moment
    assert decoded[0].end is not None and decoded[0].end >= gradient.start + 2


@pytest.mark.parametrize("frozen", [False, True])
def test_a_linear_layer_decodes_before_it_makes_its_gradient(frozen: bool) -> None:
    model, x = nn.Linear(4, 6, bias=False).requires_grad_(not frozen), randn(2, 4).requires_grad_()
    tracker = VariableTracker(model, x)
    with tracker, FunctionTracker(tracker):
        out = model(x).sum()
        before = tracker.moment
        out.backward()
    assert any(lifetime.kind == "panel" for lifetime in tracker.lifetimes if lifetime.start > before) == frozen


def test_formats_change_what_a_use_costs() -> None:
    model = nn.Linear(64, 64, bias=False)
    tracker = VariableTracker(model, None)
    tracker.lifetimes += [
        Lifetime(0, 1, 1, "decoded", "weight"),
        Lifetime(0, 2, 2, "added", "weight"),
        Lifetime(100, 1, 1),
    ]
    tracker.moment = 2
    plain, packed = tracker.peaks_with({}), tracker.peaks_with({"weight": S1E2M3})
    codes = 4 * (4096 * 6 // 32) + 8
    assert (plain.parameters, plain.transients, plain.peak) == (4 * 4096, 100, 4 * 4096 + 100)
    assert (packed.parameters, packed.transients) == (codes, 4 * 4096 + 100)
    assert packed.peak == codes + 4 * 4096 + 100
    tracker.lifetimes[1:] = [Lifetime(0, 1, 1, "panel", "weight")]
    assert tracker.peaks_with({"weight": S1E2M3}).transients == 4 * 4096
    tracker.lifetimes[1:] = [Lifetime(0, 2, 2, "added", "weight")]
    assert tracker.peaks_with({"weight": S1E2M3}).transients == codes


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


@pytest.mark.parametrize(
    ("layer", "sizes", "forward", "backward"),
    [
        (nn.Conv2d(4, 8, 3, padding=1, bias=False), (2, 4, 5, 5), [1600], [1600, 800]),
        (nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), (2, 8, 6, 6), [2304], [576, 2304]),
        (nn.Conv2d(4, 8, 1, bias=False), (2, 4, 5, 5), [], []),
        (nn.Conv2d(4, 8, 1, 2, bias=False), (2, 4, 5, 5), [800], [576, 800]),
        (nn.Conv1d(4, 4, 1, groups=4, bias=False), (2, 4, 9), [288], [288, 288]),
    ],
    ids=["kernel", "depthwise", "product", "strides", "groups"],
)
@pytest.mark.parametrize("of_inputs", [True, False])
def test_convolutions_copy_what_is_not_a_product(
    layer: nn.Module, sizes: tuple[int, ...], forward: list[int], backward: list[int], of_inputs: bool
) -> None:
    """Backward, the gradient is copied, and the inputs for their own gradient."""
    x = randn(*sizes).requires_grad_(of_inputs)
    tracker = StorageTracker(layer, x)
    with tracker:
        layer(x).sum().backward()
    found = [lifetime.nbytes for lifetime in tracker.lifetimes if lifetime.kind == "scratch"]
    assert found == forward + (backward if of_inputs else backward[:1])
