import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import fedomc
from fedomc_speech import corpus, features, model, training
from fedomc_speech.settings import Settings, Variant
from fedomc_speech.tokens import tokenizer_for


@pytest.mark.parametrize("streaming", [False, True])
def test_tiny_is_about_a_million_parameters_nearly_all_in_matrices(streaming: bool) -> None:
    network = model.build("tiny", 21, streaming=streaming)
    sizes = [(p.numel(), p.dim()) for p in network.parameters()]
    total = sum(numel for numel, _ in sizes)
    assert 1.0e6 < total < 1.1e6
    assert sum(numel for numel, dim in sizes if dim == 1) / total < 0.01
    assert 110e6 < sum(p.numel() for p in model.build("large", 1024, streaming=streaming).parameters()) < 125e6


@pytest.mark.parametrize("streaming", [False, True])
def test_on_the_meta_device_everything_but_positions_is_meta(streaming: bool) -> None:
    network = model.build("tiny", 21, streaming=streaming)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert not any(buffer.is_meta for buffer in network.buffers())
    assert not any(isinstance(module, nn.BatchNorm1d) for module in network.modules())


@pytest.mark.parametrize("streaming", [False, True])
def test_filled_on_the_meta_device_it_is_the_same_model(streaming: bool) -> None:
    filled = model.build("tiny", 21, streaming=streaming)
    built = model.build("tiny", 21, seed=0, streaming=streaming).eval()
    filled.load_state_dict(built.state_dict(), assign=True)
    inputs, frames = torch.randn(1, 100, 40), torch.tensor([100])
    with torch.no_grad():
        assert torch.equal(filled.eval()(inputs, frames)[0], built(inputs, frames)[0])


@pytest.mark.parametrize("streaming", [False, True])
def test_all_matrices_but_the_biases_of_attention_are_compressed(streaming: bool) -> None:
    network = model.build("tiny", 21, streaming=streaming)
    policy = Variant.parse("S1E3M7").policy(Settings())
    assert policy is not None
    matrices = {name for name, p in network.named_parameters() if sum(size > 1 for size in p.shape) >= 2}
    assert {name.rpartition(".")[2] for name in matrices - set(policy.select(network))} == {"bias_u", "bias_v"}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_seed_means_the_same_model_and_leaves_the_generator_alone(streaming: bool) -> None:
    state = torch.random.get_rng_state()
    a, b, c = (model.build("tiny", 5, seed=seed, streaming=streaming).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("streaming", [False, True])
def test_packed_without_loss_it_trains_as_fp32_does(tones: Path, streaming: bool) -> None:
    loaded = corpus.load("an4", tones)
    tokenizer = tokenizer_for(loaded)
    plain, packed = (model.build("tiny", tokenizer.vocab_size, seed=0, streaming=streaming) for _ in range(2))
    start = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    policy = fedomc.CompressionPolicy("S1E8M23", transform="none", exclude=("*.bias_u", "*.bias_v"))
    fedomc.compress_(packed, policy.select(packed))
    losses = []
    with torch.backends.mkldnn.flags(enabled=False):  # whose sums have another order
        for network in (plain, packed):
            result = training.train_locally(
                network, loaded.train, tokenizer, steps=3, batch=4, learning_rate=0.1, clip_norm=0.3, seed=0
            )
            losses.append(result.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    found = fedomc.decompress_(packed).state_dict()
    for name, parameter in plain.named_parameters():
        moved = (parameter.detach() - start[name]).norm()
        assert moved > 0
        assert (parameter.detach() - found[name]).norm() < 1e-3 * moved, name


@pytest.mark.parametrize("lengths", [(120, 200), (40, 1000), (1, 9), (57, 64)])
def test_padding_changes_nothing_in_a_streaming_model(lengths: tuple[int, int]) -> None:
    network = model.build("tiny", 21, seed=0, streaming=True).eval()
    short, long = (torch.randn(length, 40) for length in lengths)
    batch, alone = features.pad([short, long]), features.pad([short])

    def gradients(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        names, parameters = zip(*network.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    together, found = network(batch.features, batch.frames)
    single, single_found = network(alone.features, alone.frames)
    assert found[0] == single_found[0] == single.shape[1]
    torch.testing.assert_close(together[0, : found[0]], single[0], rtol=0, atol=1e-5)
    weights = torch.randn_like(single[0])
    expected = gradients((single[0] * weights).sum())
    for name, gradient in gradients((together[0, : found[0]] * weights).sum()).items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-3, atol=1e-3 * float(expected[name].abs().max()) + 1e-6
        )


def test_padding_does_not_change_what_is_heard() -> None:
    network = model.build("tiny", 21, seed=0).eval()
    short, long = torch.randn(120, 40), torch.randn(200, 40)
    batch = features.pad([short, long])
    alone = features.pad([short])
    with torch.no_grad():
        together, lengths = network(batch.features, batch.frames)
        single, single_lengths = network(alone.features, alone.frames)
    assert lengths[0] == single_lengths[0] == 15
    # GroupNorm in the convolution module averages over the padding too: close, not equal.
    assert torch.allclose(together[0, :15].exp(), single[0].exp(), atol=0.2)


def ctc_by_enumeration(log_probabilities: torch.Tensor, target: list[int]) -> torch.Tensor:
    """Sum the probability of every path that collapses to the target."""
    frames, tokens = log_probabilities.shape
    paths = []
    for path in itertools.product(range(tokens), repeat=frames):
        collapsed = [token for token, _ in itertools.groupby(path) if token]
        if collapsed == target:
            paths.append(sum(log_probabilities[i, token] for i, token in enumerate(path)))
    return -torch.logsumexp(torch.stack(paths), 0)


def test_the_loss_is_that_of_ctc() -> None:
    network = model.build("tiny", 3, seed=0).eval()
    inputs, frames = torch.randn(1, 40, 40), torch.tensor([40])
    with torch.no_grad():
        loss = network.ctc_loss(inputs, frames, [[1, 2]])
        log_probabilities, lengths = network(inputs, frames)
    expected = ctc_by_enumeration(log_probabilities[0, : lengths[0]], [1, 2]) / 2  # torch divides by the tokens
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("format", ["S1E8M23", "S1E3M7"])
def test_compressed_it_computes_what_its_decoded_copy_does(format: str, streaming: bool) -> None:
    network = model.build("tiny", 21, seed=0, streaming=streaming).eval()
    policy = fedomc.CompressionPolicy(format, transform="none" if format == "S1E8M23" else "scaled-affine")
    fedomc.compress_(network, policy.select(network))
    inputs, frames = torch.randn(2, 100, 40), torch.tensor([100, 80])
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):  # whose sums have another order
        packed = network(inputs, frames)[0]
        dense = fedomc.decompress_(network)(inputs, frames)[0]
    assert torch.equal(packed, dense)


def test_features_are_normalised_and_a_hundred_a_second() -> None:
    import numpy as np

    tone = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000).astype(np.float32)
    found = features.log_mel(tone, 40)
    assert found.shape == (101, 40)
    assert abs(float(found.mean())) < 1e-4 and float(found.std()) == pytest.approx(1, abs=1e-3)
    # The strongest band is the one whose centre on the mel scale is nearest to 440 Hz.
    higher = features.log_mel(np.sin(2 * np.pi * 3000 * np.arange(16000) / 16000).astype(np.float32), 40)
    assert int(found.mean(0).argmax()) < int(higher.mean(0).argmax())
