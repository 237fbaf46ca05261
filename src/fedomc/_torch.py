"""The private names of torch that fedomc needs, each behind a function or a name of its own.

Whatever torch changes without notice breaks here and nowhere else: ``tests/test__torch.py`` has a test of each, which
fails first and says what changed.
"""

import torch
from torch import Tensor


def forbid_memory_access(tensor: Tensor) -> None:
    """Make it an error to ask a tensor without memory for its address, in place of a crash.

    Kernels that look at memory without the dispatcher's help, such as those of collectives on lists of lists, then
    raise RuntimeError.
    """
    torch._C._set_throw_on_mutable_data_ptr(tensor)
