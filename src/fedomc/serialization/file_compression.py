"""Compress a safetensors file into a model file, one tensor at a time and without a model."""

import os
from collections.abc import Callable

from torch import Tensor

from fedomc.errors import NonFiniteError, PayloadError
from fedomc.methods import Encoding, Packed
from fedomc.serialization import frame
from fedomc.serialization.model_file import KEY, VERSION, describe
from fedomc.serialization.tensor_file import OURS, Piece, TensorFile, dense_piece, raw_bytes, to_json, write_tensor_file
from fedomc.tensor.compressed import CompressedTensor
from fedomc.tensor.dtypes import DTYPES
from fedomc.training.fidelity import Distance
from fedomc.training.model import compress_measured, resolve_selection
from fedomc.training.module_state import is_finite
from fedomc.training.policy import CompressionPolicy


def compress_file(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    policy: CompressionPolicy | str,
    watch: Callable[[str, int], None] = lambda name, nbytes: None,
) -> dict[str, Distance]:
    """Compress a safetensors file into one that ``load_model`` reads; a tensor at a time is in memory.

    The file is the one that ``save_model`` would write of a model with these values after ``compress_``, apart from
    tied names, which a safetensors file of another program does not have. It replaces a former one as a whole.

    Args:
        source: the file to compress, with dense tensors.
        path: of the file to write; may be that of the source.
        policy: a format or a policy, as ``compress_`` takes them. Variables that are not float32, bfloat16 or float16
            stay as they are. A file does not tell parameters from buffers: exclude buffers that are matrices.
        watch: is called with the name and the former bytes of each tensor when it has been encoded.

    Returns:
        How far the decoded values of each compressed variable are from the original ones, by name.

    Raises:
        FormatError: the policy is a text that is not a format.
        PolicyError: the policy fits no variable of the file.
        PayloadError: the source is damaged, no safetensors file, or packed already; or has a dtype that is not stored.
        NonFiniteError: a value is NaN or infinite. As with the other errors, nothing was written.
        OSError: a file cannot be read or written.
    """
    distances: dict[str, Distance] = {}
    with TensorFile.open(source) as file:
        if any(name.startswith(OURS) for name in file.texts):
            raise PayloadError(f"{source} was written by fedomc: compress the dense file that it was made from")
        skeletons = {name: file.skeleton(name) for name in sorted(file.keys)}
        shapes = {name: tuple(tensor.shape) for name, tensor in skeletons.items() if tensor.dtype in DTYPES}
        selection = resolve_selection(shapes, policy)
        described = {name: _skeleton(skeletons[name], how, name) for name, how in selection.items()}

        def piece(name: str, skeleton: Tensor) -> Piece:
            future = described.get(name)
            if future is None:
                return dense_piece(name, skeleton, lambda: _dense(file, name, watch))
            size = frame.size_of(future.base, future.shape)
            return Piece(name, "U8", [size], size, 4, lambda: packed(name, selection[name]))

        def packed(name: str, how: Encoding) -> bytes:
            values = file.tensor(name)
            compressed = compress_measured(values, how, name, distances)
            watch(name, values.nbytes)
            return frame.to_bytes(compressed.base, compressed.shape, frame.VARIABLE, name)

        variables = {name: describe(future) for name, future in described.items()}
        texts = {**file.texts, KEY: to_json({"version": VERSION, "variables": variables, "tied": {}})}
        write_tensor_file(path, texts, (piece(*item) for item in skeletons.items()))
    return distances


def _skeleton(tensor: Tensor, how: Encoding, name: str) -> CompressedTensor:
    """Make a variable without values, as which the file describes the one that is yet to be encoded."""
    base = Packed.zeros(how.format, tensor.numel(), tensor.device)
    base.state = base.state._replace(draws=1)  # encoding is the first draw
    return CompressedTensor.from_packed(base, how, tensor.shape, name, tensor.dtype)


def _dense(file: TensorFile, name: str, watch: Callable[[str, int], None]) -> memoryview:
    values = file.tensor(name)
    if not is_finite(values):
        raise NonFiniteError(f"{name} has a value that is NaN or infinite; nothing was written")
    watch(name, values.nbytes)
    return raw_bytes(values)
