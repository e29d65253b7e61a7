"""Files that are there whole or not at all, whatever kills the writer; and going on."""

import os
from typing import Any


def write_whole(file: str | os.PathLike, content: bytes) -> None:
  """Writes a file; a reader sees the old content or the new one.

  Raises:
    OSError: the content could not be written in full; nothing is left of it.
  """
  temporary = temporary_name(file)
  try:
    with open(temporary, "wb") as handle:
      handle.write(content)
    commit(temporary, file)
  finally:
    if os.path.exists(temporary):
      os.unlink(temporary)


def temporary_name(file: str | os.PathLike) -> str:
  """Returns the name beside `file` under which this process writes it."""
  return f"{os.fspath(file)}.tmp-{os.getpid()}"


def commit(temporary: str | os.PathLike, file: str | os.PathLike) -> None:
  """Renames after the bytes are on the disk: a rename must not overtake them."""
  descriptor = os.open(temporary, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
  os.replace(temporary, file)


def changed_settings(begun: dict[str, Any], now: dict[str, Any]) -> str:
  """Returns which settings of an unfinished file differ from those of now; or ""."""
  return "; ".join(
    f"{key} is {now.get(key)!r} now and was {begun.get(key)!r} there"
    for key in begun | now
    if now.get(key) != begun.get(key)
  )
