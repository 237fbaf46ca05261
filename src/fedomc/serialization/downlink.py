"""The client's side of the downlink: encodes a variable that has arrived in the method in which it is held."""

import torch
from torch import Tensor

from fedomc.methods import Encoding, Packed
from fedomc.methods.packed import draw_seed


def as_held(packed: Packed, encoding: Encoding, name: str) -> Packed:
    """Encode a variable that a server sent in the encoding's downlink in the method in which it is held.

    Rounding is stochastic, with a seed of the client's own, so that the mean over clients is what the server sent.
    Where the method can represent each value, as ``S1E2M5/64`` can represent those of ``S1E2M3/256``, nothing is
    rounded. At no time are all values decoded.

    Args:
        packed: the variable as it arrived.
        encoding: the encoding that the server asks for.
        name: the variable's name, for random draws and error messages.

    Returns:
        A new variable in ``encoding.format``; without a downlink, or if the variable arrived in that method, ``packed``
        itself.
    """
    if encoding.downlink is None or packed.method == encoding.format:
        return packed
    held = Packed.zeros(encoding.format, packed.numel, packed.codes.device)

    def values(start: int, stop: int) -> Tensor:
        return packed.decode(torch.empty(stop - start, dtype=torch.float32, device=packed.codes.device), start)

    # A separate seed, because the first local step must not be rounded with the same random bits.
    seed = draw_seed(encoding.seed, "downlink", 0)
    held.rewrite(values, encoding.transform, "stochastic", seed, name)
    return held
