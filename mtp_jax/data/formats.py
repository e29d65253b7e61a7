"""Readers of input files, one per `data.source`: yield the texts of a file.

Every reader yields `Piece`s. Packages that only one source needs are imported by its
reader.
"""

import itertools
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.data import chat
from mtp_jax.data.errors import DataError, require
from mtp_jax.data.text_files import parse_line, read_lines
from mtp_jax.data.tokenizers import Tokenizer

# llm.c begins a shard with 256 int32: this number, its version, the number of tokens.
_HEADER_INTS = 256
_TOKEN_TYPES = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
_VERSIONS = {20240520: 1, 20240801: 7}


class Piece(NamedTuple):
  """One text of a file.

  place:   where in the file, ":3" for the third line; "" for the whole file.
  data:    UTF-8 bytes; None for a text that has no UTF-8 form.
  done:    bytes of the file that are read.
  ids:     the tokens of the text, [n] int32, where the file holds tokens or chats; ~id
           where a token is no target.
  edges:   see `sources.Document`.
  """

  place: str
  data: bytes | None
  done: int
  ids: np.ndarray | None = None
  edges: tuple[bool, bool] = (True, True)


def read_text(file: str) -> Iterator[Piece]:
  """Yields the whole file."""
  with open(file, "rb") as handle:
    data = handle.read()
  yield Piece("", data, len(data))


def read_jsonl(file: str, field: str, tokenizer: Tokenizer | None) -> Iterator[Piece]:
  """Yields the text of every line; the file may be .gz or .zst."""
  with open(file, "rb") as handle:
    for number, line in enumerate(read_lines(handle, file), start=1):
      where = f"{file}:{number}"
      content = (b"",)
      try:
        if (record := parse_line(line, where)) is not None:
          content = _content(record, where, field, tokenizer)
      except UnicodeDecodeError:
        content = (None,)
      yield _piece(number, handle.tell(), *content)


def require_parquet() -> ModuleType:
  require("pyarrow.parquet", "data.source 'parquet'")
  return require("pyarrow", "data.source 'parquet'")


def read_parquet(file: str, field: str, tokenizer: Tokenizer | None) -> Iterator[Piece]:
  """Yields the text of every row; reads the one column."""
  pyarrow, size = require_parquet(), os.path.getsize(file)
  try:
    with pyarrow.parquet.ParquetFile(file) as table:
      if field not in table.schema_arrow.names:
        raise DataError(
          f"{file}: data.text_field {field!r} is not a column of this file; its "
          f"columns are {sorted(table.schema_arrow.names)}."
        )
      batches = table.iter_batches(columns=[field])
      records = itertools.chain.from_iterable(rows.to_pylist() for rows in batches)
      for number, record in enumerate(records, start=1):
        done = size * number // table.metadata.num_rows
        yield _piece(
          number, done, *_content(record, f"{file}:{number}", field, tokenizer)
        )
  except pyarrow.ArrowException as error:
    raise DataError(f"{file}: not a whole parquet file ({error}).") from error


def open_dataset(path: str) -> Any:
  """Returns the streamed dataset of `data.path`, NAME[:CONFIGURATION[:SPLIT]].

  NAME is a dataset of the Hugging Face Hub or a local folder; SPLIT is train by
  default.

  Raises:
    DataError: no such dataset, configuration or split, or no connection.
  """
  name, configuration, split = (*path.split(":"), "", "")[:3]
  datasets = require("datasets", "data.source 'hf'")
  try:
    return datasets.load_dataset(
      os.path.expanduser(name), configuration or None, split=split or "train",
      streaming=True,
    )
  except _dataset_errors() as error:
    raise _unreadable(path, error) from error


def read_dataset(
  dataset: Any, path: str, field: str, tokenizer: Tokenizer | None
) -> Iterator[Piece]:
  """Yields the text of every row of a dataset from `open_dataset`."""
  done, rows = 0, iter(dataset)
  for number in itertools.count(1):
    try:
      record = next(rows, None)
    except _dataset_errors() as error:  # Files and network are read here too.
      raise _unreadable(path, error) from error
    if record is None:
      return
    content = _content(record, f"{path}:{number}", field, tokenizer)
    done += len(content[0] or b"")
    yield _piece(number, done, *content)


def read_tokens(file: str, tokenizer: Tokenizer) -> Iterator[Piece]:
  """Yields the documents of a shard of tokens: what stands between special tokens.

  Shards begin with llm.c's header, or have none, as nanoGPT's. Tokens that begin or end
  a document (of the tokenizer) separate documents and belong to none; a document that a
  shard cuts is two.
  """
  tokens, start = _tokens(file, tokenizer.vocab_size)
  marks = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.end_ids} - {None}
  at = np.flatnonzero(np.isin(tokens, list(marks))).tolist()
  for before, end in itertools.pairwise([-1, *at, len(tokens)]):
    ids = tokens[before + 1 : end].astype(np.int32)
    if len(ids):
      data = b"".join(map(tokenizer.token_texts.__getitem__, ids.tolist()))
      yield Piece(f":{before + 1}", data, start + end * tokens.itemsize, ids)


def _tokens(file: str, vocab_size: int) -> tuple[np.ndarray, int]:
  """Returns the tokens of a shard, mapped into memory, and where they start, in bytes.

  Raises:
    DataError: a file that is cut short, a header of another version, or a token that
      the tokenizer lacks.
  """
  size = os.path.getsize(file)
  header = np.fromfile(file, "<i4", _HEADER_INTS)
  if len(header) == _HEADER_INTS and int(header[0]) in _TOKEN_TYPES:
    number, version = int(header[0]), int(header[1])
    if version != _VERSIONS[number]:
      raise DataError(
        f"{file}: must have version {_VERSIONS[number]} in its header, which begins "
        f"with {number}, it has {version}."
      )
    dtype, start = _TOKEN_TYPES[number], header.nbytes
    if (size - start) != int(header[2]) * dtype.itemsize:
      raise DataError(
        f"{file}: must hold {header[2]} tokens of {dtype.itemsize} bytes as in its "
        f"header, it has {size - start} bytes after the header."
      )
  else:
    # Numbers of 4 bytes show in their upper halves, which are small for every token.
    halves, start = np.fromfile(file, "<u2", 1 << 16), 0
    is_wide = np.all(halves[1::2] <= (vocab_size - 1) >> 16) and size % 4 == 0
    dtype = np.dtype("<u4" if is_wide else "<u2")
    if size % dtype.itemsize:
      raise DataError(
        f"{file}: must hold whole tokens of {dtype.itemsize} bytes, it has {size} "
        "bytes."
      )
  if size == start:
    return np.zeros(0, dtype), start
  tokens = np.memmap(file, dtype, "r", start)
  if (largest := int(tokens.max())) >= vocab_size:
    raise DataError(
      f"{file}: must hold tokens below {vocab_size}, the size of the tokenizer "
      f"(tokenizer.kind and tokenizer.path), it holds {largest}."
    )
  return tokens, start


def _piece(
  number: int, done: int, data: bytes | None, ids: np.ndarray | None = None
) -> Piece:
  # The template of a chat puts what begins and ends a document where it wants it.
  return Piece(f":{number}", data, done, ids, (ids is None, ids is None))


def _content(
  record: dict[str, Any], where: str, field: str, tokenizer: Tokenizer | None
) -> tuple[bytes | None] | tuple[bytes, np.ndarray]:
  """Returns the text of one record as UTF-8, and the tokens of a chat.

  The text is None if it has no UTF-8 form.
  """
  if field not in record:
    raise DataError(
      f"{where}: data.text_field {field!r} is not a key of this line; "
      f"its keys are {sorted(record)}."
    )
  value = record[field]
  if isinstance(value, list):
    text, ids = chat.encode(tokenizer, value, f"{where}: data.text_field {field!r}")
    return text.encode(), ids
  if not isinstance(value, str):
    raise DataError(
      f"{where}: data.text_field {field!r} must hold a string or a list of messages, "
      f"got {type(value).__name__}."
    )
  try:
    return (value.encode("utf-8"),)
  except UnicodeEncodeError:  # JSON can escape half of a surrogate pair.
    return (None,)


def _dataset_errors() -> tuple[type[Exception], ...]:
  """Returns what the package datasets raises: its own, of files, of the network."""
  names = "datasets.exceptions", "pyarrow", "huggingface_hub.errors"
  datasets, pyarrow, hub = (require(name, "data.source 'hf'") for name in names)
  known = datasets.DatasetsError, pyarrow.ArrowException, hub.HTTPError
  return *known, OSError, ValueError, RuntimeError


def _unreadable(path: str, error: Exception) -> DataError:
  return DataError(
    "data.path must name a dataset that the package datasets can read, as "
    f"NAME[:CONFIGURATION[:SPLIT]], got {path!r} ({type(error).__name__}: {error})."
  )
