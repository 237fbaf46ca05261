"""Selects replies as Flower's ``Krum`` and ``MultiKrum`` do, without their models in memory.

[Note: distances]
Krum (Blanchard et al., 2017, https://arxiv.org/abs/1703.02757) compares replies by the squared distances between their
models. Flower stacks all models in FP32 and computes |x|^2 + |y|^2 - 2xy of them; where clients change little, the
rounding errors of |x|^2 exceed the distances. Here x and y are the differences to the server's model in float64, summed
over stretches, so that only a stretch of all replies is decoded at a time. A client that sends huge values disturbs no
distance but its own. The replies that are selected are then averaged by Flower, which decodes a variable at a time.
"""

from collections.abc import Sequence

import numpy as np

from fedomc.codec import CHUNK
from fedomc.flower.arrays import Values
from fedomc.flower.decoding import Stretches, Variables


def distances(stretches: Stretches, replies: Sequence[Variables], *, of_weights: bool) -> Values:
    """Return the squared distances between the models of the replies, float64 ``[replies, replies]``."""
    models = [stretches.decoded(reply, of_weights=of_weights) for reply in replies]
    products = np.zeros((len(replies), len(replies)))
    for key, server in stretches.server().items():
        parts = [model[key].numpy().reshape(-1) for model in models]
        for start in range(0, server.size, CHUNK):
            chunk = slice(start, start + CHUNK)
            differences = np.stack([part[chunk] for part in parts], dtype=np.float64)  # [replies, CHUNK]
            differences -= server[chunk]
            products += differences @ differences.T
    norms = products.diagonal()
    squares: Values = np.maximum(norms[:, None] + norms[None, :] - 2 * products, 0)
    return squares


def selected(squares: Values, malicious: int, count: int) -> list[int]:
    """Return the indices of the replies with the smallest scores, the smallest first.

    The score of a reply is the sum of its squared distances to the n - f - 2 others that are closest to it.

    Args:
        squares: the squared distances ``[n, n]``.
        malicious: f, the number of malicious clients that is assumed.
        count: how many are selected.
    """
    closest = max(1, len(squares) - malicious - 2)
    scores = np.sort(squares, axis=1)[:, 1 : closest + 1].sum(1)  # without the distance to itself
    return [int(index) for index in np.argsort(scores, kind="stable")[:count]]
