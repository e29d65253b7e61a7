"""How the processes that prepare or load data begin and end."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator


def follow_parent() -> None:
  """Makes a worker process end with its parent; call it first thing in the worker.

  Ctrl-C reaches every process of a terminal and is left to the parent. When the parent
  is gone, killed perhaps, the worker exits instead of waiting for work for ever.
  """
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


@contextlib.contextmanager
def shielded_from_interrupts() -> Iterator[None]:
  """Processes started within never see Ctrl-C, not even while they still import.

  One that comes meanwhile is delivered to the caller afterwards.
  """
  before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve_training(*_: int) -> None:
  """Like `follow_parent`, for workers that training needs until it has saved.

  A cluster sends SIGTERM to all processes of a job at once; it too is left to the
  parent. Arguments are ignored: grain passes the number of the worker.
  """
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  follow_parent()


def _exit_with_parent() -> None:
  multiprocessing.parent_process().join()
  os._exit(1)
