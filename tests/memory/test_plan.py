from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedomc
from fedomc import BudgetError, CompressedTensor, MemoryPlan, PolicyError
from fedomc.memory.budget import parse_budget
from tests.memory.test_report import Checkpointed, made

FORMATS: dict[str, Any] = {"parameters": ("FP32", "S1E3M7", "S1E2M3/64"), "activations": ("FP32", "S1E4M3")}


def loss(output: Tensor) -> Tensor:
    return output.square().mean()


def model_of(layers: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(512, 512), nn.GELU())))


def planned(budget: str | int, **kwargs: Any) -> MemoryPlan:
    options = {"loss": loss, "optimizer_class": torch.optim.AdamW, "lr": 1e-3, **FORMATS, **kwargs}
    return fedomc.plan(model_of(), torch.randn(2048, 512), budget, **options)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1 GB", 10**9),
        ("512 MiB", 2**29),
        ("1.5gb", 15 * 10**8),
        (4096, 4096),
        ("7", 7),
        ("2kB", 2000),
        ("1TiB", 2**40),
    ],
)
def test_budgets_are_read_as_people_write_them(text: str | int, nbytes: int) -> None:
    assert parse_budget(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1 GB", "1 XB", "0", 0, -5, True, "1 GB 2", "1e3", "0.1 B", "9" * 400])
def test_what_is_no_budget_is_refused(text: Any) -> None:
    with pytest.raises(PolicyError, match="is not an amount of memory"):
        parse_budget(text)


def test_the_most_precise_combination_that_fits_is_chosen() -> None:
    everything = planned("1 TB")
    assert everything.policy is everything.activations is everything.state_format is None
    assert everything.step_time == 1 and everything.chosen.error == 0
    errors = [each.error for each in everything.considered]
    assert errors == sorted(errors, key=lambda error: round(error, 6))
    smallest = min(everything.considered, key=lambda each: each.peak_bytes)
    budgets = sorted({each.peak_bytes for each in everything.considered})
    for budget in (budgets[0], budgets[len(budgets) // 2], budgets[-1]):
        found = planned(budget)
        assert found.peak_bytes <= budget
        before = found.considered[: found.considered.index(found.chosen)]
        assert all(each.peak_bytes > budget for each in before)
    assert planned(budgets[0]).chosen == smallest
    assert planned(budgets[0]).considered == everything.considered  # deterministic


def test_nothing_fits() -> None:
    with pytest.raises(
        BudgetError, match=r"nothing fits into 1\.0 MB: the smallest peak is .* smaller batch"
    ) as caught:
        planned("1 MB")
    assert isinstance(caught.value, fedomc.OMCError)
    assert caught.value.smallest.peak_bytes > 10**6  # type: ignore[attr-defined]


def test_a_plan_can_be_applied() -> None:
    found = planned("1 TB", parameters=("S1E3M7",), activations=("S1E4M3",), state_formats=("S1E4M3/64",))
    model = model_of()
    applied = found.apply(model)
    assert isinstance(model[0].weight, CompressedTensor)
    loss(model(torch.randn(2048, 512))).backward()
    state = applied.stepping.optimizer.state[model[0].weight]
    assert isinstance(state["exp_avg"], CompressedTensor)
    assert applied.packing is not None and applied.packing.last.ratio < 0.3
    applied.remove()
    loss(model(torch.randn(2, 512))).backward()
    assert type(model[0].weight.grad) is Tensor


def test_checkpoints_are_enabled_where_they_help() -> None:
    def enable(model: nn.Module) -> None:
        assert isinstance(model, Checkpointed)
        model.use_reentrant = False

    model, batch = Checkpointed(use_reentrant=None), torch.randn(8192, 64)
    found = fedomc.plan(model, batch, "1 TB", loss=loss, checkpointing=enable, lr=0.1, **FORMATS)
    with_checkpoints = next(each for each in found.considered if each.error == 0 and each.checkpointing)
    assert with_checkpoints.peak_bytes < 0.7 * found.peak_bytes and model.use_reentrant is None
    chosen = fedomc.plan(model, batch, with_checkpoints.peak_bytes, loss=loss, checkpointing=enable, lr=0.1, **FORMATS)
    assert chosen.chosen == with_checkpoints
    chosen.apply(model)
    assert model.use_reentrant is False


def test_models_of_transformers_have_checkpoints() -> None:
    model, batch = made("gpt2")
    found = fedomc.plan(model, batch, "1 TB", lr=0.1, **FORMATS)
    assert {each.checkpointing for each in found.considered} == {False, True}
    assert not model.is_gradient_checkpointing
    without = fedomc.plan(model, batch, "1 TB", lr=0.1, checkpointing=False, **FORMATS)
    assert {each.checkpointing for each in without.considered} == {False}


def test_a_step_may_not_take_too_long() -> None:
    found = planned("1 TB", max_step_time=1.2)
    assert max(each.step_time for each in found.considered) <= 1.2
    with pytest.raises(PolicyError, match="leaves none"):
        planned("1 TB", max_step_time=0.5)


def test_larger_batches_and_models_on_meta() -> None:
    small, large = planned("1 TB", batch_size=64), planned("1 TB", batch_size=4096)
    assert large.peak_bytes > small.peak_bytes + 8 * 4096 * 512 * 4
    on_meta = fedomc.plan(
        model_of().to("meta"), torch.randn(2048, 512), "1 TB", loss=loss, optimizer_class=torch.optim.AdamW, lr=1e-3,
        **FORMATS,
    )  # fmt: skip
    assert on_meta.considered == planned("1 TB").considered


def test_prints_a_table_of_80_columns() -> None:
    budgets = sorted({each.peak_bytes for each in planned("1 TB").considered})
    found = planned(budgets[0])
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 80
    marked = [line for line in lines if line.startswith(">")]
    assert len(marked) == 1 and str(found.policy) in marked[0]
