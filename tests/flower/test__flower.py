"""The private names of Flower that are used: each still does what we rely on, and no other module uses any."""

import ast
import inspect
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.common import EvaluateIns, FitIns, GetParametersIns, GetPropertiesIns, Parameters
from flwr.compat.common import recorddict_compat
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import http_grid, inmemory_grid

import fedomc.flower
from fedomc.flower import _flower

PACKAGE = Path(fedomc.flower.__file__).parent
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.simulation"}
CHANGED = "Flower changed: "


def plain() -> Array:
    return Array("float32", (3,), "any", b"0123456789ab")


def test_an_array_travels_as_the_chunks_that_it_holds() -> None:
    array = plain()
    assert _flower.held_chunks(array) is None, CHANGED + "an Array is born with chunks"
    cut = array.slice_array()
    assert _flower.held_chunks(array) is cut, CHANGED + "Array.slice_array keeps its chunks elsewhere than in _chunks"
    other = Array("float32", (3,), "any", b"")
    _flower.hold_chunks(other, cut, keep_data=True)
    assert other.slice_array() is cut, CHANGED + "Array.slice_array does not take the chunks that are in _chunks"
    assert other.deflate() == array.deflate(), CHANGED + "Array.deflate writes more than its chunks and its description"
    _flower.hold_chunks(other, cut, keep_data=False)
    assert "data" not in vars(other), CHANGED + "an Array keeps its data elsewhere than in its __dict__"
    other.data = array.data
    assert _flower.held_chunks(other) is None, CHANGED + "setting Array.data no longer drops the chunks"


def test_a_chunk_is_its_content_behind_a_header() -> None:
    ((key, chunk),) = plain().slice_array()
    assert type(chunk) is _flower.ArrayChunk, CHANGED + "an Array is cut into other objects than ArrayChunk"
    content = chunk.deflate()
    assert content.endswith(plain().data), CHANGED + "the content of an ArrayChunk does not end with its data"
    assert _flower.ArrayChunk(memoryview(plain().data)).object_id == key, CHANGED + "ids are no longer of contents"


def test_an_array_is_cut_after_so_many_bytes() -> None:
    array = Array("float32", (1,), "any", bytes(_flower.CHUNK_SIZE + 1))
    sizes = [len(chunk.data) for _, chunk in array.slice_array()]  # type: ignore[attr-defined]
    assert sizes == [_flower.CHUNK_SIZE, 1], CHANGED + "_flower.CHUNK_SIZE is no longer where an Array is cut"


def test_a_message_is_made_of_its_objects_as_by_flower() -> None:
    shared, draw = bytes(_flower.CHUNK_SIZE), np.random.default_rng(0)
    record = ArrayRecord()
    for i, data in enumerate((shared, shared + draw.bytes(9), draw.bytes(10), b"", shared)):
        record[str(i)] = Array("uint8", (len(data),), "any", data)
    content = RecordDict({"arrays": record, "config": ConfigRecord({"a": 1})})
    contents = {key: one.deflate() for key, one in get_all_nested_objects(content).items()}
    wanted = inflate_object_from_contents(content.object_id, dict(contents))
    assert _flower.inflate_by_arrays(content.object_id, contents) == wanted, CHANGED + "messages are made otherwise"
    assert contents == {}, CHANGED + "the contents of objects are no longer released with them"


def test_the_grid_of_a_deployment_makes_messages_by_arrays() -> None:
    assert http_grid.__name__ == _flower._HTTP_GRID and "inflate_object_from_contents(" in inspect.getsource(
        http_grid.HttpGrid.pull_messages
    ), CHANGED + "HttpGrid makes messages otherwise: replies take twice their size"
    with _flower.inflating_by_arrays():
        assert http_grid.inflate_object_from_contents is _flower.inflate_by_arrays
    assert http_grid.inflate_object_from_contents is inflate_object_from_contents


def test_the_grid_of_a_simulation_holds_replies_and_that_of_a_deployment_does_not() -> None:
    assert inmemory_grid.__name__ == _flower._IN_MEMORY_GRID, CHANGED + "the grid of a simulation has another name"
    for cls, held in ((inmemory_grid.InMemoryGrid, True), (http_grid.HttpGrid, False)):
        assert _flower.holds_replies(object.__new__(cls)) is held


def context() -> Context:
    return Context(1, 1, {}, RecordDict(), {})


def test_the_errors_of_mods_are_recognized() -> None:
    app = ClientApp(mods=[fixedclipping_mod])
    app.train()(lambda message, context: message)
    reply = app(Message(RecordDict({"config": ConfigRecord()}), 1, "train"), context())
    assert reply.has_error()
    assert _flower.is_mod_failure(reply.error.code), CHANGED + "a mod that cannot work answers with another error code"


def test_a_message_is_made_named_and_answered_with_a_failure_where_there_is_no_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    _flower.identify_process()
    message = Message(RecordDict(), 7, "train")
    assert message.metadata.src_node_id == 1, CHANGED + "a process has its identity elsewhere than in TaskIdentity"
    _flower.name_message(message, "to 7")
    assert message.metadata.message_id == "to 7", CHANGED + "metadata keep the ID elsewhere than in _message_id"
    reply = _flower.client_failure(message, ValueError("no memory"))
    assert reply.has_error() and reply.error.reason == "ValueError: no memory"
    assert reply.metadata.reply_to_message_id == "to 7"


def test_the_error_of_secure_aggregation_is_recognized() -> None:
    app = ClientApp(mods=[secaggplus_mod])
    app.train()(lambda message, context: message)
    with pytest.raises(Exception) as raised:
        app(Message(RecordDict({"config": ConfigRecord()}), 1, "train"), context())
    says = CHANGED + "secaggplus_mod fails in another way where the server does not know secure aggregation"
    assert _flower.mentions_secure_aggregation(repr(raised.value)), says
    assert not _flower.mentions_secure_aggregation("out of memory")


def test_messages_of_the_legacy_api_are_recognized() -> None:
    parameters = Parameters([b"1"], "numpy.ndarray")
    legacy = {
        "fit": recorddict_compat.fitins_to_recorddict(FitIns(parameters, {}), True),
        "evaluate": recorddict_compat.evaluateins_to_recorddict(EvaluateIns(parameters, {}), True),
        "parameters": recorddict_compat.getparametersins_to_recorddict(GetParametersIns({})),
        "properties": recorddict_compat.getpropertiesins_to_recorddict(GetPropertiesIns({})),
    }
    for name, content in legacy.items():
        assert _flower.is_legacy_content(content), f"{CHANGED}the records of a legacy {name} are now {list(content)}"
    assert not _flower.is_legacy_content(RecordDict({"arrays": ConfigRecord(), "fedomc": ConfigRecord()}))


def test_the_error_of_a_legacy_client_is_recognized() -> None:
    app = ClientApp(lambda context: NumPyClient().to_client())
    with pytest.raises(Exception) as raised:
        app(Message(RecordDict({"config": ConfigRecord()}), 1, "train"), context())
    says = CHANGED + "a legacy client fails in another way when it gets a message of the new API"
    assert _flower.mentions_legacy_content(repr(raised.value)), says


def test_the_innermost_caller_that_is_accepted_is_found() -> None:
    class Outer:
        def call(self) -> object:
            return Inner().call()

    class Inner:
        def call(self) -> object:
            return [_flower.find_caller(lambda owner, t=t: isinstance(owner, t)) for t in (Outer, Inner, str)]

    outer = Outer()
    found = outer.call()
    assert found[0] is outer and type(found[1]) is Inner and found[2] is None  # type: ignore[index]


def test_a_stand_in_shares_the_attributes_of_a_strategy() -> None:
    strategy = FedAvg(fraction_train=0.25)
    other = _flower.stand_in(strategy, {"aggregate_train": lambda *_: ("instead", None)})
    assert isinstance(other, FedAvg) and other.fraction_train == 0.25
    assert other.aggregate_train(1, []) == ("instead", None), CHANGED + "strategies have slots, or hooks for attributes"
    other.best = 3  # type: ignore[attr-defined]
    assert vars(strategy)["best"] == 3


def test_no_other_module_uses_a_private_name_of_flower() -> None:
    found = []
    for path in sorted(PACKAGE.glob("**/*.py")):
        if path.name == "_flower.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.ImportFrom(module=str(module)) if module.split(".")[0] == "flwr" and module not in PUBLIC:
                    found.append(f"{path.name}:{node.lineno} from {module}")
                case ast.Import() if any(alias.name.split(".")[0] == "flwr" for alias in node.names):
                    found.append(f"{path.name}:{node.lineno} import flwr")
                case ast.Attribute(value=ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super"))):
                    pass
                case ast.Attribute(attr=attr) if attr.startswith("_") and attr not in (
                    "__init__",
                    "__name__",
                    "__mro__",
                    "__module__",
                ):
                    found.append(f"{path.name}:{node.lineno} .{attr}")
    assert not found, f"go through fedomc.flower._flower: {found}"


@pytest.mark.parametrize("name", _flower.__all__)
def test_every_door_is_named_here(name: str) -> None:
    assert f"_flower.{name}" in Path(__file__).read_text(encoding="utf-8") or name == "logger"


def test_the_logger_is_flowers_own(flower_log: pytest.LogCaptureFixture) -> None:
    from flwr.common.logger import FLOWER_LOGGER

    assert _flower.logger is FLOWER_LOGGER, CHANGED + "it logs under another name than 'flwr'"
