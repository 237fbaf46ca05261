import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedomc import CompressedTensor
from tests.conftest import Twice, allocations, assert_same_parameters, compressed, lossless, randn, same_bits


class Cross(nn.Module):
    """Attention to something else than the query."""

    def __init__(self, **kwargs: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)

    def forward(self, q: Tensor, kv: Tensor) -> Tensor:
        return self.attention(q, kv, kv)[0]


class Same(Cross):
    def forward(self, q: Tensor) -> Tensor:
        return self.attention(q, q, q, need_weights=False)[0]


class Tied(nn.Module):
    """An embedding that is the output projection as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.output = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.inner(self.embedding(ids)).tanh())


class Product(nn.Module):
    """A weight used by a function of torch, in several ways."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(8, 8)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


class First(nn.Module):
    """The first output of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


IDS = torch.tensor([[1, 2, 3], [0, 3, 3]])
X, IMAGE = randn(2, 5, 8), randn(2, 4, 7, 9)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6), (X,)),
    "linear, one vector": (lambda: nn.Linear(8, 6), (X[0, 0],)),
    "bilinear": (lambda: nn.Bilinear(8, 8, 3), (X, X + 1)),
    "conv1d": (lambda: nn.Conv1d(5, 6, 3, padding=1), (X,)),
    "conv1d depthwise": (lambda: nn.Conv1d(5, 5, 3, groups=5, dilation=2), (X,)),
    "conv1d padding mode": (lambda: nn.Conv1d(5, 6, 3, padding=1, padding_mode="reflect"), (X,)),
    "conv1d same": (lambda: nn.Conv1d(5, 6, 3, padding="same"), (X,)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), (IMAGE,)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (IMAGE[None],)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(5, 6, 3), (X,)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), (IMAGE,)),
    "transposed conv3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (IMAGE[None],)),
    "embedding": (lambda: nn.Embedding(9, 8), (IDS,)),
    "embedding, padding": (lambda: nn.Embedding(9, 8, padding_idx=3), (IDS,)),
    "embedding, max_norm": (lambda: nn.Embedding(9, 8, max_norm=0.5), (IDS,)),
    "embedding, by frequency": (lambda: nn.Embedding(9, 8, scale_grad_by_freq=True), (IDS,)),
    "embedding bag": (lambda: nn.EmbeddingBag(9, 8), (IDS,)),
    "matmul": (lambda: Product(torch.matmul), (X,)),
    "operator @": (lambda: Product(lambda x, w: x @ w), (X,)),
    "weight on the left": (lambda: Product(lambda x, w: w @ x.mT), (X,)),
    "mm": (lambda: Product(torch.mm), (X[0],)),
    "method mm": (lambda: Product(lambda x, w: x.mm(w)), (X[0],)),
    "bmm": (lambda: Product(lambda x, w: torch.bmm(x, w.expand(2, 8, 8))), (X,)),
    "addmm": (lambda: Product(lambda x, w: torch.addmm(x, x, w)), (X[0],)),
    "einsum": (lambda: Product(lambda x, w: torch.einsum("bti,io->bto", x, w)), (X,)),
    "transposed weight": (lambda: Product(lambda x, w: F.linear(x, w.t())), (X,)),
    "weight with itself": (lambda: Product(lambda x, w: F.linear(F.linear(x, w), w) + (w @ w).sum()), (X,)),
    "weight in plain operators": (lambda: Product(lambda x, w: (x[..., None] * w.exp()).sum(-2) / w.norm()), (X,)),
    "self attention": (Same, (X,)),
    "cross attention": (Cross, (X, randn(2, 3, 8, seed=5))),
    "cross attention, other sizes": (lambda: Cross(kdim=4, vdim=4), (X, randn(2, 3, 4, seed=5))),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (X,)),
    "transformer decoder": (lambda: nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (X, X + 1)),
    "lstm": (lambda: First(nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)), (X,)),
    "lstm, projection": (lambda: First(nn.LSTM(8, 6, proj_size=3)), (X,)),
    "gru": (lambda: First(nn.GRU(8, 6, 2, batch_first=True)), (X,)),
    "rnn": (lambda: First(nn.RNN(8, 6)), (X,)),
    "lstm cell": (lambda: First(nn.LSTMCell(8, 6)), (X[0],)),
    "tied": (Tied, (IDS,)),
    "called twice": (Twice, (X,)),
    "layer norm": (lambda: nn.LayerNorm(8), (X,)),
    "batch norm": (lambda: nn.BatchNorm1d(5), (X,)),
    "prelu": (lambda: nn.PReLU(5), (X,)),
}


def build(name: str, exclude: tuple[str, ...] = ()) -> tuple[nn.Module, nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    plain = make()
    return plain, compressed(plain, exclude=exclude), inputs


def with_gradient(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)


def assert_same_gradients(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert p.grad is not None and same_bits(p.grad, q.grad), name


def train(model: nn.Module, *inputs: Tensor, steps: int = 1, lr: float = 0.01) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(*inputs)
        output.square().sum().backward()
        optimizer.step()
    return output


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # of torch, once a process
class TestSameAsThePlainModel:
    @pytest.mark.parametrize("exclude", [(), ("*bias*",)], ids=["all", "without biases"])
    def test_outputs_and_gradients(self, name: str, exclude: tuple[str, ...]) -> None:
        results = []
        *models, inputs = build(name, exclude)
        for model in models:
            leaves = with_gradient(inputs)
            output = model(*leaves)
            output.square().sum().backward()
            results.append([output, *(x.grad for x in leaves if x.requires_grad)])
        for at, p in models[1].named_parameters():
            assert isinstance(p, CompressedTensor) or (exclude and "bias" in at)
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
        assert_same_gradients(*models)

    def test_training_after_no_grad_and_inference_mode(self, name: str) -> None:
        *models, inputs = build(name)
        outputs = []
        for model in models:
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    first = model(*inputs).clone()
            outputs.append([first, train(model, *inputs, steps=3)])
        # Without gradients torch folds some products otherwise, so that last bits may differ.
        torch.testing.assert_close(outputs[1][0], outputs[0][0])
        assert torch.equal(outputs[1][1], outputs[0][1])
        assert_same_parameters(*models)

    def test_a_copy_works_as_well(self, name: str) -> None:
        plain, packed, inputs = build(name)
        other = copy.deepcopy(packed)
        train(other, *inputs, steps=2)
        train(plain, *inputs, steps=2)
        assert_same_parameters(plain, other)


@pytest.mark.parametrize("name", ["self attention", "transformer layer"])
def test_evaluation(name: str) -> None:
    plain, packed, inputs = build(name)
    with torch.no_grad():  # the plain model takes fused kernels here
        torch.testing.assert_close(packed.eval()(*inputs), plain.eval()(*inputs))


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    plain = nn.Embedding(9, 8, sparse=True)
    packed = compressed(plain)
    train(plain, IDS)
    train(packed, IDS)
    assert_same_parameters(plain, packed)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8, bias=bias), nn.Tanh(), nn.Linear(8, 3, bias=bias))
    packed = compressed(plain)
    outputs = []
    for model in (plain, packed):
        for _ in range(2):
            with torch.autocast("cpu", dtype=dtype):
                output = model(X)
            output.float().square().sum().backward()
        outputs.append(output)
    assert torch.equal(*outputs) and outputs[0].dtype == dtype
    assert_same_gradients(plain, packed)


SIZE = 512
BIG = {
    "linear": (lambda: nn.Linear(SIZE, SIZE, bias=False), (1, SIZE)),
    "linear, three": (lambda: nn.Linear(SIZE, SIZE), (1, 1, SIZE)),
    "bilinear": (lambda: nn.Bilinear(SIZE, 1, SIZE), (1, SIZE)),
    "conv1d": (lambda: nn.Conv1d(SIZE, SIZE, 1), (1, SIZE, 1)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(SIZE, SIZE, 1), (1, SIZE, 1)),
    "conv2d": (lambda: nn.Conv2d(SIZE, SIZE, 1), (1, SIZE, 1, 1)),
    "self attention": (lambda: nn.MultiheadAttention(SIZE // 2, 4), (1, SIZE // 2)),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(SIZE // 4, 4, 4 * SIZE), (1, SIZE // 4)),
    "lstm": (lambda: nn.LSTM(SIZE // 2, SIZE // 2), (2, SIZE // 2)),
    "gru": (lambda: nn.GRU(SIZE // 2, SIZE // 2), (2, SIZE // 2)),
}


@pytest.mark.parametrize("name", BIG)
def test_no_dense_weight_outlives_the_forward_pass(name: str) -> None:
    make, shape = BIG[name]
    model = compressed(make(), "S1E2M3", "scaled-affine")
    x = torch.randn(shape, requires_grad=True)
    inputs = {"self attention": (x, x, x), "bilinear": (x, torch.randn(1, 1))}.get(name, (x,))
    model(*inputs)  # fills caches
    graph: list[Any] = []
    kept = sum(allocations(lambda: graph.append(model(*inputs))))
    assert kept < 4 * SIZE * SIZE / 8
    output = graph[0][0] if isinstance(graph[0], tuple) else graph[0]
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["linear", "called twice", "conv1d", "cross attention", "bilinear", "matmul"])
def test_double_backward(name: str) -> None:
    *models, inputs = build(name)
    for model in models:
        leaves = with_gradient(inputs)
        first = torch.autograd.grad(model(*leaves).pow(3).sum(), leaves, create_graph=True)
        sum(g.square().sum() for g in first).backward()
    assert_same_gradients(*models)


def test_two_parts_train_on_their_sum() -> None:
    torch.manual_seed(0)
    layer = compressed(nn.Linear(8, 6), "S1E2M3", "scaled-affine", update_format="S1E2M3")
    with torch.no_grad():
        layer.weight.add_(0.01)
    plain = nn.Linear(8, 6)
    plain.load_state_dict({name: p.dequantize() for name, p in layer.named_parameters()})
    for model in (plain, layer):
        model(X).square().sum().backward()
    assert_same_gradients(plain, layer)


def test_a_tensor_without_gradient_needs_none() -> None:
    w = lossless(randn(6, 8))
    assert not F.linear(X, w).requires_grad
    assert torch.equal(F.linear(X, w), F.linear(X, w.dequantize()))


KEEPING = {
    "lstm": (lambda: nn.LSTM(8, 64), (200, 8, 8)),
    "gru": (lambda: nn.GRU(8, 64), (200, 8, 8)),
    "lstm cell": (lambda: nn.LSTMCell(8, 64), (1000, 8)),
    "self attention": (lambda: nn.MultiheadAttention(64, 2), (100, 4, 64)),
}


@pytest.mark.parametrize("name", KEEPING)
def test_forward_passes_without_backward_leave_nothing(name: str) -> None:
    make, shape = KEEPING[name]
    model, x = compressed(make()), randn(*shape)
    inputs = (x, x, x) if name == "self attention" else (x,)
    model(*inputs)  # fills caches

    def several() -> None:
        for _ in range(5):
            model(*inputs)

    assert sum(allocations(several)) < x.nbytes


SQUARE, BATCH = randn(8, 8, seed=3), randn(3, 8, 8, seed=4)
OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "mm": lambda out: torch.mm(SQUARE, SQUARE, out=out),
    "matmul": lambda out: torch.matmul(SQUARE, SQUARE, out=out),
    "addmm": lambda out: torch.addmm(SQUARE, SQUARE, SQUARE, out=out),
    "of itself": lambda out: torch.addmm(out, SQUARE, SQUARE, out=out),
    "bmm": lambda out: torch.bmm(BATCH, BATCH, out=out),
    "baddbmm": lambda out: torch.baddbmm(BATCH, BATCH, BATCH, out=out),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", OUT)
def test_products_into_a_compressed_tensor(name: str, autocast: bool) -> None:
    plain = torch.zeros_like(BATCH if "bmm" in name else SQUARE)
    packed = lossless(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        OUT[name](plain)
        assert OUT[name](packed) is packed
    assert same_bits(plain, packed.dequantize()) and plain.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_products_of_compressed_tensors_into_a_plain_one(autocast: bool) -> None:
    outs = [torch.zeros(8, 8) for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for out, weight in zip(outs, (SQUARE, lossless(SQUARE)), strict=True):
            assert torch.mm(weight, SQUARE, out=out) is out
    assert same_bits(*outs) and outs[0].any()


EINSUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda w: torch.einsum("ij->ji", w),
    "transposed, in a list": lambda w: torch.einsum("ij->ji", [w]),
    "transposed, by numbers": lambda w: torch.einsum(w, [0, 1], [1, 0]),
    "as it is": lambda w: torch.einsum("ij", w),
    "diagonal": lambda w: torch.einsum("ii->i", w),
    "sum": lambda w: torch.einsum("ij->i", w),
    "trace": lambda w: torch.einsum("ii", w),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", EINSUMS)
def test_einsum_of_one_operand(name: str, autocast: bool) -> None:
    weights = [nn.Parameter(SQUARE.clone()), nn.Parameter(lossless(SQUARE))]
    found = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for weight in weights:
            found.append([EINSUMS[name](weight)])
            found[-1][0].sin().sum().backward()
            found[-1].append(weight.grad)
            with torch.no_grad():
                EINSUMS[name](weight).mul_(2)  # which may be a view of the weight
            found[-1] += [weight.dequantize() if isinstance(weight, CompressedTensor) else weight]
    assert found[0][0].dtype is found[1][0].dtype is torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class TestLinearSavesWhatItNeeds:
    """For the gradient of the weight the input, for that of the input the weight."""

    def test_a_frozen_layer_does_not_keep_its_input(self) -> None:
        kept = {}
        for trained in (True, False):
            layer = compressed(nn.Linear(8, 8, bias=False)).requires_grad_(trained)
            hidden = X.clone().requires_grad_() * 1
            there = weakref.ref(hidden)
            output = layer(hidden)
            del hidden
            kept[trained] = there() is not None
            output.sum().backward()
        assert kept == {True: True, False: False}

    def test_the_input_of_a_frozen_layer_may_change(self) -> None:
        found = []
        for weight in (SQUARE, lossless(SQUARE)):
            x = X.clone().requires_grad_()
            hidden = x * 1
            hidden.add_(F.linear(hidden, weight))
            hidden.square().sum().backward()
            found.append([hidden, x.grad])
        assert all(same_bits(a, b) for a, b in zip(*found, strict=True))

    def test_the_weight_may_change_if_the_input_needs_no_gradient(self) -> None:
        gradients = []
        for weight in (nn.Parameter(SQUARE.clone()), nn.Parameter(lossless(SQUARE))):
            outputs = [F.linear(X, weight).sum() for _ in range(2)]
            for output in outputs:
                output.backward()
                with torch.no_grad():
                    weight.add_(1)
            gradients.append(weight.grad)
        assert same_bits(*gradients)
