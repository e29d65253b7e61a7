"""Where text comes from: documents out of files, with nothing skipped in silence.

A document is one text file or one JSONL line. Its identity is the sha256 of its UTF-8
bytes: that decides duplicates, the split and the order, so neither the order of files
nor their names nor the machine matters. What cannot be used (bytes that are not UTF-8,
texts of white space only, exact duplicates) is left out, counted and reported.
"""

import dataclasses
import glob
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import zstandard

from mtp_jax.data.generated import GENERATED

SPLITS = ("train", "validation", "test")
_CHUNK_BYTES = 1 << 20
_NOT_STDLIB = ("site-packages", "dist-packages")


class DataError(ValueError):
  """Input data that cannot be used; the message says where and why."""


@dataclasses.dataclass(frozen=True)
class Document:
  """One text. `name`: relative path, or `file:line`. `content_hash`: 32 bytes."""

  name: str
  text: str
  content_hash: bytes


@dataclasses.dataclass(frozen=True)
class SourceStats:
  """What one pass over a source met.

  where:           the folders or files that were read.
  num_files:       files opened; 0 where the texts are generated.
  num_documents:   distinct documents kept.
  num_bytes:       their UTF-8 bytes.
  num_empty:       texts left out because they are white space only.
  num_duplicates:  texts left out because their bytes were already there.
  encoding_errors: names of the texts left out because they have no UTF-8 form.
  manifest:        sha256 over the sorted content hashes: equal means equal corpus.
  """

  where: str
  num_files: int
  num_documents: int
  num_bytes: int
  num_empty: int
  num_duplicates: int
  encoding_errors: tuple[str, ...]
  manifest: str


@dataclasses.dataclass(frozen=True)
class Documents:
  """All documents of a source in the order of their content hashes.

  names, texts: N strings. hashes_NX: [N, 32] uint8. stats: how they were found.
  edges_N2: [N, 2] bool: the text begins a document (bos before it); it ends one (eos).
  """

  names: list[str]
  texts: list[str]
  hashes_NX: np.ndarray
  stats: SourceStats
  edges_N2: np.ndarray


class DocumentReader:
  """Iterates over the distinct documents of a source, one in memory at a time.

  `source`, `path` and `text_field` mean what they mean in `DataConfig`; `array_record`
  holds tokens instead of text and is read by `prepared.py`. Every iteration starts
  anew; `stats()` describes the last complete one. `done_bytes` of `total_bytes` tells
  how far through the input files the current one is.

  Raises:
    DataError: at construction if no input file exists; while iterating on a damaged or
      unreadable file or a line that is not a JSON object with the text field; at the
      end if not one document was found.
  """

  def __init__(self, source: str, path: str, text_field: str):
    self._is_jsonl = source == "jsonl"
    self._text_field = text_field
    self._generated: list[tuple[str, bytes]] = []
    self._files: list[tuple[str, str]] = []
    if source in GENERATED:
      self._where = source
      self._generated = [(name, text.encode()) for name, text in GENERATED[source]()]
    else:
      self._where, self._files = _find_files(source, path)
    self.total_bytes = sum(os.path.getsize(file) for _, file in self._files)
    self.total_bytes += sum(len(data) for _, data in self._generated)
    self._reset()

  def _reset(self) -> None:
    self.done_bytes = 0
    self._num_empty = 0
    self._num_duplicates = 0
    self._num_bytes = 0
    self._encoding_errors: list[str] = []
    self._seen: set[bytes] = set()

  def __iter__(self) -> Iterator[Document]:
    self._reset()
    for name, data in self._texts():
      document = self._accept(name, data)
      if document is not None:
        yield document
    if not self._seen:
      raise DataError(
        f"no document found: looked at {len(self._files)} file(s) in {self._where}; "
        f"{self._num_empty} empty, {len(self._encoding_errors)} not UTF-8."
      )

  def stats(self) -> SourceStats:
    """Returns what the last iteration met; complete only if it ran to its end."""
    return SourceStats(
      where=self._where,
      num_files=len(self._files),
      num_documents=len(self._seen),
      num_bytes=self._num_bytes,
      num_empty=self._num_empty,
      num_duplicates=self._num_duplicates,
      encoding_errors=tuple(self._encoding_errors),
      manifest=manifest_of(self._seen),
    )

  def _texts(self) -> Iterator[tuple[str, bytes | None]]:
    """Yields (name, UTF-8 bytes or None), and keeps `done_bytes`."""
    for name, data in self._generated:
      self.done_bytes += len(data)
      yield name, data
    for name, file in self._files:
      size, base = os.path.getsize(file), self.done_bytes
      yield from self._read(name, file, base)
      self.done_bytes = base + size

  def _read(
    self, name: str, file: str, base: int
  ) -> Iterator[tuple[str, bytes | None]]:
    """Yields (name, UTF-8 bytes or None where the text has no UTF-8 form)."""
    try:
      with open(file, "rb") as handle:
        if not self._is_jsonl:
          yield name, handle.read()
          return
        for number, line in enumerate(read_lines(handle, file), start=1):
          self.done_bytes = base + handle.tell()
          text = _text_of_line(line, f"{file}:{number}", self._text_field)
          yield f"{name}:{number}", text
    except OSError as error:
      raise DataError(f"{file}: cannot be read ({error.strerror or error}).") from error

  def _accept(self, name: str, data: bytes | None) -> Document | None:
    try:
      text = None if data is None else data.decode("utf-8")
    except UnicodeDecodeError:
      text = None
    if text is None:
      self._encoding_errors.append(name)
      return None
    if not text.strip():
      self._num_empty += 1
      return None
    content_hash = hashlib.sha256(data).digest()
    if content_hash in self._seen:
      self._num_duplicates += 1
      return None
    self._seen.add(content_hash)
    self._num_bytes += len(data)
    return Document(name, text, content_hash)


def describe(stats: Mapping[str, Any]) -> str:
  """Returns one line on the fields of a `SourceStats`: what was read and left out."""
  left_out = (
    f"{stats['num_duplicates']:,} duplicate, {stats['num_empty']:,} empty, "
    f"{len(stats['encoding_errors']):,} not UTF-8"
  )
  if stats["encoding_errors"]:
    left_out += f" ({stats['encoding_errors'][0]}, ...)"
  return (
    f"{stats['num_documents']:,} documents ({stats['num_bytes'] / 1e6:,.1f} MB) from "
    f"{stats['num_files']:,} file(s) in {stats['where']}; left out: {left_out}"
  )


def load_documents(source: str, path: str, text_field: str) -> Documents:
  """Reads a whole source into memory; see `DocumentReader` for what it raises."""
  reader = DocumentReader(source, path, text_field)
  documents = sorted(reader, key=lambda document: document.content_hash)
  return Documents(
    names=[document.name for document in documents],
    texts=[document.text for document in documents],
    hashes_NX=hash_array(document.content_hash for document in documents),
    stats=reader.stats(),
    edges_N2=np.ones((len(documents), 2), bool),
  )


def split_of(
  hashes_NX: np.ndarray, validation_fraction: float, test_fraction: float
) -> np.ndarray:
  """Returns `split_N`: for each document 0 train, 1 validation, 2 test (`SPLITS`).

  The first 8 bytes of the content hash [N, 32] uint8 are a uniform number in [0, 1):
  below `validation_fraction` is validation, the next `test_fraction` is test. A
  document's split therefore never depends on which others there are.
  """
  uniform_N = _word(hashes_NX, 0) / 2.0**64
  held_out = validation_fraction + test_fraction
  return np.where(
    uniform_N < validation_fraction, 1, np.where(uniform_N < held_out, 2, 0)
  )


def document_order(hashes_NX: np.ndarray, seed: int | None) -> np.ndarray:
  """Returns the permutation `order_N` that puts documents into a canonical order.

  Sorted by content hash [N, 32] uint8, or, given a seed, shuffled by it. The shuffle
  sorts by a 64-bit mix (SplitMix64's finaliser) of seed and hash rather than by a
  random generator, so it is the same for every NumPy and every order of the input.
  """
  words = [_word(hashes_NX, i) for i in range(4)]
  if seed is None:
    return np.lexsort(words[::-1])
  state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
  return np.lexsort([*words[::-1], mix(words[1] ^ state)])


def mix(words: np.ndarray) -> np.ndarray:
  """Returns uint64 words of any shape, each mixed by SplitMix64's finaliser."""
  for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
    words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
  return words ^ (words >> np.uint64(31))


def manifest_of(content_hashes: Iterable[bytes]) -> str:
  """Returns the hex sha256 over the sorted content hashes (32 bytes each)."""
  return hashlib.sha256(b"".join(sorted(content_hashes))).hexdigest()


def hash_array(content_hashes: Iterable[bytes]) -> np.ndarray:
  """Returns content hashes (32 bytes each) as a [N, 32] uint8 array."""
  return np.frombuffer(b"".join(content_hashes), np.uint8).reshape(-1, 32)


def _word(hashes_NX: np.ndarray, index: int) -> np.ndarray:
  """Returns the index-th 8 bytes of each hash as a big-endian number, uint64."""
  bytes_N8 = np.ascontiguousarray(hashes_NX[:, 8 * index : 8 * index + 8])
  return bytes_N8.view(">u8")[:, 0].astype(np.uint64)


def _find_files(source: str, path: str) -> tuple[str, list[tuple[str, str]]]:
  """Returns (where, sorted [(name, file)]) of a source's input files."""
  if source == "stdlib":
    where = sysconfig.get_path("stdlib")
    files = _walk([where], ".py", skip=_NOT_STDLIB)
  elif source == "site_packages":
    folders = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    where = ", ".join(folders)
    files = _walk(folders, ".py", skip=())
  elif source in ("files", "jsonl"):
    where = os.path.expanduser(path)
    if source == "files" and os.path.isdir(where):
      files = _walk([where], "", skip=())
    else:
      found = glob.glob(where, recursive=True, include_hidden=True)
      # A path that exists is meant literally even if it has glob characters in it.
      found = [where] if os.path.isfile(where) else found
      files = [(file, file) for file in found if os.path.isfile(file)]
  else:
    raise DataError(
      "data.source must be 'stdlib', 'site_packages', 'files', 'jsonl', "
      f"'language_reference' or 'stories' to read texts from, got {source!r}."
    )
  if not files:
    kind = "a file or glob" if source == "jsonl" else "a folder, file or glob"
    has_path = source in ("files", "jsonl")
    rule = f"data.path must be {kind} that names" if has_path else "there must be"
    raise DataError(
      f"{rule} at least one file for data.source {source!r}; looked in {where!r} "
      "and found none."
    )
  return where, sorted(files)


def _walk(
  folders: list[str], suffix: str, skip: tuple[str, ...]
) -> list[tuple[str, str]]:
  """Returns [(path within its folder, file)] of the text files below some folders."""
  files = []
  seen: set[str] = set()
  for folder in filter(os.path.isdir, folders):
    walk = os.walk(folder, onerror=_refuse_folder, followlinks=True)
    for root, subfolders, names in walk:
      real = os.path.realpath(root)
      if real in seen:  # A link to where we have been, in a circle perhaps.
        subfolders.clear()
        continue
      seen.add(real)
      subfolders[:] = sorted(set(subfolders).difference(skip))
      for name in names:
        file = os.path.join(root, name)
        # A dangling link, socket or pipe has no text.
        if name.endswith(suffix) and os.path.isfile(file):
          files.append((os.path.relpath(file, folder), file))
  return files


def _refuse_folder(error: OSError) -> None:
  raise DataError(f"{error.filename}: cannot be read ({error.strerror}).") from error


def _text_of_line(line: bytes, where: str, field: str) -> bytes | None:
  """Returns the text of one JSONL line as UTF-8, or None where it has no such form."""
  if not line.strip():
    return b""
  try:
    record = parse_line(line.decode("utf-8"), where)
  except UnicodeDecodeError:
    return None
  if field not in record:
    raise DataError(
      f"{where}: data.text_field {field!r} is not a key of this line; "
      f"its keys are {sorted(record)}."
    )
  if not isinstance(record[field], str):
    raise DataError(
      f"{where}: data.text_field {field!r} must hold a string, got "
      f"{type(record[field]).__name__}."
    )
  try:
    return record[field].encode("utf-8")
  except UnicodeEncodeError:  # JSON can escape half of a surrogate pair.
    return None


def parse_line(line: str, where: str) -> dict[str, Any]:
  """Returns the object of one JSONL line; raises DataError if it holds none."""
  try:
    record = json.loads(line)
  # ValueError: bad JSON, or a number with too many digits for Python.
  except (ValueError, RecursionError) as error:
    raise DataError(f"{where}: not valid JSON ({error}).") from error
  if not isinstance(record, dict):
    raise DataError(f"{where}: must be a JSON object, got {type(record).__name__}.")
  return record


def read_lines(handle: BinaryIO, file: str) -> Iterator[bytes]:
  """Yields the lines of a plain, .gz or .zst file, without their ends.

  Raises:
    DataError: damaged or cut short.
  """
  parts: list[bytes] = []
  for chunk in _chunks(handle, file):
    first, *rest = chunk.split(b"\n")
    parts.append(first)
    for following in rest:
      yield b"".join(parts)
      parts = [following]
  if last := b"".join(parts):
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
  """Yields all frames; the library's own stream reader stops in silence after the
  first one, and at the end of a file that was cut short.
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
