"""Filters for what Orbax prints about one failure: hundreds of lines beside ours.

Importing the module filters the logs of `absl` and `asyncio`.
"""

import functools
import gc
import logging
import sys
import threading
import traceback
from pathlib import Path
from typing import Any


def _is_news(record: logging.LogRecord) -> bool:
  """Returns whether a log line is more than an error that Orbax also raises.

  If a save fails (on a full disk, for example), each thread and future of the save logs
  a traceback: hundreds of lines, among which our message would be lost.
  """
  is_of_orbax = "orbax" in Path(record.pathname).parts
  is_error = is_of_orbax and record.levelno >= logging.ERROR
  return not is_error and "exception was never retrieved" not in record.getMessage()


for _name in ("absl", "asyncio"):
  logging.getLogger(_name).addFilter(_is_news)


def discard_frames(error: BaseException) -> None:
  """Collects the reads that an error left unfinished, and silences their reports.

  Otherwise the coroutine of every array that was not read yet reports, when Python
  collects the coroutine, that the event loop is closed: hundreds of lines about one
  damaged file.
  """
  hook, log = sys.unraisablehook, logging.getLogger("asyncio")
  was_disabled = log.disabled
  sys.unraisablehook, log.disabled = lambda _: None, True
  try:
    cause: BaseException | None = error
    while cause is not None:
      traceback.clear_frames(cause.__traceback__)
      cause = cause.__cause__ or cause.__context__
    gc.collect()
  finally:
    sys.unraisablehook, log.disabled = hook, was_disabled


@functools.cache
def ignore_late_reads() -> None:
  """Silences reports of reads that end after a failure, for the rest of the process.

  Orbax closes its event loop at the first damaged array. Each thread of TensorStore
  that is still reading then prints through `sys.excepthook` that the loop is closed.
  """
  previous = sys.excepthook

  def hook(kind: Any, error: Any, trace: Any) -> None:
    in_main = threading.current_thread() is threading.main_thread()
    if in_main or str(error) != "Event loop is closed":
      previous(kind, error, trace)

  sys.excepthook = hook
