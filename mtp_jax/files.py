"""Atomic file writes: a reader sees the old file or the new one, never half of one."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

_MOST_BYTES = 64 * 2**20  # The index of a model of 700 billion parameters has 9 MB.
# A path that is wrong, or not ours to write: the same command ends the same way.
_BAD_PATHS = (
  errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
  errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS,
)


def read_json(file: Path) -> dict[str, Any]:
  """Returns the object in a JSON file that anyone may have written.

  Integers of hundreds of digits become floats, perhaps infinite ones.

  Raises:
    OSError: it cannot be read.
    ValueError: too large, too deep, no JSON, or not an object.
  """
  try:
    value = json.loads(read_text(file), parse_int=_parse_int)
  except RecursionError as error:
    raise ValueError("it is nested too deeply.") from error
  if not isinstance(value, dict):
    raise ValueError(f"it must hold an object, got {type(value).__name__}.")
  return value


def read_text(file: Path) -> str:
  """Returns the content of a UTF-8 file that anyone may have written.

  Raises:
    OSError: it cannot be read.
    ValueError: no file, too large, or not UTF-8.
  """
  if file.exists() and not file.is_file():
    raise ValueError("it is no file.")
  with open(file, "rb") as handle:
    content = handle.read(_MOST_BYTES + 1)
  if len(content) > _MOST_BYTES:
    raise ValueError(f"it must have at most {_MOST_BYTES} bytes, it has more.")
  return content.decode()


def _parse_int(digits: str) -> int | float:
  return int(digits) if len(digits) < 100 else float(digits)


def shortened(value: Any) -> str:
  """Returns the `repr` of a value for a message; the middle of a long one left out."""
  text = repr(value)
  return text if len(text) <= 120 else f"{text[:80]} ... {text[-20:]}"


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


def write_json(file: str | os.PathLike, value: Any) -> None:
  """Writes JSON as `write_whole`; see `plain` for values that JSON lacks."""
  write_whole(file, (json.dumps(plain(value), indent=1) + "\n").encode())


def plain(value: Any) -> Any:
  """Returns arrays as lists and numbers as Python's, for JSON; NaN becomes None."""
  if isinstance(value, dict):
    return {k: plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  if hasattr(value, "__array__"):  # Of NumPy or JAX.
    return plain(np.asarray(value).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


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
  """Returns the settings that differ from an unfinished file's, as text; or ""."""
  return "; ".join(
    f"{key} is {now.get(key)!r} now and was {begun.get(key)!r} there"
    for key in begun | now
    if now.get(key) != begun.get(key)
  )


def is_bad_path(error: BaseException) -> bool:
  """Returns whether the error names a path that no further try can use."""
  is_named = isinstance(error, OSError) and error.filename is not None
  return is_named and error.errno in _BAD_PATHS
