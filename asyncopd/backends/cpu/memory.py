"""Memory for gradients of a head: hundreds of megabytes that are new at every step."""

import torch
from torch import Tensor

from asyncopd.backends.native import _C


def empty_gradient(weight: Tensor) -> Tensor:
    """[V, H] in the dtype of weight, contiguous and about to be written as a whole; see csrc/cpu/pages.cpp."""
    gradient = torch.empty(weight.shape, dtype=weight.dtype)
    _C.cpu_populate(gradient.data_ptr(), gradient.nbytes, torch.get_num_threads())
    return gradient
