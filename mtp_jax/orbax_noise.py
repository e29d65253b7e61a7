"""Filters for what Orbax prints about one failure: hundreds of lines beside ours."""

import functools
import logging
import sys
import threading
from pathlib import Path
from typing import Any

_OF_ASYNCIO = ("exception was never retrieved", "Task was destroyed")


def _is_news(record: logging.LogRecord) -> bool:
  """Returns whether a log line is more than an error that Orbax also raises.

  If a save fails (on a full disk, for example), each thread and future of the save logs
  a traceback: hundreds of lines, among which our message would be lost.
  """
  is_error = record.levelno >= logging.ERROR
  if "orbax" in Path(record.pathname).parts and is_error:
    return False
  return not any(text in record.getMessage() for text in _OF_ASYNCIO)


def _is_late(error: BaseException | None, of: Any = None) -> bool:
  """Returns whether an error is of a read that ended after Orbax had given up."""
  code = getattr(of, "cr_code", None)
  is_of_orbax = code is not None and "orbax" in Path(code.co_filename).parts
  return is_of_orbax or str(error) == "Event loop is closed"


@functools.cache
def silence() -> None:
  """Filters logs and the hooks for errors that nobody catches, once in a process.

  Orbax closes its event loop at the first damaged array. Then every TensorStore thread
  that is still reading reports that the loop is closed. Every coroutine that waits for
  a read raises when Python collects the coroutine, however late.
  """
  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(_is_news)
  uncaught, unraisable = sys.excepthook, sys.unraisablehook

  def on_uncaught(kind: Any, error: Any, trace: Any) -> None:
    in_main = threading.current_thread() is threading.main_thread()
    if in_main or not _is_late(error):
      uncaught(kind, error, trace)

  def on_unraisable(report: Any) -> None:
    if not _is_late(report.exc_value, report.object):
      unraisable(report)

  sys.excepthook, sys.unraisablehook = on_uncaught, on_unraisable
