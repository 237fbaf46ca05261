"""Arrays that store their data as the chunks that Flower sends, so that sending them needs no copy."""

from typing import Any

from flwr.app import Array

from fedomc.flower._flower import ArrayChunk, held_chunks, hold_chunks


class ChunkedArray(Array):
    """An ``Array`` that stores its data only as the serialized objects that Flower sends for it.

    Before Flower sends a client's reply, it serializes all its objects, each as a copy of the data with a header, and
    holds both the reply and these copies until the last one has been sent. This array holds only the serialized form.

    It otherwise behaves like any other ``Array``, and is sent, pickled and copied as a plain one. Each access to
    ``data`` joins the chunks again.
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
        """Return the serialized form of a plain array with the same chunks, since it names the class of its object."""
        plain = Array(self.dtype, self.shape, self.stype, b"")
        hold_chunks(plain, self.slice_array(), keep_data=True)
        return plain.deflate()


class _Chunk(ArrayChunk):
    """A chunk of an array's data, stored as a view of its own serialized form."""

    def __init__(self, plain: Any) -> None:
        self._content: bytes = plain.deflate()
        super().__init__(memoryview(self._content)[len(self._content) - len(plain.data) :])

    def deflate(self) -> bytes:
        """Return the serialized form, which was made with the chunk."""
        return self._content
