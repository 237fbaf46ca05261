"""Buffered asynchronous rounds: against a reference, with late, dying and hostile clients, and resumed."""

import gc
import math
import random
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message
from flwr.serverapp import Grid
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Strategy

import fedomc
from benchmarks.virtual_grid import VirtualGrid
from fedomc.flower import FedBuff, OMCStrategy, asynchronous
from fedomc.flower.arrays import STYPE
from fedomc.flower.downlink import Broadcast
from fedomc.flower.in_flight import InFlight
from fedomc.flower.mapped import MappedArray
from fedomc.serialization.checkpointing import Checkpoints
from tests.flower.test_aggregation import SHAPE, answer, decode, model
from tests.flower.test_strategy import Best

NODES = range(1, 21)
POLICY = fedomc.CompressionPolicy("S1E3M7", fraction=0.5)


def seconds(message: Message) -> float:
    """Return the time of a node: the last ones are ten times as slow as the first ones."""
    node = message.metadata.dst_node_id
    return 1 + node / 7 if node <= 15 else 11 + node / 7


def inner(**kwargs: float) -> FedAvg:
    return FedAvg(**{"fraction_train": 0.5, "fraction_evaluate": 0.0, **kwargs})  # type: ignore[arg-type]


def round_of(message: Message) -> int:
    number = message.content["config"]["server-round"]
    assert isinstance(number, int)
    return number


def good(message: Message) -> Message:
    return answer(message, 1e-2)


def run(
    reply_to: Callable[[Message], Message | None] = good,
    strategy: OMCStrategy | None = None,
    rounds: int = 6,
    time_of: Callable[[Message], float] = seconds,
    timeout: float = 100,
    nodes: range = NODES,
) -> tuple[ArrayRecord, OMCStrategy, VirtualGrid]:
    strategy = strategy or FedBuff(inner(), POLICY, buffer_size=4)
    grid = VirtualGrid(nodes, reply_to, time_of)
    with grid.as_grid() as connected:
        result = strategy.start(connected, model(), num_rounds=rounds, timeout=timeout)
    return result.arrays, strategy, grid


class Recorder:
    """Answers messages, and computes in float64 what the server should make of the answers."""

    def __init__(
        self,
        size: int,
        bad: Callable[[Message, Message], Message | None] | None = None,
        factor: Callable[[int], float] = lambda staleness: 1 / math.sqrt(1 + staleness),
    ) -> None:
        self.factor = factor
        self.values = {name: array.numpy().astype(np.float64).ravel() for name, array in model().items()}
        self.size, self.step, self.bad = size, 1, bad
        self.staleness: list[list[int]] = [[]]
        self.nodes: list[list[int]] = [[]]
        self._sum = {name: np.zeros_like(values) for name, values in self.values.items()}
        self._weight = 0.0

    def __call__(self, message: Message) -> Message | None:
        reply = good(message)
        if self.bad is not None:
            bad = self.bad(message, reply)
            if bad is not reply:
                return bad
        weight, staleness = message.metadata.dst_node_id, self.step - round_of(message)
        self.staleness[-1].append(staleness)
        self.nodes[-1].append(message.metadata.dst_node_id)
        for name, total in self._sum.items():
            change = decode(reply, name)[0] - decode(message, name)[0]
            total += weight * change * self.factor(staleness)
        self._weight += weight
        if len(self.nodes[-1]) == self.size:
            for name, total in self._sum.items():
                self.values[name] += total / self._weight
                total[:] = 0
            self._weight, self.step = 0.0, self.step + 1
            self.staleness.append([])
            self.nodes.append([])
        return reply


def assert_is(arrays: ArrayRecord, recorder: Recorder) -> None:
    for name, values in recorder.values.items():
        np.testing.assert_allclose(arrays[name].numpy().ravel(), values, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("policy", [None, POLICY, fedomc.CompressionPolicy("S1E4M14")])
def test_each_step_is_the_mean_of_the_changes_weighted_by_staleness(policy: fedomc.CompressionPolicy | None) -> None:
    recorder = Recorder(4)
    arrays, strategy, _ = run(recorder, FedBuff(inner(), policy, buffer_size=4, weight_cap=None), rounds=12)
    assert_is(arrays, recorder)
    assert max(map(max, recorder.staleness[:-1])) >= 3  # that of slow nodes
    assert [row.received for row in strategy.traffic] == [4] * 12
    assert strategy.report is not None
    assert strategy.report.staleness == pytest.approx(np.mean(recorder.staleness[-2]))
    assert all(len(set(nodes)) == 4 for nodes in recorder.nodes[:-1])


def test_a_change_without_weight_counts_in_the_mean_of_a_step() -> None:
    """Whatever it is added together with: here there are steps in which all stale replies come one after the other."""

    def fresh(staleness: int) -> float:
        return float(staleness == 0)

    recorder = Recorder(8, factor=fresh)
    strategy = FedBuff(inner(), POLICY, buffer_size=8, weight_cap=None, staleness_weight=fresh)
    arrays, _, _ = run(recorder, strategy, rounds=8)
    assert_is(arrays, recorder)


def test_with_a_buffer_of_all_clients_it_is_the_synchronous_mean() -> None:
    results = []
    for strategy in (
        FedBuff(inner(fraction_train=1.0), POLICY, buffer_size=20),
        OMCStrategy(inner(fraction_train=1.0), POLICY),
    ):
        arrays, _, grid = run(strategy=strategy, rounds=3)
        results.append(({name: array.numpy() for name, array in arrays.items()}, strategy.traffic, grid.now))
    for name, values in results[0][0].items():
        np.testing.assert_allclose(values, results[1][0][name], atol=1e-6, err_msg=name)
    assert results[0][1:] == results[1][1:]


def test_as_many_clients_work_as_the_inner_strategy_selects_and_nobody_waits() -> None:
    sent = Counter[int]()

    def counted(message: Message) -> Message:
        sent[message.metadata.dst_node_id] += 1
        return good(message)

    _, strategy, grid = run(counted, rounds=30)
    assert len(grid.asked) == 10 + 4 * 29 + 3  # the last step's fourth reply is not replaced
    assert sum(row.sent for row in strategy.traffic) == len(grid.asked)
    assert sent.keys() == set(NODES)  # slow ones are heard, too
    _, synchronous, waiting = run(strategy=OMCStrategy(inner(), POLICY), rounds=12)
    assert sum(row.received for row in synchronous.traffic) == sum(row.received for row in strategy.traffic)
    assert grid.now < 0.7 * waiting.now


def test_dead_nodes_are_left_out_and_their_places_are_taken(flower_log: pytest.LogCaptureFixture) -> None:
    def dying(message: Message) -> float:
        return math.inf if message.metadata.dst_node_id <= 8 else seconds(message)

    recorder = Recorder(4)
    random.seed(1)
    arrays, strategy, grid = run(recorder, FedBuff(inner(), POLICY, buffer_size=4, weight_cap=None), 12, dying, 15)
    assert [row.received for row in strategy.traffic] == [4] * 12
    assert_is(arrays, recorder)
    assert "no reply came in time; another node is asked" in flower_log.text
    assert len(grid.asked) > 10 + 4 * 11 + 3  # messages instead of those that were lost


BAD: dict[str, Callable[[Message, Message], Message | None]] = {
    "an error": lambda message, reply: Message(Error(1, "no memory"), reply_to=message),
    "garbage": lambda message, reply: changed(reply, "weight", Array("float32", SHAPE, STYPE, b"garbage")),
    "another shape": lambda message, reply: changed(reply, "bias", Array(np.zeros(3, np.float32))),
    "not a number": lambda message, reply: changed(reply, "bias", Array(np.full(50, np.nan, np.float32))),
    "no weight": lambda message, reply: without_weight(reply),
    "another sender": lambda message, reply: with_metadata(reply, "_src_node_id", 19),
    "another message": lambda message, reply: with_metadata(reply, "_reply_to_message_id", "message 0"),
}


def changed(reply: Message, name: str, array: Array) -> Message:
    record = ArrayRecord()
    for key, old in reply.content["arrays"].items():
        record[key] = array if key == name else old
    reply.content["arrays"] = record
    return with_content(reply)


def with_content(reply: Message) -> Message:
    copy = Message(reply.content, reply.metadata.dst_node_id, "train")
    copy.metadata.__dict__.update(reply.metadata.__dict__)
    return copy


def without_weight(reply: Message) -> Message:
    del reply.content["metrics"]["num-examples"]
    return with_content(reply)


def with_metadata(reply: Message, name: str, value: object) -> Message:
    other = with_content(reply)
    other.metadata.__dict__[name] = value
    return other


@pytest.mark.parametrize("kind", BAD)
def test_bad_replies_go_through_the_same_checks_and_change_nothing(
    kind: str, flower_log: pytest.LogCaptureFixture
) -> None:
    def bad(message: Message, reply: Message) -> Message | None:
        return BAD[kind](message, reply) if message.metadata.dst_node_id % 3 == 0 else reply

    recorder = Recorder(4, bad)
    arrays, strategy, _ = run(recorder, FedBuff(inner(), POLICY, buffer_size=4, weight_cap=None), rounds=8)
    assert [row.received for row in strategy.traffic] == [4] * 8
    assert_is(arrays, recorder)
    assert flower_log.text.count("left out node") >= 3


def test_a_run_in_which_everybody_fails_ends_with_an_error() -> None:
    grid = VirtualGrid(range(1, 1001), lambda message: Message(Error(1, "no memory"), reply_to=message), seconds)
    strategy = FedBuff(inner(fraction_train=0.01), POLICY, buffer_size=4)
    with pytest.raises(fedomc.RoundsFailedError, match="in round 3"), grid.as_grid() as connected:
        strategy.start(connected, model(), num_rounds=50)
    assert len(grid.asked) < 60  # not every node has to fail


def test_a_buffer_larger_than_the_network_is_filled_as_far_as_it_can_be() -> None:
    _, strategy, _ = run(strategy=FedBuff(inner(), POLICY, buffer_size=50), rounds=2, nodes=range(1, 6))
    assert [row.received for row in strategy.traffic] == [5, 5]


def test_a_stale_message_is_given_up_with_a_warning(flower_log: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(4)
    run(recorder, FedBuff(inner(), POLICY, buffer_size=4, max_staleness=1), rounds=15)
    assert max(max(each) for each in recorder.staleness[:-1]) == 1
    assert "the model that it was sent is 2 steps old" in flower_log.text


def test_broadcasts_are_packed_and_held_as_long_as_a_reply_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Broadcast]] = []
    own = asynchronous.FedBuff._broadcast_of

    def watched(strategy: FedBuff, *args: object) -> Broadcast:
        broadcast = own(strategy, *args)  # type: ignore[arg-type]
        made.append(weakref.ref(broadcast))
        return broadcast

    monkeypatch.setattr(asynchronous.FedBuff, "_broadcast_of", watched)
    held: list[tuple[int, int]] = []
    release = InFlight.release

    def counted(in_flight: InFlight) -> None:
        release(in_flight)
        gc.collect()
        versions = {flight.broadcast.round for flight in in_flight._flights.values()}
        alive = [broadcast for ref in made[:-1] if (broadcast := ref()) is not None]
        assert {broadcast.round for broadcast in alive} == versions
        for broadcast in alive:
            in_fp32 = {name for name, array in broadcast.arrays.items() if array.data}
            assert "weight" not in in_fp32 and "bias" in in_fp32
            assert not broadcast._pieces and "weight" not in broadcast._dense
        held.append((len(alive), len(in_flight)))

    monkeypatch.setattr(InFlight, "release", counted)
    run(strategy=FedBuff(inner(), fedomc.CompressionPolicy("S1E3M7"), buffer_size=2), rounds=25)
    assert max(count for count, _ in held) > 2
    assert all(count <= flights <= 10 for count, flights in held)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"policy": fedomc.CompressionPolicy("S1E2M3", "S1E2M1")},
        {"policy": fedomc.CompressionPolicy("S1E2M3", fraction=0.5), "unquantized_format": "S1E5M10"},
        {"policy": fedomc.TieredPolicy({"large": None, "small": POLICY})},
    ],
)
@pytest.mark.parametrize("strategy", [FedAvg, FedAdam])
def test_other_policies_and_strategies_run(strategy: type[FedAvg], kwargs: dict[str, object]) -> None:
    def reply_to(message: Message) -> Message:
        return good(message) if message.metadata.message_type == "train" else Message(Error(1, ""), reply_to=message)

    wrapped = FedBuff(strategy(fraction_train=0.5, fraction_evaluate=0.0), buffer_size=4, **kwargs)  # type: ignore[arg-type]
    arrays, _, _ = run(reply_to, wrapped, rounds=5)
    assert [row.received for row in wrapped.traffic] == [4] * 5
    for name, array in model().items():
        assert arrays[name].dtype == array.dtype and np.isfinite(arrays[name].numpy()).all()


def test_a_resumed_run_asks_again_whom_it_waited_for(tmp_path: Path) -> None:
    def started(rounds: int) -> tuple[OMCStrategy, VirtualGrid]:
        wrapped = FedBuff(inner(), POLICY, buffer_size=4, checkpoints=Checkpoints(tmp_path))
        _, strategy, grid = run(strategy=wrapped, rounds=rounds)
        return strategy, grid

    strategy, _ = started(5)
    waiting = strategy._waiting_for()
    assert len(waiting) == 9  # the node whose reply filled the buffer has been heard
    strategy, grid = started(8)
    assert grid.asked[:9] == waiting
    assert [row.round for row in strategy.traffic] == list(range(1, 9))
    with pytest.raises(fedomc.PayloadError, match="buffer_size"):
        run(strategy=FedBuff(inner(), POLICY, buffer_size=5, checkpoints=Checkpoints(tmp_path)), rounds=9)


def in_a_file(values: torch.Tensor) -> bool:
    """Return whether values are in a mapped file; where the system does not say, that is assumed."""
    maps, place = Path("/proc/self/maps"), values.data_ptr()
    for line in maps.read_text().splitlines() if maps.exists() else []:
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= place < end:
            return ".fedomc-" in line
    return not maps.exists()


@pytest.mark.parametrize("policy", [None, POLICY])
@pytest.mark.parametrize("kind", [FedAvg, FedAdam])
def test_with_checkpoints_the_bits_are_the_same_and_every_model_in_flight_is_in_a_file(
    kind: type[FedAvg], policy: fedomc.CompressionPolicy | None, tmp_path: Path
) -> None:
    results = []
    for checkpoints in (None, Checkpoints(tmp_path, keep=1)):
        random.seed(1)
        averaging = kind(fraction_train=0.5, fraction_evaluate=0.0)
        wrapped = FedBuff(averaging, policy, buffer_size=4, checkpoints=checkpoints)
        arrays, _, _ = run(strategy=wrapped, rounds=6)
        results.append({name: array.numpy().tobytes() for name, array in arrays.items()})
    assert results[0] == results[1]
    assert wrapped._in_flight is not None
    held = {flight.broadcast.round: flight.broadcast for flight in wrapped._in_flight._flights.values()}
    assert len(held) > 1  # versions, whose checkpoints are removed
    for broadcast in held.values():
        for name, array in broadcast.arrays.items():
            assert isinstance(array, MappedArray) or not array.data or array.dtype == "bfloat16", name
        for node in NODES:
            for packed in broadcast.packed(node).values():
                assert in_a_file(packed.codes)


def test_clients_evaluate_synchronously_with_a_warning(flower_log: pytest.LogCaptureFixture) -> None:
    run(strategy=FedBuff(FedAvg(fraction_train=0.5), POLICY, buffer_size=4), rounds=1)
    assert "evaluation on clients (fraction_evaluate=1) waits for clients that are training" in flower_log.text


class OwnStart(FedAvg):
    start = Best.start


@pytest.mark.parametrize(
    ("wrapped", "kwargs", "message"),
    [
        (FedMedian, {}, r"FedMedian cannot run asynchronously.*OMCStrategy\(FedMedian\(\.\.\.\), over_selection"),
        (strategies.Krum, {}, "needs all replies"),
        (OwnStart, {}, "its own start"),
        (FedAvg, {"buffer_size": 0}, "buffer_size=0"),
        (FedAvg, {"max_staleness": -1}, "max_staleness=-1"),
        (FedAvg, {"aggregate": "weights"}, "use aggregate='delta'"),
    ],
)
def test_what_cannot_be_asynchronous_is_refused(
    wrapped: type[Strategy], kwargs: dict[str, object], message: str
) -> None:
    with pytest.raises(fedomc.PolicyError, match=message):
        FedBuff(wrapped(), **kwargs)  # type: ignore[arg-type]


def test_rounds_cannot_be_run_from_outside_and_weights_are_checked() -> None:
    grid: Grid = VirtualGrid(NODES, good)  # type: ignore[assignment]
    with pytest.raises(fedomc.PolicyError, match=r"call strategy\.start"):
        FedBuff(inner()).configure_train(1, model(), None, grid)  # type: ignore[arg-type]
    with pytest.raises(fedomc.PolicyError, match=r"staleness_weight\(0\) is 2: return a number from 0 to 1"):
        run(strategy=FedBuff(inner(), POLICY, staleness_weight=lambda staleness: 2))
