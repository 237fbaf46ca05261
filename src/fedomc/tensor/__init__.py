"""``CompressedTensor`` and the handlers that run torch operations on it."""

from fedomc.tensor import backward, fallback, inplace, ops, sharding  # noqa: F401  (imported to register their handlers)
from fedomc.tensor.compressed import CompressedTensor, compress, is_compressed

__all__ = ["CompressedTensor", "compress", "is_compressed"]
