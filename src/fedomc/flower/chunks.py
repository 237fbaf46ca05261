"""Arrays in the pieces that Flower sends, so that sending them makes no copy."""

from typing import Any

from flwr.app import Array
from flwr.app.message.arraychunk import ArrayChunk


class ChunkedArray(Array):
    """An ``Array`` that keeps its data as the contents of the objects that Flower makes of it.

    A client's Flower turns the whole of a reply into contents, each a copy with a header in front, before most of the
    first has gone out, and it holds reply and contents until the last has. Here the contents are all there is.

    To Flower and whoever reads it this is any other ``Array``: it travels and is copied as a plain one, and ``data``
    puts the pieces together anew each time.
    """

    def __init__(self, plain: Array) -> None:
        super().__init__(plain.dtype, plain.shape, plain.stype, plain.data)
        chunks = [(key, _Chunk(chunk)) for key, chunk in self.slice_array()]
        del self.__dict__["data"]
        self.__dict__["_chunks"] = chunks  # where Flower keeps them, until ``data`` is set

    def __getattr__(self, name: str) -> Any:
        if name != "data" or "_chunks" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return b"".join(chunk.data for _, chunk in self.__dict__["_chunks"])

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, self.data)

    def deflate(self) -> bytes:
        """Describe the array as a plain one: what it is made of is named after its class."""
        plain = Array(self.dtype, self.shape, self.stype, b"")
        plain.__dict__["_chunks"] = self.slice_array()
        return plain.deflate()


class _Chunk(ArrayChunk):
    """A piece of an array's data, as the content of the object that is sent."""

    def __init__(self, plain: Any) -> None:
        self._content: bytes = plain.deflate()
        super().__init__(memoryview(self._content)[len(self._content) - len(plain.data) :])

    def deflate(self) -> bytes:
        """Give the content, which is made already."""
        return self._content
