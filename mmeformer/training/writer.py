# SPDX-License-Identifier: Apache-2.0
"""Write checkpoints in the background, from a copy, while the training goes on."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mmeformer.errors import TrainingError


class HostCopy:
    """Copies of nested containers of tensors in the memory of the host.

    The memory of one copy is used again for the next, so there is one at a time: as large as a
    checkpoint, for as long as the training runs. Copies of a GPU's tensors are in pinned memory.
    """

    SMALL = 4096
    """Bytes up to which a tensor gets new memory."""

    def __init__(self) -> None:
        self._memory: dict[tuple, Tensor] = {}
        self._late: list[tuple[Tensor, Tensor]] = []
        """Memory, and the tensors that :meth:`finish` copies into it."""

    def copy(self, tree: Any, late: str | None = None) -> Any:
        """A copy whose tensors have PyTorch's default memory format; the one before is invalid.

        Args:
            tree: tensors in mappings, lists and tuples; anything else is not copied.
            late: key of the tree's entry whose large tensors are copied by :meth:`finish`, until
                when they must not change.
        """
        self._late = []
        copied = self._copy(tree, (), late)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def finish(self) -> None:
        """Copy what is left to copy."""
        for memory, tensor in self._late:
            memory.copy_(tensor, non_blocking=True)
        self._late = []
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _copy(self, tree: Any, path: tuple, late: str | None) -> Any:
        if isinstance(tree, Tensor):
            return self._copy_tensor(tree.detach(), path, path[:1] == (late,))
        if isinstance(tree, Mapping):
            # As it is: PyTorch's state_dict has an attribute with versions of modules.
            copied = copy.copy(tree)
            for key, value in tree.items():
                copied[key] = self._copy(value, (*path, key), late)  # type: ignore[index]
            return copied
        if type(tree) in (list, tuple):
            return type(tree)(self._copy(item, (*path, i), late) for i, item in enumerate(tree))
        return tree

    def _copy_tensor(self, tensor: Tensor, path: tuple, late: bool) -> Tensor:
        if tensor.layout != torch.strided or tensor.nbytes <= self.SMALL:
            return tensor.cpu().clone(memory_format=torch.contiguous_format)
        memory = self._memory.get(path)
        if memory is None or (memory.shape, memory.dtype) != (tensor.shape, tensor.dtype):
            memory = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._memory[path] = memory
        if late:
            self._late.append((memory, tensor))
            return memory
        return memory.copy_(tensor, non_blocking=True)


class NotWritten(TrainingError):
    """A checkpoint could not be written; older ones stay as they were."""


class Writer:
    """Context manager that writes one checkpoint at a time in a thread, and waits for the last.

    Args:
        logger: for errors that do not stop the run.
        stop_on_error: raise :class:`NotWritten`. Otherwise it is logged, and the next checkpoint
            has to succeed; the last one raises it.
    """

    def __init__(self, logger: logging.Logger, stop_on_error: bool) -> None:
        self.logger = logger
        self.stop_on_error = stop_on_error
        self.host = HostCopy()
        """Memory for what is being written."""
        self.copied = threading.Event()
        """Set while nothing is left to copy."""
        self.copied.set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future | None = None
        self._failed: NotWritten | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.finish()
            else:
                self.wait()
        except TrainingError as other:
            if kind is None:
                raise
            # The first error is the one to raise.
            self.logger.error(str(other))
        finally:
            self._thread.shutdown()

    def start(self, job: Callable[[], None]) -> None:
        """Finish the copy and run a job when the one before is complete.

        Both in the thread. This may raise the error of the job before.
        """
        self.wait()
        self.copied.clear()
        self._job = self._thread.submit(self._run, job)

    def _run(self, job: Callable[[], None]) -> None:
        try:
            self.host.finish()
        finally:
            self.copied.set()
        job()

    def wait(self) -> None:
        """Wait for the job; its error is raised or logged."""
        job, self._job = self._job, None
        if job is None:
            return
        try:
            job.result()
        except NotWritten as error:
            if self.stop_on_error:
                raise
            self._failed = error
            self.logger.error(f"{error}; the training goes on to the next one")
        else:
            self._failed = None

    def check(self) -> None:
        """Raise or log the error of the job if it has failed; does not wait."""
        if self._job is not None and self._job.done():
            self.wait()

    def finish(self) -> None:
        """Wait for the job; raises NotWritten if it, the last one, has failed."""
        self.wait()
        if self._failed is not None:
            raise self._failed
