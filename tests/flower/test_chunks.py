"""Arrays in chunks: to Flower, and to whoever reads them, they are what they were made of."""

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.app.message import array as flower_array
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, push_objects
from torch import nn

from fedomc.flower import collect
from fedomc.flower.chunks import ChunkedArray

CHUNK = 1000


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", CHUNK)


def of(size: int) -> Array:
    return Array("float32", (size,), "any", np.random.default_rng(size).bytes(size))


SIZES = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7)


def sent(array: Array) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    push_objects(get_all_nested_objects(RecordDict({"arrays": ArrayRecord({"x": array})})), contents.__setitem__)
    return contents


@pytest.mark.parametrize("size", SIZES)
def test_flower_sends_the_same_objects_and_inflates_a_plain_array(size: int) -> None:
    plain = of(size)
    chunked = ChunkedArray(plain)
    assert sent(chunked) == sent(plain)
    content = RecordDict({"arrays": ArrayRecord({"x": chunked})})
    assert get_object_tree(content) == get_object_tree(RecordDict({"arrays": ArrayRecord({"x": plain})}))
    arrived = inflate_object_from_contents(content.object_id, sent(chunked))
    assert isinstance(arrived, RecordDict)
    assert arrived["arrays"]["x"] == plain  # type: ignore[index,call-overload]


@pytest.mark.parametrize("size", SIZES)
def test_the_data_are_those_of_the_plain_array(size: int) -> None:
    plain = of(size)
    assert ChunkedArray(plain).data == plain.data


def test_equal_chunks_travel_once_and_come_back_in_their_places() -> None:
    plain = Array("float32", (4 * CHUNK,), "any", b"\0" * 2 * CHUNK + b"\1" * CHUNK + b"\0" * CHUNK)
    chunked = ChunkedArray(plain)
    assert sent(chunked) == sent(plain)
    assert chunked.data == plain.data


def test_no_content_is_made_twice() -> None:
    objects = get_all_nested_objects(ChunkedArray(of(3 * CHUNK)))
    chunks = [one for one in objects.values() if not isinstance(one, Array)]
    assert len(chunks) == 3
    assert all(chunk.deflate() is chunk.deflate() for chunk in chunks)


def test_nothing_but_the_contents_is_held() -> None:
    chunked = ChunkedArray(of(3 * CHUNK))
    assert "data" not in vars(chunked)
    for _, chunk in chunked.slice_array():
        content = chunk.deflate()
        assert chunk.data.obj is content  # type: ignore[attr-defined]


COPIES: dict[str, Callable[[ChunkedArray], Array]] = {
    "pickle": lambda array: pickle.loads(pickle.dumps(array)),  # noqa: S301
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_plain(name: str) -> None:
    plain = of(3 * CHUNK)
    copied = COPIES[name](ChunkedArray(plain))
    assert type(copied) is Array
    assert copied == plain


def test_new_data_take_the_place_of_the_chunks() -> None:
    chunked, other = ChunkedArray(of(3 * CHUNK)), of(CHUNK)
    chunked.data, chunked.shape = other.data, other.shape
    assert chunked.data == other.data
    assert sent(chunked) == sent(other)


def test_an_unknown_attribute_is_named() -> None:
    with pytest.raises(AttributeError, match="ChunkedArray has no 'values'"):
        ChunkedArray(of(1)).values  # noqa: B018


def test_only_a_model_that_is_consumed_gives_chunks() -> None:
    model = nn.Linear(40, 40)
    assert {type(array) for array in collect(model).values()} == {Array}
    assert {type(array) for array in collect(model, consume=True).values()} == {ChunkedArray}
