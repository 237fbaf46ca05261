"""Handlers of torch functions that decode a compressed weight only while they run.

``linear``, ``convolution`` and ``embedding`` decode at most ``workspace.PANEL_BYTES`` of a weight at a time; the others
decode the whole weight (``decoded``). Functions without a handler are left to the dispatcher; see
``tensor.compressed``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fedomc.tensor.handlers import FUNCTIONS
from fedomc.tensor.ops import convolution, embedding, linear
from fedomc.tensor.ops.decoded import einsum, with_autocast, with_decoded_weights

_LOWER_PRECISION = (
    F.multi_head_attention_forward,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.baddbmm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
)
"""Functions that autocast runs in lower precision."""

_DECODED_WHOLE = (
    F.bilinear,
    torch.lstm,
    torch.gru,
    torch.rnn_tanh,
    torch.rnn_relu,
    torch.lstm_cell,
    torch.gru_cell,
    torch.rnn_tanh_cell,
    torch.rnn_relu_cell,
)

FUNCTIONS.update(dict.fromkeys(_LOWER_PRECISION, with_autocast))
FUNCTIONS.update(dict.fromkeys(_DECODED_WHOLE, with_decoded_weights))
FUNCTIONS.update(dict.fromkeys(convolution.CONVOLUTIONS, convolution.convolution))
FUNCTIONS[torch.einsum] = einsum
FUNCTIONS[F.linear] = linear.linear
FUNCTIONS[F.embedding] = embedding.embedding
