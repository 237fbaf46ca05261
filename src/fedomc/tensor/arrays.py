"""Conversion of decoded values to the arrays of other libraries."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def numpy_of(values: Tensor, force: bool) -> Any:
    """Return decoded values as a numpy array, read-only unless ``force`` is set."""
    array = values.numpy(force=force)
    if not force:
        array.flags.writeable = False
    return array


class DecodedArrays:
    """The access of other libraries to a tensor without memory: they get decoded copies, or an error.

    Attributes:
        variable: the name in error messages.
        dequantize: decodes to a dense tensor.
    """

    variable: str
    dequantize: Callable[[], Tensor]

    def data_ptr(self) -> int:
        """Return 0: no memory holds the decoded values."""
        return 0

    def storage(self) -> torch.TypedStorage:
        """Raise an error: no storage holds the decoded values.

        Raises:
            RuntimeError: always; safetensors, ``save_pretrained`` of transformers and accelerate call this method.
        """
        raise RuntimeError(
            f"{self.variable} is compressed and has no storage of its values: save the model with fedomc.save_model, "
            "or decompress_ it (or a deep copy of it) before safetensors or save_pretrained write it. After "
            "fedomc.huggingface.attach_quantizer(model), save_pretrained writes it packed; save_state of accelerate "
            "takes safe_serialization=False"
        )

    def numpy(self, *, force: bool = False) -> Any:
        """Decode to a numpy array, read-only unless ``force`` is set because writes would not reach the codes."""
        return numpy_of(self.dequantize(), force)

    def tolist(self) -> Any:
        """Decode to nested lists."""
        return self.dequantize().tolist()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.dequantize().__dlpack__(*args, **kwargs)

    def __dlpack_device__(self) -> Any:
        return self.dequantize().__dlpack_device__()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.dequantize().__array__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __format__(self, spec: str) -> str:
        return self.dequantize().__format__(spec) if spec else str(self)  # type: ignore[no-untyped-call]
