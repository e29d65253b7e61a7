"""Documents of a source: read, deduplicated, split and ordered by content hash.

A document is one text file, line, row, or stretch of tokens (`formats`). The sha256 of
its UTF-8 bytes decides duplicates, split and order; names and order of files, and the
machine, do not matter.
Unusable texts (not UTF-8, white space only, exact duplicates) are skipped, counted and
reported.
"""

import codecs
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.data import formats
from mtp_jax.data.errors import DataError
from mtp_jax.data.formats import Piece
from mtp_jax.data.generated import GENERATED
from mtp_jax.data.text_files import BYTE_ORDER_MARK, find_files
from mtp_jax.data.tokenizers import Tokenizer

SPLITS = ("train", "validation", "test")
# With fewer documents a split may be empty by chance; then documents are cut.
FEW = 100


@dataclasses.dataclass(frozen=True)
class Document:
  """One text, or a part of one (`cut_document`).

  name:         relative path, or `file:line`.
  text:         the text, or its tokens [n] int32 where the source has tokens or chats.
  num_bytes:    UTF-8 bytes of the text.
  content_hash: 32 bytes.
  edges:        whether the text begins a document (gets bos), and whether it ends one
                (gets eos).
  """

  name: str
  text: str | np.ndarray
  num_bytes: int
  content_hash: bytes
  edges: tuple[bool, bool] = (True, True)


@dataclasses.dataclass(frozen=True)
class SourceStats:
  """Counts of one pass over a source.

  where:           the folders or files that were read.
  num_files:       files opened; 0 where the texts are generated.
  num_documents:   distinct documents kept.
  num_bytes:       UTF-8 bytes of the documents kept.
  num_empty:       texts skipped because they are white space only.
  num_duplicates:  texts skipped because a kept document has the same bytes.
  encoding_errors: names of texts skipped because they have no UTF-8 form.
  manifest:        sha256 over the sorted content hashes; equal for equal corpora.
  num_chats:       documents kept with tokens that are no targets.
  """

  where: str
  num_files: int
  num_documents: int
  num_bytes: int
  num_empty: int
  num_duplicates: int
  encoding_errors: tuple[str, ...]
  manifest: str
  num_chats: int = 0


@dataclasses.dataclass(frozen=True)
class Documents:
  """All documents of a source in the order of their content hashes.

  stats: counts of the pass.
  """

  documents: list[Document]
  stats: SourceStats

  @property
  def texts(self) -> list[str | np.ndarray]:
    return [document.text for document in self.documents]

  @property
  def hashes_NX(self) -> np.ndarray:
    return hash_array(document.content_hash for document in self.documents)


class _Input(NamedTuple):
  """A file, generated text or dataset; size in bytes, 0 where it is not known."""

  name: str
  size: int
  read: Callable[[], Iterable[Piece]]


class DocumentReader:
  """Iterates over the distinct documents of a source, one in memory at a time.

  `source`, `path` and `text_field` are keys of `DataConfig`. (`array_record` has a
  store instead: see `prepared.py`.) `tokenizer` is the tokens' tokenizer in a source of
  tokens, and renders chats. Every iteration starts anew; `stats()` describes the last
  complete one. The current iteration has read `done_bytes` of `total_bytes` of the
  input, which are 0 for a dataset of `hf`.

  Raises:
    DataError: at construction if there is no input file; during iteration for a damaged
      or unreadable file, or a record without text in the text field; at the end if
      there was no document.
  """

  def __init__(
    self, source: str, path: str, text_field: str, tokenizer: Tokenizer | None = None
  ):
    self._num_files, self._key = 0, "data.path" if path else "data.source"
    readers = {
      "stdlib": (formats.read_text, ()),
      "site_packages": (formats.read_text, ()),
      "files": (formats.read_text, ()),
      "jsonl": (formats.read_jsonl, (text_field, tokenizer)),
      "parquet": (formats.read_parquet, (text_field, tokenizer)),
      "token_bin": (formats.read_tokens, (tokenizer,)),
    }
    if source in GENERATED:
      self._where = source
      self._inputs = [
        _Input(name, len(data), functools.partial(iter, [Piece("", data, len(data))]))
        for name, data in ((name, text.encode()) for name, text in GENERATED[source]())
      ]
    elif source == "hf":
      self._where, dataset = path, formats.open_dataset(path)
      read = functools.partial(
        formats.read_dataset, dataset, path, text_field, tokenizer
      )
      self._inputs = [_Input(path, 0, read)]
    elif source in readers:
      read, arguments = readers[source]
      self._where, files = find_files(source, path)
      self._inputs = [
        _Input(name, os.path.getsize(file), functools.partial(read, file, *arguments))
        for name, file in files
      ]
      self._num_files = len(files)
    else:
      raise DataError(
        f"data.source must be one of {', '.join([*GENERATED, 'hf', *readers])} to read "
        f"texts from, got {source!r}."
      )
    if source == "parquet":  # Refuses now, not when the reading starts.
      formats.require_parquet()
    self.total_bytes = sum(x.size for x in self._inputs)
    self._reset()

  def _reset(self) -> None:
    self.done_bytes = 0
    self._num_empty = 0
    self._num_duplicates = 0
    self._num_bytes = 0
    self._num_chats = 0
    self._encoding_errors: list[str] = []
    self._seen: set[bytes] = set()

  def __iter__(self) -> Iterator[Document]:
    self._reset()
    for name, piece in self._pieces():
      document = self._accept(name, piece)
      if document is not None:
        yield document
    if not self._seen:
      raise DataError(
        f"{self._key} must lead to documents, found none in {self._where}: "
        f"{self._num_files} file(s), {self._num_empty} empty text(s), "
        f"{len(self._encoding_errors)} not UTF-8."
      )

  def stats(self) -> SourceStats:
    """Returns the counts of the last iteration; complete if it ran to its end."""
    return SourceStats(
      where=self._where,
      num_files=self._num_files,
      num_documents=len(self._seen),
      num_bytes=self._num_bytes,
      num_empty=self._num_empty,
      num_duplicates=self._num_duplicates,
      encoding_errors=tuple(self._encoding_errors),
      manifest=manifest_of(self._seen),
      num_chats=self._num_chats,
    )

  def _pieces(self) -> Iterator[tuple[str, Piece]]:
    """Yields (name, piece), and updates `done_bytes`."""
    for x in self._inputs:
      base = self.done_bytes
      try:
        for piece in x.read():
          self.done_bytes = base + piece.done
          yield x.name + piece.place, piece
      except OSError as error:
        reason = error.strerror or error
        raise DataError(
          f"{error.filename or x.name}: cannot be read ({reason})."
        ) from error
      self.done_bytes = max(self.done_bytes, base + x.size)

  def _accept(self, name: str, piece: Piece) -> Document | None:
    data, text = piece.data, piece.ids
    try:
      # Tokens are kept as they are: a shard may cut a character.
      errors = "strict" if text is None else "replace"
      decoded = None if data is None else data.decode("utf-8", errors)
    except UnicodeDecodeError:
      decoded = None
    if decoded is None:
      self._encoding_errors.append(name)
      return None
    decoded = decoded.removeprefix(BYTE_ORDER_MARK)
    data = data.removeprefix(codecs.BOM_UTF8)
    if not decoded.strip():
      self._num_empty += 1
      return None
    content_hash = hashlib.sha256(data).digest()
    if content_hash in self._seen:
      self._num_duplicates += 1
      return None
    self._seen.add(content_hash)
    self._num_bytes += len(data)
    self._num_chats += bool(np.any(piece.ids < 0)) if piece.ids is not None else 0
    text = decoded if text is None else text
    return Document(name, text, len(data), content_hash, piece.edges)


def describe(stats: Mapping[str, Any]) -> str:
  """Returns one line about the fields of a `SourceStats`: texts read and skipped."""
  left_out = (
    f"{stats['num_duplicates']:,} duplicate, {stats['num_empty']:,} empty, "
    f"{len(stats['encoding_errors']):,} not UTF-8"
  )
  if stats["encoding_errors"]:
    left_out += f" ({stats['encoding_errors'][0]}, ...)"
  # Older prepared folders have no count of chats.
  chats = f", {n:,} of them chats" if (n := stats.get("num_chats")) else ""
  return (
    f"{stats['num_documents']:,} documents ({stats['num_bytes'] / 1e6:,.1f} MB){chats} "
    f"from {stats['num_files']:,} file(s) in {stats['where']}; left out: {left_out}"
  )


def load_documents(
  source: str, path: str, text_field: str, tokenizer: Tokenizer | None = None
) -> Documents:
  """Reads a whole source into memory; see `DocumentReader` for what it raises."""
  reader = DocumentReader(source, path, text_field, tokenizer)
  documents = sorted(reader, key=lambda document: document.content_hash)
  return Documents(documents, reader.stats())


def split_of(
  hashes_NX: np.ndarray, validation_fraction: float, test_fraction: float
) -> np.ndarray:
  """Returns `split_N`: for each document 0 train, 1 validation, 2 test (`SPLITS`).

  The first 8 bytes of the content hash [N, 32] uint8 are a uniform number in [0, 1):
  numbers below `validation_fraction` are validation, the next `test_fraction` are test.
  A document's split therefore does not depend on the other documents.
  """
  uniform_N = _word(hashes_NX, 0) / 2.0**64
  held_out = validation_fraction + test_fraction
  return np.where(
    uniform_N < validation_fraction, 1, np.where(uniform_N < held_out, 2, 0)
  )


def must_cut(
  hashes_NX: np.ndarray, validation_fraction: float, test_fraction: float
) -> bool:
  """Returns whether few documents, split whole, would leave a split empty.

  Splits by hash are kept if none is empty: they do not move when documents are added.
  """
  fractions = (
    1 - validation_fraction - test_fraction, validation_fraction, test_fraction
  )
  split_N = split_of(hashes_NX, validation_fraction, test_fraction)
  return len(split_N) < FEW and fractions[0] > 0 and any(
    fraction > 0 and i not in split_N for i, fraction in enumerate(fractions)
  )


def cut_document(
  document: Document, validation_fraction: float, test_fraction: float
) -> Iterator[tuple[int, Document]]:
  """Yields `(split, part)`: the document cut into train, validation and test.

  For sources with too few documents to be split by whole documents. The first part of
  the text is for training, the next for validation, the last for test; parts of white
  space only are skipped.
  """
  text = document.text
  first = round((1 - validation_fraction - test_fraction) * len(text))
  second = round((1 - test_fraction) * len(text))
  bounds = itertools.pairwise((0, first, second, len(text)))
  for split, (begin, end) in enumerate(bounds):
    part = text[begin:end]
    if isinstance(part, str):
      data, is_used = part.encode(), bool(part.strip())
    else:
      data, is_used = part.tobytes(), len(part) > 0
    if is_used:
      yield split, Document(
        f"{document.name}[{begin}:{end}]", part, len(data),
        hashlib.sha256(data).digest(),
        (begin == 0 and document.edges[0], end == len(text) and document.edges[1]),
      )


def cut(
  documents: Documents, validation_fraction: float, test_fraction: float
) -> tuple[Documents, np.ndarray]:
  """Returns `(parts, split_N)` of all documents; see `cut_document`."""
  splits, parts = zip(
    *(
      part
      for whole in documents.documents
      for part in cut_document(whole, validation_fraction, test_fraction)
    ),
    strict=True,
  )
  return Documents(list(parts), documents.stats), np.array(splits)


def document_order(hashes_NX: np.ndarray, seed: int | None) -> np.ndarray:
  """Returns the permutation `order_N` that puts documents into a canonical order.

  Without a seed documents are sorted by content hash [N, 32] uint8; with a seed they
  are shuffled. The shuffle sorts by a 64-bit mix (SplitMix64's finaliser) of seed and
  hash instead of using a random generator, so that it is the same for every version of
  NumPy and every order of the input.
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
