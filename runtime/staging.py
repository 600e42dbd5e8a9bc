"""A mapped model's way to a device: through two pinned buffers, one filled while the other is sent.

Pages of a mapped file can't be pinned, and a copy from memory that isn't pinned goes through the driver's own
staging, piece by piece, and keeps the host waiting. From pinned memory a ``non_blocking`` copy returns at
once: the stream reads the buffer later, so it is filled again only after the event behind that copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import nn

BUFFER_BYTES = 32 << 20


def open_on(model: nn.Module, device: torch.device) -> nn.Module:
    """The same model with its tensors on ``device``, which this process opens here for the first time.

    On a CPU they stay what they are: pages of a file that all processes share.
    """
    if device.type == "cpu":
        return model
    if device.index is not None:
        torch.accelerator.set_device_index(device)  # pinned memory belongs to the current one's context
    move(model, Staging(device, [Buffer(device, BUFFER_BYTES) for _ in range(2)]))
    if hasattr(torch.accelerator, "empty_host_cache"):  # not in every torch that we take
        torch.accelerator.empty_host_cache()  # the pinned buffers, which it would keep for the next ones
    return model


def move(model: nn.Module, staging: Staging) -> None:
    """Gives each parameter and buffer memory on the device; what shared memory shares it there too."""
    moved: dict[tuple[int, int], torch.UntypedStorage] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        source = tensor.untyped_storage()
        key = (source.data_ptr(), source.nbytes())
        if key not in moved:
            moved[key] = staging.copy(source)
        view = torch.empty(0, dtype=tensor.dtype, device=staging.device)
        tensor.data = view.set_(moved[key], tensor.storage_offset(), tensor.size(), tensor.stride())
    staging.wait()


class Arrival(Protocol):
    """An event on a device's stream: behind a copy, say."""

    def synchronize(self) -> None:
        """Returns when the device has come to it."""
        ...


class Buffer:
    """Host memory that a device reads at its own time; pinned, where the device isn't the CPU itself."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._is_apart = device.type != "cpu"
        self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_apart)
        self._arrival: Arrival | None = None  # of the last chunk

    @property
    def num_bytes(self) -> int:
        return self._memory.numel()

    def send(self, chunk: torch.Tensor, place: torch.Tensor) -> None:
        """Waits until the last chunk has arrived; doesn't wait for this one."""
        self.wait()
        filled = self._memory[: chunk.numel()]
        filled.copy_(chunk)
        self._arrival = self._read(filled, place)

    def wait(self) -> None:
        """Returns when what was sent has arrived; at once where that was nothing."""
        if self._arrival is not None:
            self._arrival.synchronize()

    def _read(self, filled: torch.Tensor, place: torch.Tensor) -> Arrival | None:
        """Has the device read it into ``place``; None: it has done so already.

        On the device's current stream, where its memory is allocated and will be used: no other stream ever
        has to wait for this one.
        """
        place.copy_(filled, non_blocking=True)
        return torch.accelerator.current_stream(place.device).record_event() if self._is_apart else None


class Staging:
    """Copies memory to one device, through its buffers in turn; ``wait`` after the last copy."""

    def __init__(self, device: torch.device, buffers: Sequence[Buffer]) -> None:
        self.device = device
        self._buffers = buffers
        self._turns = itertools.cycle(buffers)
        self._chunk_bytes = min(buffer.num_bytes for buffer in buffers)

    def copy(self, source: torch.UntypedStorage) -> torch.UntypedStorage:
        """Memory on the device that holds the same bytes, once ``wait`` has returned."""
        target = torch.UntypedStorage(source.nbytes(), device=self.device)  # type: ignore[no-untyped-call]
        for chunk, place in zip(self._chunks(source), self._chunks(target), strict=True):
            next(self._turns).send(chunk, place)
        return target

    def wait(self) -> None:
        """Returns when all that was copied has arrived."""
        for buffer in self._buffers:
            buffer.wait()

    def _chunks(self, storage: torch.UntypedStorage) -> Iterable[torch.Tensor]:
        """Views of its bytes, none larger than a buffer; none of an empty one."""
        content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return torch.split(content, self._chunk_bytes) if content.numel() else ()
