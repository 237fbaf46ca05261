"""Arrays that hold their data as the chunks that Flower sends, so that sending them makes no copy."""

from typing import Any

from flwr.app import Array

from fedomc.flower._flower import ArrayChunk, held_chunks, hold_chunks


class ChunkedArray(Array):
    """An ``Array`` that keeps its data as the contents of the objects that Flower sends of it.

    Before a client's Flower sends a reply it makes the contents of all its objects, each of them a copy of the data
    behind a header, and it holds both the reply and the contents until the last one has gone out. This array holds the
    contents alone.

    To Flower and to any reader it is like any other ``Array``: it travels, is pickled and is copied as a plain one.
    Each access to ``data`` joins the chunks anew.
    """

    def __init__(self, plain: Array) -> None:
        super().__init__(plain.dtype, plain.shape, plain.stype, plain.data)
        hold_chunks(self, [(key, _Chunk(chunk)) for key, chunk in self.slice_array()], keep_data=False)

    def __getattr__(self, name: str) -> Any:
        chunks = held_chunks(self)
        if name != "data" or chunks is None:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return b"".join(chunk.data for _, chunk in chunks)

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)

    def deflate(self) -> bytes:
        """Return the content of a plain array with the same chunks: a content names the class of its object."""
        plain = Array(self.dtype, self.shape, self.stype, b"")
        hold_chunks(plain, self.slice_array(), keep_data=True)
        return plain.deflate()


class _Chunk(ArrayChunk):
    """A chunk of an array's data that is a view of the content of the object that is sent."""

    def __init__(self, plain: Any) -> None:
        self._content: bytes = plain.deflate()
        super().__init__(memoryview(self._content)[len(self._content) - len(plain.data) :])

    def deflate(self) -> bytes:
        """Return the content, which was made when the chunk was."""
        return self._content
