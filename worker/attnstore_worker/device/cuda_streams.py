"""Streams, events and timers of a CUDA device, and its errors.

Owns: `Faults`, `CudaStream`, `CallersStream`, `CudaEvent`, `CudaCopy` and `CudaTimer`. Invariant: after an error that ends all
work of the process on the device, every call raises `DeviceLost` without another call to the driver.

The current device and stream of CUDA belong to a thread, and a new thread has device 0. So nothing here depends on them but
`CallersStream`: every submission names its stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from attnstore.errors import AttnStoreError
from attnstore.sizes import size_text
from attnstore_worker.device.base import Event, Wait
from attnstore_worker.errors import DeviceLost, OutOfDeviceMemory

_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
"""Parts of the messages of Triton and cuBLAS, which do not raise torch's error."""


class Faults:
    """The errors of one device. Thread-safe."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._lost: str | None = None

    @contextmanager
    def mapped(self) -> Iterator[None]:
        """Runs a block that calls the device. Raises `OutOfDeviceMemory` and `DeviceLost` in place of the errors of torch and
        Triton; other errors pass.
        """
        if self._lost is not None:
            raise DeviceLost(self._lost)
        try:
            yield
        except AttnStoreError:
            raise
        except torch.OutOfMemoryError as error:
            raise self.out_of_memory() from error
        except RuntimeError as error:
            if not self._still_works():
                raise self._lose(str(error)) from error
            if any(sign in str(error) for sign in _OUT_OF_MEMORY):
                raise self.out_of_memory() from error
            raise

    def _still_works(self) -> bool:
        """Returns whether the driver still takes work: an error that ends all work is returned by every later call."""
        try:
            stream = torch.cuda.Stream(self._index)
            event = torch.cuda.Event()
            event.record(stream)
            event.query()
        except RuntimeError:
            return False
        return True

    def _lose(self, told: str) -> DeviceLost:
        reason = told.strip().splitlines()[0]
        self._lost = f"cuda:{self._index} does no work any more, restart the worker: {reason}"
        return DeviceLost(self._lost)

    def out_of_memory(self) -> OutOfDeviceMemory:
        """Returns the error with the memory that is free now."""
        free, total = torch.cuda.mem_get_info(self._index)
        return OutOfDeviceMemory(f"cuda:{self._index} has too little memory: {size_text(free)} of {size_text(total)} are free")


class CudaEvent:
    """See `Event`."""

    def __init__(self, event: torch.cuda.Event, faults: Faults) -> None:
        self.cuda = event
        self._faults = faults

    def done(self) -> bool:
        """See `Event.done`. Raises `DeviceLost`."""
        with self._faults.mapped():
            return bool(self.cuda.query())

    def wait(self, wait: Wait) -> None:
        """See `Event.wait`. Does not hold the interpreter lock."""
        with self._faults.mapped():
            self.cuda.synchronize()


class CudaCopy(CudaEvent):
    """See `Copy`. Both events have their times."""

    def __init__(self, begin: torch.cuda.Event, end: torch.cuda.Event, faults: Faults) -> None:
        super().__init__(end, faults)
        self._begin = begin

    def elapsed_ms(self) -> float | None:
        """See `Copy.elapsed_ms`. Raises `DeviceLost`."""
        with self._faults.mapped():
            return float(self._begin.elapsed_time(self.cuda)) if self.cuda.query() else None


class CudaStream:
    """See `Stream`. `sleeps`: a thread that waits for an event of this stream sleeps; otherwise it spins, which ends the wait some
    ten microseconds earlier and keeps a core busy.
    """

    def __init__(self, stream: torch.cuda.Stream, faults: Faults, *, sleeps: bool) -> None:
        self._own = stream
        self._faults = faults
        self._sleeps = sleeps

    @property
    def _stream(self) -> torch.cuda.Stream:
        return self._own

    def record(self) -> CudaEvent:
        """See `Stream.record`. Raises `DeviceLost`."""
        with self._faults.mapped():
            event = torch.cuda.Event(blocking=self._sleeps)
            event.record(self._stream)
            return CudaEvent(event, self._faults)

    def timed(self, submit: Callable[[], None]) -> CudaCopy:
        """See `CopyStream.timed`. Raises as `Faults.mapped`."""
        begin = _mark(self._stream, self._faults)
        with self.submitting():
            submit()
        return CudaCopy(begin, _mark(self._stream, self._faults, sleeps=self._sleeps), self._faults)

    def wait(self, event: Event, wait: Wait) -> None:
        """See `Stream.wait`. Raises `DeviceLost`."""
        assert isinstance(event, CudaEvent)
        with self._faults.mapped():
            self._stream.wait_event(event.cuda)

    @contextmanager
    def submitting(self) -> Iterator[None]:
        """Makes the device and the stream current for the calling thread, for the length of a block. Raises as `Faults.mapped`."""
        with self._faults.mapped(), torch.cuda.stream(self._stream):
            yield

    def timer(self) -> CudaTimer:
        """Returns a timer that starts after all work submitted so far. Raises `DeviceLost`."""
        return CudaTimer(self._stream, self._faults)

    def synchronize(self) -> None:
        """Waits for all work submitted so far. Raises `DeviceLost`."""
        with self._faults.mapped():
            self._stream.synchronize()


class CallersStream(CudaStream):
    """The stream that is current for the calling thread when a method is called: that of the model of an engine, on the engine's
    thread. `stream` is the device's default one.
    """

    @property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._own.device)


class CudaTimer:
    """See `Timer`."""

    def __init__(self, stream: torch.cuda.Stream, faults: Faults) -> None:
        self._stream = stream
        self._faults = faults
        self._end: torch.cuda.Event | None = None
        self._begin = _mark(stream, faults)

    def stop(self) -> None:
        """See `Timer.stop`. Raises `DeviceLost`."""
        self._end = _mark(self._stream, self._faults)

    def elapsed_ms(self) -> float | None:
        """See `Timer.elapsed_ms`. Raises `DeviceLost`."""
        with self._faults.mapped():
            if self._end is None or not self._end.query():
                return None
            return float(self._begin.elapsed_time(self._end))


def _mark(stream: torch.cuda.Stream, faults: Faults, *, sleeps: bool = False) -> torch.cuda.Event:
    """Records an event that has its time. `sleeps` as in `CudaStream`."""
    with faults.mapped():
        event = torch.cuda.Event(enable_timing=True, blocking=sleeps)
        event.record(stream)
        return event
