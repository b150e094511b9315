"""Tensors copied to the host."""

import torch
from torch import Tensor


class HostCopies:
    """Copies of tensors on the host, made one after another.

    From a GPU: into pinned memory, which takes a fraction of the time, on a stream of their own, so
    that the next tensor is gathered meanwhile. PyTorch keeps the pinned memory for later copies.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def add(self, tensor: Tensor) -> Tensor:
        """A contiguous copy; not complete, and the tensor not to be changed, before `wait`."""
        if not tensor.is_cuda:
            return tensor.to("cpu", copy=True).contiguous()
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.wait()  # so that at most two tensors take memory on the device
        self._stream = self._stream or torch.cuda.Stream(tensor.device)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            copy.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        return copy

    def wait(self) -> None:
        """Return once all copies are complete."""
        if self._stream is not None:
            self._stream.synchronize()


def copy_bytes(tensor: Tensor) -> int:
    """Bytes that a copy takes on the host; PyTorch pins memory in powers of two."""
    size = tensor.numel() * tensor.element_size()
    return 1 << max(0, size - 1).bit_length() if tensor.is_cuda else size
