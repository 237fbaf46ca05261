import warnings

import pytest
import torch
from torch import nn

import fedomc
from fedomc.methods import Encoding, encode
from fedomc.training.fidelity import LOST_LIMIT, Distance, measure, warning_of


@pytest.mark.parametrize("format", ["S1E2M3", "S1E3M7", "S1E2M3/64", "NF4"])
@pytest.mark.parametrize("numel", [1, 1000, 600_000])  # the last takes many stretches
def test_the_error_is_that_of_the_decoded_values(format: str, numel: int) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    how = Encoding.parse(format)
    packed = encode(values, how.format, how.transform)
    found = measure(packed, values)
    decoded = packed.decode(torch.empty(numel))
    assert found.error == pytest.approx(float((decoded - values).double().square().sum()), rel=1e-4, abs=1e-12)
    assert found.size == pytest.approx(float(values.double().square().sum()), rel=1e-4)
    blocks = zip((decoded - values).double().split(1024), values.double().split(1024), strict=True)
    shares = [len(x) * float(error.abs().sum() / x.abs().sum()) for error, x in blocks]
    assert found.lost_share == pytest.approx(sum(shares) / numel, rel=1e-4, abs=1e-9)


def test_of_zeros_nothing_is_lost() -> None:
    how = Encoding.parse("S1E2M3")
    assert measure(encode(torch.zeros(3000), how.format, how.transform), torch.zeros(3000)) == Distance(0.0, 0.0, 0.0)


def model_with_outliers() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[1].weight[0, 0] = 100.0  # type: ignore[operator]
    return model


@pytest.mark.parametrize("format", ["S1E2M3", "S1E2M3+S1E2M1"])
def test_compress_names_what_the_format_cannot_hold(format: str) -> None:
    with pytest.warns(UserWarning, match=r"S1E2M3 cannot hold 1 of 2 variables.*\d+% of 1\.weight\. .*S1E2M3/64"):
        fedomc.compress_(model_with_outliers(), format)


@pytest.mark.parametrize("format", [fedomc.DEFAULT, "S1E4M3", "S1E5M10", "MXFP8"])
def test_formats_that_hold_outliers_do_not_warn(format: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fedomc.compress_(model_with_outliers(), format)


@pytest.mark.parametrize("format", ["S1E2M1", "S1E2M1/64", "NF4", "S1E2M2/128", "S1E2M3", "S1E3M7", "INT4", "MXFP4"])
@pytest.mark.parametrize("draw", [torch.randn, torch.rand], ids=["normal", "uniform"])
def test_weights_without_outliers_do_not_warn(format: str, draw) -> None:  # type: ignore[no-untyped-def]
    model = nn.Linear(256, 256)
    with torch.no_grad():
        model.weight.copy_(draw(256, 256, generator=torch.Generator().manual_seed(1)) * 0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fedomc.compress_(model, format)


def test_the_worst_are_named_first_and_the_others_counted() -> None:
    distances = {f"layer.{i}": Distance(1.0, 1.0, i / 10) for i in range(8)}
    text = warning_of(distances, "S1E2M1")
    assert text is not None and "S1E2M1 cannot hold 4 of 8 variables" in text
    assert "70% of layer.7, 60% of layer.6, 50% of layer.5 and parts of 1 more" in text
    assert warning_of({"a": Distance(1.0, 1.0, LOST_LIMIT)}) is None and warning_of({}) is None
