"""The handle of packed activations: when packing begins and ends, and what it refuses."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedomc import PolicyError, compress_activations
from fedomc._torch import saved_tensors_hooks
from fedomc.errors import FormatError
from tests.activations.conftest import gradients
from tests.activations.models import Twice, X, build, network
from tests.conftest import same_bits


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("S1E9M3",), FormatError, "S1E9M3"),
        (("DRIVE1",), PolicyError, "DRIVE1 is only for what clients send"),
        (("S1E4M3", "up"), PolicyError, "rounding='up' is unknown"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        compress_activations(nn.Linear(2, 2), arguments[0], **dict(zip(["rounding"], arguments[1:], strict=False)))


def test_a_second_call_is_an_error_until_the_first_is_removed() -> None:
    model, _ = build()
    handle = compress_activations(model, "S1E4M3")
    with pytest.raises(PolicyError, match="already, in S1E4M3: call remove"):
        compress_activations(model, "INT8")
    handle.remove()
    handle.remove()
    compress_activations(model, "INT8").remove()
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_part_of_a_model_may_have_a_format_of_its_own() -> None:
    model, x = build()
    with compress_activations(model, "S1E4M3") as outer, compress_activations(model[0], "S1E2M1") as inner:
        model(x)
    assert inner.last.saved == x.nbytes and outer.last.saved > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_a_copy_packs_nothing(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = build()
    with compress_activations(model, "S1E2M1"):
        other = copied(model)
        found = gradients(other, x)
    assert all(map(same_bits, found, gradients(model, x)))


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_forward_pass_that_fails(kind: type[BaseException], lossless: str) -> None:
    """An interrupt passes by the hooks of a module; the next forward pass, or ``remove``, ends what it left."""
    model, x = build()
    expected = gradients(model, x)

    def fail(*_: Any) -> None:
        raise kind

    with compress_activations(model, lossless):
        hook = model[3].register_forward_pre_hook(fail)
        with pytest.raises(kind):
            model(x)
        hook.remove()
        assert (saved_tensors_hooks() is None) == (kind is ValueError)
        assert all(map(same_bits, gradients(model, x), expected))
        assert saved_tensors_hooks() is None
        hook = model[3].register_forward_pre_hook(fail)
        with pytest.raises(kind):
            model(x)
        hook.remove()
    assert saved_tensors_hooks() is None


def test_a_model_that_calls_itself(lossless: str) -> None:
    class Recursive(Twice):
        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            return self(self.layer(x).tanh(), depth - 1) if depth else x

    model = Recursive()
    expected = gradients(model, X)
    with compress_activations(model, lossless):
        assert all(map(same_bits, gradients(model, X), expected))
    assert saved_tensors_hooks() is None


@pytest.mark.parametrize(
    "compiled",
    [
        lambda m: torch.compile(m, backend="eager"),
        lambda m: [m.compile(backend="eager"), m][1],
        lambda m: nn.Sequential(torch.compile(m, backend="eager")),
    ],
    ids=["model", "in place", "part"],
)
def test_a_compiled_model_is_refused(compiled: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(PolicyError, match="is compiled with torch"):
        compress_activations(compiled(network()), "S1E4M3")


def test_a_model_that_is_compiled_afterwards_is_refused() -> None:
    model, x = build()
    with compress_activations(model, "S1E4M3"):
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(PolicyError, match="is compiled with torch"):
            compiled(x)
        assert saved_tensors_hooks() is None
