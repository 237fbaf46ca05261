"""What a safetensors file contains, variable by variable, without a model to load it into."""

import math
import os
from dataclasses import dataclass

from fedomc.serialization.model_file import ModelFile, open_model_file


@dataclass(frozen=True)
class StoredVariable:
    """A variable of a file.

    Attributes:
        name: its qualified name.
        shape: its dimensions.
        held: its formats, such as ``S1E2M3+S1E2M1``, or for a dense one its dtype as safetensors names it.
        packed: whether it is held as codes.
        nbytes: what it takes in the file, frames included.
        fp32: what it would take in FP32; for integers and truth values, what it takes.
    """

    name: str
    shape: tuple[int, ...]
    held: str
    packed: bool
    nbytes: int
    fp32: int


@dataclass(frozen=True)
class Contents:
    """What a file contains.

    Attributes:
        variables: in the order of their names.
        tied: of each further name of a tied variable the first.
        described: whether ``save_model`` or ``compress_file`` wrote the file, so that ``load_model`` reads it.
        texts: its metadata, without those of fedomc.
    """

    variables: tuple[StoredVariable, ...]
    tied: dict[str, str]
    described: bool
    texts: dict[str, str]

    @property
    def nbytes(self) -> int:
        """The bytes of all variables."""
        return sum(variable.nbytes for variable in self.variables)

    @property
    def fp32(self) -> int:
        """The bytes of all variables in FP32."""
        return sum(variable.fp32 for variable in self.variables)


def read_contents(path: str | os.PathLike[str], *, verify: bool = False) -> Contents:
    """List the variables of a safetensors file.

    Args:
        path: of a file of ``save_model``, or any other safetensors file.
        verify: whether to read all values and check them against the file's digests. Files of other programs have
            none; of them only the header is checked.

    Raises:
        PayloadError: the file is damaged, or no safetensors file.
        OSError: the file cannot be read.
    """
    with open_model_file(path) as model:
        if verify:
            for name in model.names:
                if name in model.content.variables:
                    model.read(name)
                else:
                    model.file.stored(name)
        variables = tuple(_stored(model, name) for name in model.names)
        texts = {name: text for name, text in model.file.texts.items() if not name.startswith("fedomc")}
        return Contents(variables, model.content.tied, model.described, texts)


def _stored(model: ModelFile, name: str) -> StoredVariable:
    described = model.content.variables.get(name)
    if described is None:
        dtype, shape, nbytes = model.file.stored_as(name)
        is_float = dtype.startswith(("F", "BF"))
        return StoredVariable(name, shape, dtype, False, nbytes, 4 * math.prod(shape) if is_float else nbytes)
    nbytes = sum(model.file.stored_as(key)[2] for key in model.content.keys_of(name))
    held = "+".join(map(str, described.encoding.methods))
    return StoredVariable(name, described.shape, held, True, nbytes, 4 * math.prod(described.shape))
