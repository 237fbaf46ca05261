"""What a round reports: bytes by direction and variable, seconds, errors; as metrics and to TensorBoard."""

import builtins
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.serverapp import strategy as strategies

import fedomc
from fedomc.flower import OMCStrategy, RoundReport
from fedomc.flower.tensorboard import TensorBoard
from tests.flower.test_aggregation import Nodes, answer, decode, model


def a_round(inner: strategies.Strategy, *observers) -> tuple[OMCStrategy, list, list, object]:  # type: ignore[no-untyped-def]
    wrapped = OMCStrategy(inner, fedomc.CompressionPolicy(format="S1E3M7"), observers=observers)
    messages = list(wrapped.configure_train(1, model(), ConfigRecord(), Nodes(3)))  # type: ignore[arg-type]
    replies = [answer(message, 1e-3) for message in messages]
    sizes = [{name: len(a.data) for name, a in r.content["arrays"].items()} for r in replies]
    _, metrics = wrapped.aggregate_train(1, iter(replies))
    return wrapped, messages, sizes, metrics


@pytest.mark.parametrize("inner", [strategies.FedAvg, strategies.FedMedian])
def test_a_report_says_what_was_sent_and_lost(inner: type[strategies.Strategy]) -> None:
    seen: list[RoundReport] = []
    wrapped, messages, sizes, metrics = a_round(inner(), seen.append)
    (report,) = seen
    assert report is wrapped.report
    for name in model():
        assert report.down_bytes[name] == sum(len(m.content["arrays"][name].data) for m in messages)
        assert report.up_bytes[name] == sum(size[name] for size in sizes)
    assert report.down_bytes.total() == wrapped.traffic[-1].down_bytes
    assert report.up_bytes.total() == wrapped.traffic[-1].up_bytes
    own = model()["weight"].numpy().ravel().astype(np.float64)
    missed = decode(messages[0], "weight")[0] - own
    wanted = np.sqrt((missed**2).sum() / (own**2).sum())
    rows = report.by_variable()
    assert rows["weight"]["compression-error"] == pytest.approx(wanted, rel=1e-4)
    assert "compression-error" not in rows["bias"]
    assert report.compression_error == pytest.approx(wanted, rel=1e-4)
    assert min(report.encode_seconds, report.decode_seconds, report.aggregate_seconds) > 0
    assert metrics is not None
    for key, value in report.totals().items():
        assert metrics[f"fedomc.{key}"] == value  # type: ignore[index]
    assert report.metrics()["fedomc.up-bytes/bias"] == report.up_bytes["bias"]


def test_tensorboard_shows_each_round(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    wrapped = a_round(strategies.FedAvg(), board)[0]
    board.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert wrapped.report is not None
    for name, value in wrapped.report.metrics().items():
        (event,) = found.Scalars(name)
        assert event.step == 1 and event.value == pytest.approx(value)


def test_without_tensorboard_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args, **kwargs):  # type: ignore[no-untyped-def]
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"fedomc\[tensorboard\]"):
        TensorBoard(tmp_path)
