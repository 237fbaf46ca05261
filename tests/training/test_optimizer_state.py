import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, optim

from fedomc import (
    CompressedTensor,
    FormatError,
    NonFiniteError,
    PolicyError,
    StepInBackward,
    compress_,
    step_in_backward,
)
from fedomc.training.optimizer_state import SMALLEST, moment_bound, with_packed_state
from tests.conftest import allocations, randn

FINE = "S1E5M6/64"
OPTIMIZERS: list[tuple[type[optim.Optimizer], dict[str, Any]]] = [
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "maximize": True}),
    (optim.SGD, {"lr": torch.tensor(0.1), "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (optim.Adam, {"lr": 0.01}),
    (optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "maximize": True, "betas": (0.5, 0.9)}),
    (optim.Adam, {"lr": 0.01, "betas": (0.0, 0.0), "eps": 0.1}),
    (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    (optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "foreach": True, "eps": 0.1}),
]
IDS = [f"{optimizer.__name__} {kwargs}" for optimizer, kwargs in OPTIMIZERS]


def model(*, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).to(dtype)


def loss(module: nn.Module, step: int) -> torch.Tensor:
    x = randn(32, 64, seed=step)
    return (module(x.to(module[0].bias.dtype)).float() - x.roll(1, 1)).square().mean()


def stepped_exactly(module: nn.Module, optimizer: type[optim.Optimizer], **kwargs: Any) -> StepInBackward:
    """Step by the same code, with the state in FP32."""
    stepping = step_in_backward(module, optimizer, state_format=FINE, **kwargs)
    for group in stepping.optimizer.param_groups:
        group["state_format"] = None
    return stepping


def train(module: nn.Module, steps: int, first: int = 0) -> float:
    for step in range(first, first + steps):
        found = loss(module, step)
        found.backward()
    return float(found.detach())


def same_values(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(("optimizer", "kwargs"), OPTIMIZERS, ids=IDS)
def test_is_the_optimizer_of_torch_but_for_rounding(optimizer: type[optim.Optimizer], kwargs: dict[str, Any]) -> None:
    plain, packed = model(), model()
    step_in_backward(plain, optimizer, **kwargs)
    stepping = stepped_exactly(packed, optimizer, **kwargs)
    assert isinstance(stepping.optimizer, optimizer)
    train(plain, 4)
    train(packed, 4)
    for ours, theirs in zip(packed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("format", "dtype"),
    [(None, torch.float32), (None, torch.bfloat16), ("S1E3M7", torch.float32), ("S1E2M3+S1E2M3", torch.float32)],
)
def test_state_takes_two_bytes_a_value(format: str | None, dtype: torch.dtype) -> None:
    module = model(dtype=dtype)
    if format is not None:
        compress_(module, format)
    stepping = step_in_backward(module, optim.AdamW, lr=1e-3, state_format="S1E4M3/64")
    assert train(module, 60) < 0.9
    for parameter in module.parameters():
        state = stepping.optimizer.state[parameter]
        if parameter.numel() < SMALLEST:
            assert type(state["exp_avg_sq"]) is type(state["exp_avg"]) is torch.Tensor
        else:
            moments = state["exp_avg"], state["exp_avg_sq_root"]
            assert all(isinstance(moment, CompressedTensor) and moment.shape == parameter.shape for moment in moments)
            assert sum(moment.nbytes for moment in moments) == 2 * 65 / 64 * parameter.numel()


def test_the_loss_falls_as_with_the_optimizers_of_torchao() -> None:
    from torchao.optim import AdamW8bit

    theirs, ours = model(), model()
    optimizer = AdamW8bit(theirs.parameters(), lr=3e-3)
    stepping = step_in_backward(ours, optim.AdamW, lr=3e-3, state_format="S1E4M3/64")
    for step in range(150):
        found = loss(theirs, step)
        found.backward()
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        optimizer.zero_grad()
    assert train(ours, 150) < 1.03 * float(found.detach())
    weight, other = ours[0].weight, theirs[0].weight
    held = sum(stepping.optimizer.state[weight][key].nbytes for key in ("exp_avg", "exp_avg_sq_root"))
    state = optimizer.state[other]
    assert held <= sum(
        getattr(state[key], name).nbytes for key in ("exp_avg", "exp_avg_sq") for name in ("codes", "scale")
    )


@pytest.mark.parametrize("format", [None, "S1E3M7"])
@pytest.mark.parametrize("optimizer", [optim.SGD, optim.AdamW])
def test_training_in_bfloat16_is_that_of_exact_state(optimizer: type[optim.Optimizer], format: str | None) -> None:
    kwargs: dict[str, Any] = {"lr": 0.1, "momentum": 0.9} if optimizer is optim.SGD else {"lr": 0.01}
    exact, packed = (model(dtype=torch.bfloat16) for _ in range(2))
    if format is not None:
        compress_(exact, format)
        compress_(packed, format)
    first = float(loss(packed, 0))
    kept = stepped_exactly(exact, optimizer, **kwargs)
    stepping = step_in_backward(packed, optimizer, state_format="S1E4M3/64", **kwargs)
    losses = train(exact, 30), train(packed, 30)
    assert losses[1] == pytest.approx(losses[0], rel=0.05) and losses[1] < 0.8 * first
    assert packed[0].weight.dtype is packed[0].bias.dtype is torch.bfloat16
    assert kept.optimizer is not stepping.optimizer
    for state in (stepping.optimizer.state[packed[0].weight], stepping.optimizer.state[packed[0].bias]):
        for value in state.values():
            assert isinstance(value, CompressedTensor) or value.dtype is torch.float32


def test_moments_are_right_on_average() -> None:
    """Rounding to nearest would freeze the second moment: it changes by a thousandth in a step."""
    module = nn.Linear(256, 256, bias=False)
    stepping = step_in_backward(module, optim.Adam, lr=0.0, state_format="S1E4M3/64")
    gradient = randn(256, 256).abs() + 0.5
    for _ in range(300):
        (module.weight * gradient).sum().backward()
    state = stepping.optimizer.state[module.weight]
    decayed = gradient * math.sqrt(1 - 0.999**300)
    assert float((state["exp_avg_sq_root"].dequantize() / decayed).mean()) == pytest.approx(1, abs=0.03)
    assert float((state["exp_avg"].dequantize() / gradient).mean()) == pytest.approx(1, abs=0.01)


def test_no_step_is_larger_than_those_of_adam_where_a_root_is_rounded_to_zero() -> None:
    module = nn.Linear(64, 64, bias=False)
    step_in_backward(module, optim.Adam, lr=1.0, state_format="S1E2M1/64")
    scales = torch.cat([torch.full((1,), 1e4), torch.full((63,), 1e-2)])  # of a block
    for step in range(20):
        before = module.weight.detach().clone()
        (module.weight * scales * randn(64, 64, seed=step)).sum().backward()
        corrections = (1 - 0.9 ** (step + 1)) / math.sqrt(1 - 0.999 ** (step + 1))
        most = moment_bound(0.9, 0.999, step + 1) / corrections
        assert float((module.weight.detach() - before).abs().max()) <= 1.001 * most


@given(st.floats(0, 0.99), st.floats(0.1, 0.9999), st.lists(st.floats(-10, 10), min_size=1, max_size=12))
def test_the_bound_is_one(beta1: float, beta2: float, gradients: list[float]) -> None:
    first = second = 0.0
    for steps, gradient in enumerate(gradients, 1):
        first, second = (
            beta1 * first + (1 - beta1) * gradient,
            beta2 * second + (1 - beta2) * gradient**2,
        )
        if second:
            assert abs(first) <= moment_bound(beta1, beta2, steps) * math.sqrt(second) * (1 + 1e-6) + 1e-150


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize(("optimizer", "kwargs"), OPTIMIZERS[1:8:3])
def test_training_goes_on_from_a_saved_state(optimizer: type[optim.Optimizer], kwargs: dict[str, Any]) -> None:
    first = model()
    stepping = step_in_backward(first, optimizer, state_format="S1E4M3/64", **kwargs)
    train(first, 3)
    second = copy.deepcopy(first)
    resumed = step_in_backward(second, optimizer, state_format="INT8/256", **kwargs)
    resumed.optimizer.load_state_dict(through_a_file(stepping.optimizer.state_dict()))
    train(first, 3, first=3)
    train(second, 3, first=3)
    assert same_values(first, second)


def test_a_state_in_fp32_is_encoded_when_it_is_loaded() -> None:
    plain = model()
    stepping = step_in_backward(plain, optim.AdamW, lr=1e-3)
    train(plain, 3)
    module = copy.deepcopy(plain)
    packed = step_in_backward(module, optim.AdamW, lr=1e-3, state_format=FINE)
    packed.optimizer.load_state_dict(stepping.optimizer.state_dict())
    for ours, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        state, exact = packed.optimizer.state[ours], stepping.optimizer.state[theirs]
        assert state["step"] == 3 and ("exp_avg_sq_root" in state) == (ours.numel() >= SMALLEST)
        moments = [
            state["exp_avg"],
            state["exp_avg_sq_root"] if ours.numel() >= SMALLEST else exact["exp_avg_sq"].sqrt(),
        ]
        for moment, expected in zip(moments, (exact["exp_avg"], exact["exp_avg_sq"].sqrt()), strict=True):
            moment = moment.dequantize() if isinstance(moment, CompressedTensor) else moment
            torch.testing.assert_close(moment, expected, rtol=1 / 64, atol=1e-8)
    train(module, 3, first=3)


def test_an_optimizer_and_its_variables_can_be_copied() -> None:
    module = model()
    optimizer = step_in_backward(module, optim.AdamW, state_format="S1E4M3/64").optimizer
    train(module, 2)
    twin = copy.deepcopy(optimizer)
    (ours, theirs) = (each.param_groups[0]["params"][0] for each in (optimizer, twin))
    kept = twin.state[theirs]["exp_avg"].dequantize()
    train(module, 2)
    assert torch.equal(twin.state[theirs]["exp_avg"].dequantize(), kept)
    assert not torch.equal(optimizer.state[ours]["exp_avg"].dequantize(), kept)


def test_a_seed_and_a_name_give_the_same_codes() -> None:
    modules = [model(), model()]
    for module in modules:
        step_in_backward(module, optim.AdamW, state_format="S1E4M3/64")
        train(module, 3)
    assert same_values(*modules)


def test_gradients_that_share_memory_are_not_stepped_over() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(64, 64)), nn.Parameter(torch.zeros(4096))

    shared, apart = Sum(), Sum()
    for module in (shared, apart):
        stepped_exactly(module, optim.SGD, lr=0.1, momentum=0.9)
    gradient = randn(4096)
    ((shared.a.view(-1) + shared.b) * gradient).sum().backward()
    (apart.a.view(-1) * gradient).sum().backward()
    (apart.b * gradient).sum().backward()
    assert same_values(shared, apart)


def test_an_accumulated_gradient_makes_one_step() -> None:
    once, twice = model(), model()
    handles = [stepped_exactly(each, optim.AdamW, lr=1e-3) for each in (once, twice)]
    with handles[0].accumulate(), handles[1].accumulate():
        loss(once, 0).backward()
        for _ in range(2):
            (loss(twice, 0) / 2).backward()
    for ours, theirs in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_hooks_and_schedules_see_the_steps() -> None:
    module, seen = model(), []
    optimizer = step_in_backward(module, optim.AdamW, lr=0.1, state_format="S1E4M3/64").optimizer
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    schedule = optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(module, 2)
    schedule.step()
    assert len(seen) == 2 * len(list(module.parameters())) and optimizer.param_groups[0]["lr"] == 0.05


def test_variables_can_have_formats_of_their_own() -> None:
    module = model()
    optimizer = step_in_backward(module, optim.AdamW, state_format="S1E4M3/64").optimizer
    optimizer.param_groups[0]["state_format"] = None
    train(module, 1)
    assert type(optimizer.state[module[0].weight]["exp_avg"]) is torch.Tensor
    assert isinstance(optimizer.state[module[2].weight]["exp_avg"], CompressedTensor)


@pytest.mark.parametrize("optimizer", [optim.SGD, optim.AdamW])
def test_nothing_of_the_size_of_a_variable_is_allocated(optimizer: type[optim.Optimizer]) -> None:
    module = nn.Linear(2048, 1024, bias=False)
    kwargs = {"momentum": 0.9} if optimizer is optim.SGD else {}
    stepping = step_in_backward(module, optimizer, lr=0.1, state_format="S1E4M3/64", **kwargs)
    module.weight.grad = None
    for _ in range(2):
        module.weight.grad = torch.ones_like(module.weight)
        found = allocations(lambda: stepping._step(0))
    assert max(found, default=0) <= 4 * 131072


REFUSED: list[tuple[str, Any, dict[str, Any], type[Exception], str]] = [
    ("another optimizer", optim.RMSprop, {}, PolicyError, "RMSprop cannot be held as codes.*leave state_format out"),
    ("no format", optim.AdamW, {"state_format": "S9E9"}, FormatError, "S9E9"),
    ("one scale", optim.AdamW, {"state_format": "S1E4M3"}, PolicyError, "'S1E4M3'.*such as S1E4M3/64"),
    ("only for sending", optim.AdamW, {"state_format": "DRIVE1"}, PolicyError, "'DRIVE1'.*such as S1E4M3/64"),
    ("amsgrad", optim.AdamW, {"amsgrad": True}, PolicyError, "amsgrad=True.*leave one of them out"),
    ("fused", optim.Adam, {"fused": True}, PolicyError, "fused=True"),
]


@pytest.mark.parametrize(("optimizer", "kwargs", "error", "message"), [row[1:] for row in REFUSED])
def test_what_cannot_be_done_is_refused(optimizer: Any, kwargs: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        step_in_backward(model(), optimizer, **{"state_format": "S1E4M3/64", "lr": 0.1, **kwargs})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "kwargs"), [(optim.SGD, {"momentum": 0.9}), (optim.AdamW, {})])
def test_a_gradient_of_any_float_dtype_may_be_expanded(
    kind: type[optim.Optimizer], kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    modules = model(dtype=dtype), model(dtype=dtype)
    for expands, module in zip((True, False), modules, strict=True):
        optimizer = with_packed_state(kind)(module.parameters(), lr=0.1, state_format=FINE, **kwargs)
        for _ in range(2):
            for parameter in module.parameters():
                gradient = torch.ones((), dtype=dtype).expand(parameter.shape)
                parameter.grad = gradient if expands else gradient.contiguous()
            optimizer.step()
    assert same_values(*modules) and not same_values(modules[0], model(dtype=dtype))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    module = model()
    optimizer = step_in_backward(module, optim.AdamW, state_format="S1E4M3/64").optimizer
    train(module, 1)
    weight, state = module[2].weight, optimizer.state[module[2].weight]
    before = weight.detach().clone(), state["exp_avg"].dequantize(), float(state["step"])
    with pytest.raises(NonFiniteError, match=r"2\.weight has a gradient that is NaN"):
        (weight.sum() * math.nan).backward()
    after = weight.detach(), state["exp_avg"].dequantize(), float(state["step"])
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and before[2] == after[2]


def test_a_sparse_gradient_is_refused() -> None:
    module = nn.Embedding(512, 64, sparse=True)
    step_in_backward(module, optim.SGD, lr=0.1, momentum=0.9, state_format="S1E4M3/64")
    with pytest.raises(RuntimeError, match=r"weight has a sparse gradient.*no state_format"):
        module(torch.tensor([1, 2])).sum().backward()
