"""The same work in one process or in several: results come in the order of the tasks, and do not depend on their number."""

from __future__ import annotations

import multiprocessing
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from ..unfinished import InterruptedWork

_WAITING = 2  # finished results for each process that may wait for the one before them
_work: Any = None  # in a process of a pool: what it works with


class Processes:
    """Calls methods of an object here, or of its copies in other processes; a context manager that ends them.

    Args:
        work: the object.
        count: how many processes. With more than one, each computes in one thread: the results are those of one process with
            one thread.
    """

    def __init__(self, work: Any, count: int) -> None:
        self._work, self._count = work, count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Processes:
        if self._count > 1:
            context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
            self._pool = ProcessPoolExecutor(
                self._count, mp_context=context, initializer=_begin, initargs=(pickle.dumps(self._work),)
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, method: str, tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The results of `work.method(*task)`, in the order of the tasks; few are ahead of the one that is waited for.

        Raises:
            InterruptedWork: a process was killed. Whatever the method raises.
        """
        if self._pool is None:
            call: Callable[..., Any] = getattr(self._work, method)
            yield from (call(*task) for task in tasks)
            return
        waiting: deque[Future[bytes]] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(_call, method, pickle.dumps(task)))
                if len(waiting) > _WAITING * self._count:
                    yield pickle.loads(waiting.popleft().result())
            while waiting:
                yield pickle.loads(waiting.popleft().result())
        except BrokenProcessPool as error:
            raise InterruptedWork(
                f"one of {self._count} processes ended before its work did; was it killed for want of memory? Fewer "
                "(--num-processes) need less. The same command goes on where this one stopped",
                argument="num_processes", value=self._count,
            ) from error  # fmt: skip


def _begin(work: bytes) -> None:
    global _work
    torch.set_num_threads(1)
    _work = pickle.loads(work)


def _call(method: str, task: bytes) -> bytes:
    return pickle.dumps(getattr(_work, method)(*pickle.loads(task)))
