"""What an error of torch, the driver or a library says of the device's memory."""

from __future__ import annotations

import torch

_WORDS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error says that the device lacks memory.

    torch raises its own class for tensors, but a `RuntimeError` with the words of the driver, cuBLAS or cuDNN
    for graphs, kernels' modules and workspaces. NCCL's failures do not count: its group has ended with them.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return "NCCL" not in text and any(words in text for words in _WORDS)
