"""Input files: finds the files of a source, and reads lines of JSONL files."""

import codecs
import glob
import gzip
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import zstandard

from mtp_jax.data.errors import DataError

# Some editors write this mark before a text; it is not part of the text.
BYTE_ORDER_MARK = "\ufeff"
_CHUNK_BYTES = 1 << 20
_NOT_STDLIB = ("site-packages", "dist-packages")


def find_files(source: str, path: str) -> tuple[str, list[tuple[str, str]]]:
  """Returns (where, sorted [(name, file)]) of a source's input files."""
  if source == "stdlib":
    where = sysconfig.get_path("stdlib")
    files = _walk([where], ".py", skip=_NOT_STDLIB)
  elif source == "site_packages":
    folders = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    where = ", ".join(folders)
    files = _walk(folders, ".py", skip=())
  else:
    where = os.path.expanduser(path)
    if source == "files" and os.path.isdir(where):
      files = _walk([where], "", skip=())
    else:
      found = glob.glob(where, recursive=True, include_hidden=True)
      # A path that exists is taken literally, even with glob characters in it.
      found = [where] if os.path.isfile(where) else found
      files = [(file, file) for file in found if os.path.isfile(file)]
  if not files:
    kind = "a folder, file or glob" if source == "files" else "a file or glob"
    has_path = source not in ("stdlib", "site_packages")
    rule = f"data.path must be {kind} that names" if has_path else "there must be"
    raise DataError(
      f"{rule} at least one file for data.source {source!r}; looked in {where!r} "
      "and found none."
    )
  return where, sorted(files)


def _walk(
  folders: list[str], suffix: str, skip: tuple[str, ...]
) -> list[tuple[str, str]]:
  """Returns [(path within its folder, file)] of all matching files below `folders`."""
  files = []
  seen: set[str] = set()
  for folder in filter(os.path.isdir, folders):
    walk = os.walk(folder, onerror=_refuse_folder, followlinks=True)
    for root, subfolders, names in walk:
      real = os.path.realpath(root)
      if real in seen:  # A link to a visited folder, perhaps in a circle.
        subfolders.clear()
        continue
      seen.add(real)
      subfolders[:] = sorted(set(subfolders).difference(skip))
      for name in names:
        file = os.path.join(root, name)
        # Skips dangling links, sockets and pipes.
        if name.endswith(suffix) and os.path.isfile(file):
          files.append((os.path.relpath(file, folder), file))
  return files


def _refuse_folder(error: OSError) -> None:
  raise DataError(f"{error.filename}: cannot be read ({error.strerror}).") from error


def parse_line(line: bytes, where: str) -> dict[str, Any] | None:
  """Returns the object of one JSONL line; None for a blank line.

  Raises:
    DataError: the line is no JSON object.
    UnicodeDecodeError: the line is not UTF-8.
  """
  text = line.decode("utf-8")
  if not text.strip():
    return None
  try:
    record = json.loads(text)
  # ValueError: bad JSON, or a number with too many digits for Python.
  except (ValueError, RecursionError) as error:
    raise DataError(f"{where}: not valid JSON ({error}).") from error
  if not isinstance(record, dict):
    raise DataError(f"{where}: must be a JSON object, got {type(record).__name__}.")
  return record


def read_lines(handle: BinaryIO, file: str) -> Iterator[bytes]:
  """Yields the lines of a plain, .gz or .zst file, without ends and byte order mark.

  Raises:
    DataError: damaged or cut short.
  """
  parts: list[bytes] = []
  mark = codecs.BOM_UTF8
  for chunk in _chunks(handle, file):
    first, *rest = chunk.split(b"\n")
    parts.append(first)
    for following in rest:
      yield b"".join(parts).removeprefix(mark)
      parts, mark = [following], b""
  if last := b"".join(parts).removeprefix(mark):
    yield last


def _chunks(handle: BinaryIO, file: str) -> Iterator[bytes]:
  """Yields the decompressed bytes of a plain, .gz or .zst file."""
  try:
    if file.endswith(".gz"):
      with gzip.open(handle) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
          yield chunk
    elif file.endswith(".zst"):
      yield from _zstd_chunks(handle)
    else:
      while chunk := handle.read(_CHUNK_BYTES):
        yield chunk
  except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
    raise DataError(f"{file}: damaged or cut short ({error}).") from error


def _zstd_chunks(handle: BinaryIO) -> Iterator[bytes]:
  """Yields the decompressed bytes of all frames; EOFError if the last one is cut.

  The library's stream reader would silently stop after the first frame, and at the end
  of a truncated file.
  """
  frame = _zstd_frame()
  started = False
  while data := handle.read(_CHUNK_BYTES):
    while data:
      if frame.eof:
        frame = _zstd_frame()
      started = True
      chunk = frame.decompress(data)
      if chunk:
        yield chunk
      data = frame.unused_data if frame.eof else b""
  if started and not frame.eof:
    raise EOFError("the last zstd frame has no end")


def _zstd_frame() -> Any:
  # Large corpora are often compressed with `--long=31`.
  return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
