"""Online Model Compression: parameters stay bit-packed in memory, on the wire and on disk while a model trains."""

from fedomc import fallback, inplace, ops  # noqa: F401  (they register what CompressedTensor does)
from fedomc.checkpoint import load_model, materialize_, save_model
from fedomc.errors import FormatError, NonFiniteError, OMCError, PayloadError, PolicyError
from fedomc.formats import FloatFormat
from fedomc.lifetimes import MemoryBytes
from fedomc.memory import MemoryReport, memory_report
from fedomc.model import ParameterBytes, compress_, decompress_, parameter_bytes
from fedomc.optim import StepInBackward, step_in_backward
from fedomc.policy import CompressionPolicy, Selection, TieredPolicy
from fedomc.tensor import CompressedTensor
from fedomc.transform import Encoding

__version__ = "0.1.0"

__all__ = [
    "CompressedTensor",
    "CompressionPolicy",
    "Encoding",
    "FloatFormat",
    "FormatError",
    "MemoryBytes",
    "MemoryReport",
    "NonFiniteError",
    "OMCError",
    "ParameterBytes",
    "PayloadError",
    "PolicyError",
    "Selection",
    "StepInBackward",
    "TieredPolicy",
    "compress_",
    "decompress_",
    "load_model",
    "materialize_",
    "memory_report",
    "parameter_bytes",
    "save_model",
    "step_in_backward",
]
