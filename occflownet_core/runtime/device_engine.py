# SPDX-License-Identifier: Apache-2.0
"""DeviceEngine: a compiled graph on an accelerator. Buffers are made once, the memory never leaves the device, and the
whole run (copies in, graph, copies out) is recorded once for each choice of outputs and replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from occflownet_core.errors import BundleError, EngineError
from occflownet_core.lift_tables import LiftTables
from occflownet_core.runtime.bundle import Bundle
from occflownet_core.runtime.engine import Engine, Prediction
from occflownet_core.runtime.tensors import Tensor, require_described

_log = logging.getLogger(__name__)

EACH_RUN = ("images", "previous_from_current", "occupancy_threshold")
"""Inputs that come from the host every time."""


class Device(Protocol):
    """Memory, copies and one stream of work. Copies are queued; ``synchronize`` waits for all that was."""

    def allocate(self, nbytes: int) -> int:
        """Address of new memory on the device, all zero."""

    def pinned(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Memory of the host that the device copies from and to without a detour."""

    def upload(self, address: int, array: np.ndarray) -> None:
        """Queue a copy to the device."""

    def download(self, array: np.ndarray, address: int) -> None:
        """Queue a copy to the host."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Queue a copy within the device."""

    def clear(self, address: int, nbytes: int) -> None:
        """Queue zeros."""

    def synchronize(self) -> None:
        """Wait for everything that was queued.

        Raises:
            EngineError: some of it failed.
        """

    def record(self, queue: Callable[[], None]) -> Callable[[], None]:
        """What ``queue`` queues, as one piece of work that can be queued again and again; nothing is run yet.

        Raises:
            EngineError: it holds something that cannot be recorded.
        """

    def close(self) -> None:
        """Give everything back."""


class Program(Protocol):
    """A compiled graph.

    Attributes:
        tensors: its inputs and outputs.
    """

    tensors: Sequence[Tensor]

    def bind(self, name: str, address: int) -> None:
        """Where a tensor lies from now on."""

    def enqueue(self) -> None:
        """Queue a run on the device's stream."""


class DeviceEngine(Engine):
    """Runs a program on a device.

    Inputs of every run and outputs pass through pinned memory. Tables are copied when a calibration changes. The next
    memory is copied onto the previous one on the device, as the last step of the recorded run: all addresses stay what
    they were when it was recorded.

    Args:
        bundle: from ``load_bundle``.
        device: where the program runs.
        program: compiled from the bundle's graph.

    Raises:
        BundleError: the program's tensors are not those that the bundle describes.
        EngineError: the device has not enough memory.
    """

    def __init__(self, bundle: Bundle, device: Device, program: Program) -> None:
        super().__init__(bundle)
        try:
            require_described(bundle, program.tensors)
        except EngineError as error:
            raise BundleError(f"the engine built from {bundle.graph_path} {error}; build it anew") from None
        self._device, self._program = device, program
        self._tensors = {tensor.name: tensor for tensor in program.tensors}
        self._address = {name: device.allocate(tensor.nbytes) for name, tensor in self._tensors.items()}
        self._pinned: dict[str, np.ndarray] = {}
        self._stage((*EACH_RUN, *self.delivered))
        for name, address in self._address.items():
            program.bind(name, address)
        self._recorded: dict[tuple[str, ...], Callable[[], None]] = {}  # by what is delivered

    def reset(self) -> None:
        for state in self.bundle.recurrent:
            self._device.clear(self._address[state.input], self._tensors[state.input].nbytes)

    def memory(self) -> dict[str, np.ndarray]:
        copies = {state.output: np.empty(state.shape, state.dtype) for state in self.bundle.recurrent}
        for state in self.bundle.recurrent:
            self._device.download(copies[state.output], self._address[state.input])
        self._device.synchronize()
        return copies

    def close(self) -> None:
        """Give the device's memory back; the engine is of no use afterwards."""
        self._recorded.clear()  # a recorded run would keep the device
        self._device.close()

    def _load_tables(self, tables: LiftTables) -> None:
        arrays = {name: np.ascontiguousarray(array) for name, array in tables.arrays().items()}
        for name, array in arrays.items():
            tensor = self._tensors[name]
            if (array.shape, array.dtype) != (tensor.shape, np.dtype(tensor.dtype)):
                raise EngineError(
                    f"table {name} is {array.dtype} {array.shape}, the engine takes {tensor.dtype} {tensor.shape}; "
                    "export the model again"
                )
            self._device.upload(self._address[name], array)
        self._device.synchronize()  # the arrays live until here

    def _forward(self, images: np.ndarray, previous_from_current: np.ndarray) -> Prediction:
        for name, value in zip(EACH_RUN, (images, previous_from_current, self.occupancy_threshold), strict=True):
            np.copyto(self._pinned[name], value)
        delivered = self.delivered
        self._stage(delivered)
        self._recorded.get(delivered, self._queue)()
        self._device.synchronize()
        if delivered not in self._recorded:  # a run before recording lets the library do what it does once
            self._recorded[delivered] = self._record()
        return Prediction.from_outputs({name: self._pinned[name].copy() for name in delivered})

    def _stage(self, names: Sequence[str]) -> None:
        """Make the pinned memory that tensors pass through, where there is none yet."""
        for name in names:
            if name not in self._pinned:
                self._pinned[name] = self._device.pinned(self._tensors[name].shape, self._tensors[name].dtype)

    def _queue(self) -> None:
        """One run, step by step."""
        for name in EACH_RUN:
            self._device.upload(self._address[name], self._pinned[name])
        self._program.enqueue()
        for name in self.delivered:
            self._device.download(self._pinned[name], self._address[name])
        for state in self.bundle.recurrent:
            self._device.copy(
                self._address[state.input], self._address[state.output], self._tensors[state.output].nbytes
            )

    def _record(self) -> Callable[[], None]:
        try:
            return self._device.record(self._queue)
        except EngineError as error:
            _log.warning(
                "engine: a run cannot be recorded (%s); its steps are queued one by one, a little slower", error
            )
            return self._queue
