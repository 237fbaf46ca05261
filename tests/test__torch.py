"""One test of each private name of torch: where a new version changes one, its test says what is missing now."""

import ast
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

import fedomc
from fedomc import _torch

SOURCE = Path(fedomc.__file__).parent


class Wrapper(Tensor):
    """A subclass with no memory, which counts the functions that come to it."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        Wrapper.calls += 1
        with _torch.no_overrides():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        return torch.ones(2, 3)


class Plain(Tensor):
    __torch_function__ = _torch.without_overrides


def wrapper(requires_grad: bool = False) -> Wrapper:
    return _torch.wrapper_tensor(Wrapper, (2, 3), torch.float32, torch.device("cpu"), requires_grad)


def test_wrapper_tensor() -> None:
    x = wrapper(requires_grad=True)
    assert type(x) is Wrapper and x.shape == (2, 3) and x.dtype is torch.float32 and x.requires_grad


def test_no_overrides() -> None:
    x, before = wrapper(), Wrapper.calls
    assert torch.equal(torch.add(x, 1), torch.ones(2, 3)) and Wrapper.calls == before + 1
    with _torch.no_overrides():
        torch.add(x, 1)
    assert Wrapper.calls == before + 1


def test_apply_untransformed() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return 2 * gradient

    x = torch.ones(3, requires_grad=True)
    y = _torch.apply_untransformed(Double)(x)
    y.sum().backward()
    assert torch.equal(y, 2 * torch.ones(3)) and torch.equal(x.grad, 2 * torch.ones(3))


def test_without_overrides() -> None:
    x = torch.ones(3).as_subclass(Plain)
    assert not torch.overrides.has_torch_function((x,)) and torch.overrides.has_torch_function((wrapper(),))


def test_forbid_memory_access() -> None:
    x = wrapper()
    _torch.forbid_memory_access(x)
    with pytest.raises(RuntimeError, match="Cannot access data pointer"), _torch.no_overrides():
        x.data_ptr()


def test_transforms_are_active() -> None:
    found = []
    assert not _torch.transforms_are_active()
    torch.func.grad(lambda x: (found.append(_torch.transforms_are_active()), x.sum())[1])(torch.ones(2))
    torch.func.vmap(lambda x: (found.append(_torch.transforms_are_active()), x)[1])(torch.ones(2))
    with forward_ad.dual_level():
        found.append(_torch.transforms_are_active())
    assert found == [True, True, True] and not _torch.transforms_are_active()


@_torch.uncompiled("for a test")
def _left_alone(x: Tensor) -> Tensor:
    return _called_by_it(x)


def _called_by_it(x: Tensor) -> Tensor:
    return x + (1 if torch.compiler.is_compiling() else 2)


def test_uncompiled() -> None:
    torch._dynamo.reset()
    compiled_frames = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        compiled_frames.append(graph.print_readable(print_output=False))
        return graph.forward

    found = torch.compile(lambda x: _left_alone(x * 3) * 5, backend=backend)(torch.ones(2))
    assert torch.equal(found, torch.full((2,), 25.0))
    assert len(compiled_frames) == 2 and not any("add" in frame for frame in compiled_frames)
    torch._dynamo.reset()
    reasons = torch._dynamo.explain(lambda x: _left_alone(x * 3) * 5)(torch.ones(2)).break_reasons
    assert ["for a test" in str(reason.reason) for reason in reasons] == [True]


def test_schema_of() -> None:
    schema = _torch.schema_of(torch.ops.aten.add_.Tensor)
    assert schema.name == "aten::add_"
    assert [argument.name for argument in schema.arguments] == ["self", "other", "alpha"]
    assert [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments] == [True, False, False]
    (view,) = _torch.schema_of(torch.ops.aten.select.int).returns
    assert view.alias_info is not None and not view.alias_info.is_write


def test_storage_is_shared() -> None:
    p = nn.Parameter(torch.ones(2, 3))
    p.sum().mul(2).backward()
    x = torch.zeros(4)
    assert not _torch.storage_is_shared(x) and not _torch.storage_is_shared(p.grad)
    view = x.view(2, 2)
    assert _torch.storage_is_shared(x) and _torch.storage_is_shared(view)
    del view
    assert not _torch.storage_is_shared(x)


def test_parameters_by_module() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False)))
    assert [id(x) for x in _torch.parameters_by_module(model)] == [id(x) for x in model.parameters()]


def test_hooks() -> None:
    p = nn.Parameter(torch.ones(3))
    assert not _torch.has_step_hooks(p)
    handle = p.register_hook(lambda gradient: None)
    assert not _torch.has_step_hooks(p)
    handle.remove()
    handle = p.register_post_accumulate_grad_hook(lambda parameter: None)
    assert _torch.has_step_hooks(p)
    handle.remove()
    assert not _torch.has_step_hooks(p)


class Swapped(torch.Tensor):
    def _use_count(self) -> int:
        _torch.keep_hooks_in_swap(self)
        return _torch.use_count(self)


def test_hooks_survive_a_swap() -> None:
    """``torch.utils.swap_tensors`` asks both tensors, which it calls t1 and t2, for their use count before it swaps."""
    one, other = (torch.full((3,), value).as_subclass(Swapped).requires_grad_() for value in (1.0, 2.0))
    calls: list[str] = []
    one.register_hook(lambda gradient: calls.append("gradient"))
    one.register_post_accumulate_grad_hook(lambda parameter: calls.append("step"))
    torch.utils.swap_tensors(one, other)
    assert one.detach().tolist() == [2, 2, 2]
    one.sum().backward()
    assert calls == ["gradient", "step"]


def test_hooks_registered_after_a_swap_are_called() -> None:
    one, other = (torch.full((3,), value).as_subclass(Swapped).requires_grad_() for value in (1.0, 2.0))
    one.register_hook(lambda gradient: None).remove()
    torch.utils.swap_tensors(one, other)
    calls: list[torch.Tensor] = []
    one.register_hook(calls.append)
    one.register_post_accumulate_grad_hook(calls.append)
    one.sum().backward()
    assert len(calls) == 2


def test_hooks_are_not_lost_where_torch_swaps_in_another_way() -> None:
    one = torch.ones(3).as_subclass(Swapped).requires_grad_()
    one.register_hook(lambda gradient: None)
    with pytest.raises(RuntimeError, match="hooks of a tensor would be lost"):
        one._use_count()


def test_use_count() -> None:
    p = torch.ones(3)
    assert _torch.use_count(p) == 1
    view = p[0]
    assert _torch.use_count(p) == 2
    assert view is not None


def test_swap_tensors_asks_for_the_use_count() -> None:
    class Counted(Tensor):
        asked = 0

        def _use_count(self) -> int:
            Counted.asked += 1
            return _torch.use_count(self)

    torch.utils.swap_tensors(torch.ones(3).as_subclass(Counted), torch.ones(3).as_subclass(Counted))
    assert Counted.asked == 2


def test_run_next_in_backward() -> None:
    order: list[str] = []
    x = torch.ones(3, requires_grad=True)
    first, last = x * 2, x * 3
    for name, y in (("first", first), ("last", last)):
        y.grad_fn.register_hook(lambda *_, name=name: order.append(name))
    y = first + last
    _torch.run_next_in_backward(first)  # it was made before, and would run after it
    y.sum().backward()
    assert order == ["first", "last"]


def test_saved_tensors_hooks() -> None:
    assert _torch.saved_tensors_hooks() is None
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x + 1, lambda x: x - 1):
        pack, unpack = _torch.saved_tensors_hooks()
    assert pack(torch.ones(1)) == 2 and unpack(torch.ones(1)) == 0


def test_current_node() -> None:
    found = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            found.append(_torch.current_node())
            return gradient

    y = Function.apply(torch.ones(3, requires_grad=True))
    y.sum().backward()
    assert found == [y.grad_fn] and _torch.current_node() is None
    assert y.grad_fn.next_functions[0][0].name() == "torch::autograd::AccumulateGrad"


@pytest.mark.parametrize("reentrant", [True, False])
def test_in_reentrant_checkpoint(reentrant: bool) -> None:
    found = []
    weight = torch.ones(3, requires_grad=True)
    weight.register_post_accumulate_grad_hook(lambda _: found.append(_torch.in_reentrant_checkpoint()))
    x = torch.ones(3, requires_grad=True)
    checkpoint(lambda x: x * weight, x, use_reentrant=reentrant).sum().backward()
    assert found == [reentrant] and not _torch.in_reentrant_checkpoint()


def test_storage_key() -> None:
    x, y = torch.ones(3), torch.ones(3)
    assert _torch.storage_key(x.untyped_storage()) == _torch.storage_key(x[1:].untyped_storage())
    assert _torch.storage_key(x.untyped_storage()) != _torch.storage_key(y.untyped_storage())
    keys = {_torch.storage_key(torch.empty(3, device="meta").untyped_storage()) for x in (x, y)}
    assert all(isinstance(key, int) for key in keys)


def test_a_weak_reference_keeps_the_key_of_a_storage() -> None:
    storage = torch.ones(10**6).untyped_storage()
    key, reference = _torch.storage_key(storage), _torch.StorageWeakRef(storage)
    assert reference.cdata == key and not reference.expired()
    del storage
    assert reference.expired()
    assert key not in [_torch.storage_key(torch.ones(10**6).untyped_storage()) for _ in range(100)]


def test_is_compiled() -> None:
    layer = nn.Linear(2, 2)
    assert not _torch.is_compiled(layer) and _torch.is_compiled(torch.compile(layer, backend="eager"))
    layer.compile(backend="eager")
    assert _torch.is_compiled(layer)


def test_is_called_compiled() -> None:
    found = []

    @_torch.uncompiled("a test")
    def ask() -> None:
        found.append(_torch.is_called_compiled())

    def function(x: Tensor) -> Tensor:
        ask()
        return x + 1

    function(torch.ones(2))
    torch.compile(function, backend="eager")(torch.ones(2))
    assert found == [False, True]


def test_is_called_by() -> None:
    names = {"__name__": "one.two", "ask": _torch.is_called_by}
    for packages, expected in [(("one",), True), (("one.two",), True), (("x", "one.two"), True), (("one.tw",), False)]:
        assert eval("ask(*packages)", names, {"packages": packages}) is expected  # noqa: S307
    assert _torch.is_called_by("tests") and not _torch.is_called_by("fedomc", "_pytest")


def test_running_modules() -> None:
    class Nested(nn.Module):
        def forward(self, depth: int) -> list[list[nn.Module]]:
            return [list(_torch.running_modules()), *(self(depth - 1) if depth else [])]

    model = Nested()
    outer = nn.Sequential(model)
    assert list(_torch.running_modules()) == []
    assert outer(1) == [[model, outer], [model, model, outer]]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    found, inside = [], []

    def pack(x: Tensor) -> Tensor:
        found.append((x.numel(), _torch.saved_by_checkpoint()))
        return x

    def region(x: Tensor) -> Tensor:
        inside.append(_torch.in_checkpoint())
        return x.exp()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        x = torch.ones(3, requires_grad=True)
        checkpoint(region, x * 1, use_reentrant=reentrant).exp()
        assert not _torch.in_checkpoint()
    assert (3, True) in found and (3, False) in found
    assert inside == [not reentrant]


def test_sparse_parts() -> None:
    indices, values = torch.tensor([[0, 0, 1], [1, 1, 2]]), torch.arange(3.0)
    found = _torch.sparse_parts(torch.sparse_coo_tensor(indices, values, (2, 3)))
    assert torch.equal(found[0], indices) and torch.equal(found[1], values)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a build of torch without oneDNN")
@pytest.mark.parametrize("bias", [None, torch.arange(5.0)])
def test_linear_of_onednn(bias: Tensor | None) -> None:
    x, weight = torch.rand(3, 4), torch.rand(5, 4)
    found = _torch.linear_of_onednn()(x, weight, bias, "none", [], "")
    torch.testing.assert_close(found, nn.functional.linear(x, weight, bias))


def test_processor_name() -> None:
    assert isinstance(_torch.processor_name(), str)


def test_without_grad() -> None:
    with _torch.without_grad():
        assert not torch.is_grad_enabled()
        with _torch.without_grad():
            assert not torch.is_grad_enabled()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_dispatch_is_watched() -> None:
    class Mode(_torch.TorchDispatchMode):
        pass

    assert not _torch.dispatch_is_watched()
    with Mode():
        assert _torch.dispatch_is_watched()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert _torch.dispatch_is_watched()
    assert not _torch.dispatch_is_watched()


def test_steps_plainly() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    assert _torch.steps_plainly(optimizer)
    for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
        handle = register(lambda *args: None)
        assert not _torch.steps_plainly(optimizer)
        handle.remove()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert not _torch.steps_plainly(optimizer), "the scheduler wants to see a step"
    optimizer.step()
    scheduler.step()
    assert _torch.steps_plainly(optimizer)
    handle = register_optimizer_step_pre_hook(lambda *args: None)
    assert not _torch.steps_plainly(optimizer)
    handle.remove()
    optimizer.step = lambda: None  # type: ignore[method-assign]
    assert not _torch.steps_plainly(optimizer)


def test_trees() -> None:
    tree = {"a": [1, (2, torch.return_types.max((torch.ones(1), torch.zeros(1))))]}
    assert len(_torch.tree_leaves(tree)) == 4
    assert isinstance(_torch.tree_map(lambda x: x, tree)["a"][1][1], torch.return_types.max)


def test_dispatch_mode() -> None:
    class Mode(_torch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            return func(*args, **(kwargs or {})) + 1

    with Mode():
        x = torch.ones(())
    assert x == 2


def test_fake_tensors() -> None:
    mode = _torch.FakeTensorMode(allow_non_fake_inputs=True)
    x = mode.from_tensor(torch.ones(3, 4))
    assert isinstance(x, _torch.FakeTensor) and not _torch.has_constant(x)
    with mode:
        assert _torch.has_constant(torch.tensor(3))
        assert (x @ torch.ones(4, 2)).shape == (3, 2)
        with pytest.raises(_torch.DynamicOutputShapeException):
            x.nonzero()
        with pytest.raises(_torch.DataDependentOutputException):
            x[0, 0].item()
    with pytest.raises(AttributeError, match="no_such_name"):
        _torch.no_such_name  # noqa: B018


def test_is_plain() -> None:
    fake = _torch.FakeTensorMode().from_tensor(torch.ones(2))
    for x, plain in ((torch.ones(2), True), (nn.Parameter(torch.ones(2)), True), (fake, True), (wrapper(), False)):
        assert _torch.is_plain(x) == plain
    assert _torch.is_plain(nn.Parameter(fake)) and not _torch.is_plain(2.0)


def private_names() -> set[str]:
    """Return the private attributes of what torch gives us."""
    node = (torch.ones(1, requires_grad=True) * 2).grad_fn
    owners = (Tensor, nn.Parameter, torch.UntypedStorage, torch.ops.aten.add.Tensor, node, forward_ad, torch._C)
    names = {name for owner in owners for name in dir(owner) if name.startswith("_") and not name.startswith("__")}
    return names - {"_version"}  # which torch documents


def uses(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        at = f"{path.relative_to(SOURCE)}:{getattr(node, 'lineno', 0)}"
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if modules and any(part.startswith("_") for name in modules for part in name.split(".")):
            if not any(name.startswith("fedomc") for name in modules):
                found += [at] if modules[0].startswith("torch") else []
        if isinstance(node, ast.Attribute) and node.attr in INTERNALS:
            found.append(f"{at} {ast.unparse(node)}")
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            chain = ast.unparse(node)
            own = chain.startswith(("self.", "cls.", "ctx."))
            operator = ".".join(chain.split(".")[:-1]) in ("_aten", "torch.ops.aten")
            if not operator and (chain.startswith("torch.") or (node.attr in PRIVATE and not own)):
                found.append(f"{at} {chain}")
    return found


PRIVATE = private_names()
INTERNALS = {"_getframe", "f_back", "f_code", "f_locals", "constant"}
"""What looks at frames of the call stack or into fake tensors."""
DOORS = {"_torch.py", "_flower.py", "_nvflare.py"}


def test_nothing_else_uses_private_names_of_torch() -> None:
    others = [path for path in sorted(SOURCE.rglob("*.py")) if path.name not in DOORS]
    assert [use for path in others for use in uses(path)] == []
    assert uses(SOURCE / "_torch.py")  # that the test sees them


def test_every_name_is_tested() -> None:
    text = Path(__file__).read_text()
    assert [name for name in _torch.__all__ if f"_torch.{name}" not in text] == []
