import math
import random
from dataclasses import replace

import pytest
import torch

from fedomc_speech.augmentation import Augmentation

NOTHING = Augmentation(stretch=0, warp=0, tilt=0, time_masks=0, mel_masks=0)


def features(frames: int = 200, mels: int = 40) -> torch.Tensor:
    return torch.randn(frames, mels, generator=torch.Generator().manual_seed(0))


def draw(seed: int = 0) -> random.Random:
    return random.Random(seed)  # noqa: S311


def test_a_seed_means_the_same_change_and_the_features_stay_as_they_are() -> None:
    given = features()
    before = given.clone()
    state = torch.random.get_rng_state()
    one, same, other = (Augmentation()(given, draw(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert one.shape != other.shape or not torch.equal(one, other)
    assert torch.equal(given, before) and torch.equal(torch.random.get_rng_state(), state)


def test_nothing_changes_nothing() -> None:
    assert torch.equal(NOTHING(features(), draw()), features())


@pytest.mark.parametrize("seed", range(5))
def test_another_pace_and_another_vocal_tract_read_a_smooth_surface_elsewhere(seed: int) -> None:
    time, mel = torch.arange(300.0)[:, None], torch.arange(40.0)
    surface = torch.sin(time / 40) + torch.cos(mel / 10)  # [T, mels]
    found = replace(NOTHING, stretch=0.2, warp=0.1)(surface, draw(seed))
    expected = draw(seed)
    pace, warp = 1 + expected.uniform(-0.2, 0.2), 1 + expected.uniform(-0.1, 0.1)
    assert len(found) == pytest.approx(300 / pace, abs=0.5)
    rows, bands = torch.arange(len(found))[:, None] * pace, (torch.arange(40) * warp).clamp(max=39)
    assert torch.allclose(found, torch.sin(rows.clamp(max=299) / 40) + torch.cos(bands / 10), atol=3e-3)


def test_the_tilt_is_the_same_in_all_frames_and_smooth() -> None:
    change = replace(NOTHING, tilt=0.5)(features(), draw()) - features()
    assert torch.allclose(change, change[:1].expand_as(change), atol=1e-5)
    assert change.std() > 0.05
    spectrum = torch.fft.rfft(torch.cat([change[0], change[0].flip(0)])).abs()
    assert spectrum[5:].max() < 0.1 * spectrum.max()


def test_the_tilt_is_as_large_as_asked_for() -> None:
    changes = torch.stack([replace(NOTHING, tilt=0.5)(torch.zeros(1, 40), draw(seed))[0] for seed in range(400)])
    assert float(changes.square().mean()) == pytest.approx(0.5**2 * 3 / 2, rel=0.15)  # a cosine's mean square is 1/2


@pytest.mark.parametrize(
    ("augmentation", "dim", "most"),
    [
        (replace(NOTHING, time_masks=1, time_width=0.2), 1, 40),
        (replace(NOTHING, mel_masks=1, mel_width=6), 0, 6),
        (replace(NOTHING, mel_masks=3, mel_width=4), 0, 12),
    ],
)
def test_masks_are_as_broad_as_asked_for(augmentation: Augmentation, dim: int, most: int) -> None:
    widths = [int((augmentation(features(), draw(seed)) == 0).all(dim).sum()) for seed in range(100)]
    assert max(widths) <= most and max(widths) > 0.7 * most and min(widths) < 0.3 * most


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_an_utterance_of_a_few_frames_survives(frames: int) -> None:
    for seed in range(20):
        found = Augmentation()(features(frames), draw(seed))
        assert len(found) >= 1 and all(math.isfinite(value) for value in found.flatten().tolist())
