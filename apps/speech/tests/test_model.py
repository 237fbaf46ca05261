import itertools

import pytest
import torch
from torch import nn

import fedomc
from fedomc_speech import features, model


def test_tiny_is_about_a_million_parameters_nearly_all_in_matrices() -> None:
    network = model.build("tiny", 21)
    sizes = [(p.numel(), p.dim()) for p in network.parameters()]
    total = sum(numel for numel, _ in sizes)
    assert 1.0e6 < total < 1.1e6
    assert sum(numel for numel, dim in sizes if dim == 1) / total < 0.01
    assert 110e6 < sum(p.numel() for p in model.build("large", 1024).parameters()) < 125e6


def test_on_the_meta_device_everything_but_positions_is_meta() -> None:
    network = model.build("tiny", 21)
    assert all(parameter.is_meta for parameter in network.parameters())
    assert not any(buffer.is_meta for buffer in network.buffers())
    assert not any(isinstance(module, nn.BatchNorm1d) for module in network.modules())


def test_a_seed_means_the_same_model_and_leaves_the_generator_alone() -> None:
    state = torch.random.get_rng_state()
    a, b, c = (model.build("tiny", 5, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)
    assert torch.equal(torch.random.get_rng_state(), state)


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


@pytest.mark.parametrize("format", ["S1E8M23", "S1E3M7"])
def test_compressed_it_computes_what_its_decoded_copy_does(format: str) -> None:
    network = model.build("tiny", 21, seed=0).eval()
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
