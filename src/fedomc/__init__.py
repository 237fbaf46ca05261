"""Online Model Compression: parameters stay bit-packed in memory, on the wire and on disk while a model trains."""

from fedomc.activations.packing import ActivationBytes, PackedActivations, compress_activations
from fedomc.errors import (
    BaseModelError,
    BudgetError,
    FolderLockedError,
    FormatError,
    NonFiniteError,
    OMCError,
    PayloadError,
    PolicyError,
    RoundsFailedError,
)
from fedomc.memory.liveness import MemoryBytes
from fedomc.memory.plan import MemoryPlan, plan
from fedomc.memory.report import MemoryReport, memory_report
from fedomc.methods import Encoding, FloatFormat, Method
from fedomc.serialization.model_file import load_model, materialize_, save_model
from fedomc.tensor.compressed import CompressedTensor
from fedomc.tensor.ops.cross_entropy import linear_cross_entropy
from fedomc.training.advice import Advice, FormatAdvice, VariableAdvice
from fedomc.training.advising import advise
from fedomc.training.base_model import base_digest
from fedomc.training.model import ParameterBytes, compress_, decompress_, parameter_bytes
from fedomc.training.policy import DEFAULT, CompressionPolicy, TieredPolicy
from fedomc.training.selection import Selection
from fedomc.training.step_report import StepQuality, StepReport, step_report
from fedomc.training.stepping import StepInBackward, step_in_backward

__version__ = "0.1.0"

__all__ = [
    "DEFAULT",
    "ActivationBytes",
    "Advice",
    "BaseModelError",
    "BudgetError",
    "CompressedTensor",
    "CompressionPolicy",
    "Encoding",
    "FloatFormat",
    "FolderLockedError",
    "FormatAdvice",
    "FormatError",
    "MemoryBytes",
    "MemoryPlan",
    "MemoryReport",
    "Method",
    "NonFiniteError",
    "OMCError",
    "PackedActivations",
    "ParameterBytes",
    "PayloadError",
    "PolicyError",
    "RoundsFailedError",
    "Selection",
    "StepInBackward",
    "StepQuality",
    "StepReport",
    "TieredPolicy",
    "VariableAdvice",
    "advise",
    "base_digest",
    "compress_",
    "compress_activations",
    "decompress_",
    "linear_cross_entropy",
    "load_model",
    "materialize_",
    "memory_report",
    "parameter_bytes",
    "plan",
    "save_model",
    "step_in_backward",
    "step_report",
]
