"""Signals and lifetime of worker processes that prepare or load data."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator


def follow_parent() -> None:
  """Makes a worker process end with its parent; the worker calls this first.

  The worker ignores Ctrl-C, which reaches every process of a terminal: the parent
  handles it. When the parent ends, even by a kill, the worker exits instead of waiting
  for work for ever.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


@contextlib.contextmanager
def shielded_from_interrupts() -> Iterator[None]:
  """Blocks Ctrl-C for processes started in the context, even while they still import.

  A Ctrl-C during the context is delivered to the caller when the context ends.
  """
  before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve_training(*_: int) -> None:
  """As `follow_parent`, for workers that training needs until it has saved.

  The worker ignores SIGTERM, too, which a cluster sends to all processes of a job at
  once. Arguments are ignored: grain passes the worker's number.
  """
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  follow_parent()


def _exit_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)
