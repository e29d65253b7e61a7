"""A prepared folder: documents tokenized by `launch.prepare`, read by training runs.

  manifest.json   written last: a folder without it is not finished
  settings.json   settings of the first run; a later run must have the same
  tokenizer.json
  index.npy       one entry per document, in the order of the shards (`INDEX_DTYPE`)
  shard-00000.array_record, ...   tokens as int32 bytes, [bos, tokens..., eos]
  shard-00000.npy, ...            index of the shard; written when it is finished

The documents of the index are the parts of documents where there are too few documents
to be split whole (`sources.must_cut`); manifest.json then has the split of each.

A document of more than `RECORD_TOKENS` tokens takes several consecutive records, so
that reading one row of a very long document stays cheap. Legend: N documents.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_data_source

from mtp_jax.data import sources
from mtp_jax.data import tokenizers as tokenizers_lib

FORMAT = 1
RECORD_TOKENS = 1 << 14
INDEX_DTYPE = np.dtype(
  [("hash", "u1", (32,)), ("num_tokens", "<i8"), ("num_bytes", "<i8")]
)
MANIFEST, SETTINGS = "manifest.json", "settings.json"
INDEX, TOKENIZER = "index.npy", "tokenizer.json"


class ArrayRecordStore:
  """`packing.TokenStore` over the shards of a prepared folder."""

  def __init__(
    self,
    shards: Sequence[str],
    index_N: np.ndarray,
    identity: dict[str, str | int | float],
    has_unscored: bool = False,
  ):
    """Raises DataError if the number of records differs from the index."""
    self.identity, self.has_unscored = identity, has_unscored
    self.lengths_N = np.ascontiguousarray(index_N["num_tokens"])
    self.hashes_NX = np.ascontiguousarray(index_N["hash"])
    num_records_N = num_records(self.lengths_N)
    self._first_record_N = np.cumsum(num_records_N) - num_records_N
    self._records = array_record_data_source.ArrayRecordDataSource(list(shards))
    if len(self._records) != num_records_N.sum():
      raise sources.DataError(
        f"{os.path.dirname(shards[0])}: the shards must hold {num_records_N.sum()} "
        f"records as in {INDEX}, they hold {len(self._records)}."
      )

  def read(self, document: int, begin: int, end: int) -> np.ndarray:
    """Returns tokens [end - begin] int32 of a document."""
    if begin == end:
      return np.zeros(0, np.int32)
    base = int(self._first_record_N[document])
    parts = []
    for i in range(begin // RECORD_TOKENS, -(-end // RECORD_TOKENS)):
      record, skipped = self._records[base + i], i * RECORD_TOKENS
      tokens = np.frombuffer(record, "<i4")
      parts.append(tokens[max(0, begin - skipped) : end - skipped])
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class PreparedFolder:
  """An opened folder.

  path:      the folder.
  settings:  dotted config keys, and their values when the folder was prepared.
  source:    the fields of `sources.SourceStats`.
  tokenizer: the tokenizer of the tokens.
  index_N:   [N] of `INDEX_DTYPE`.
  split_N:   [N] split of each part of a document; None for whole documents.
  shards:    the files of tokens, in the order of the index.
  """

  path: Path
  settings: dict[str, Any]
  source: dict[str, Any]
  tokenizer: tokenizers_lib.Tokenizer
  index_N: np.ndarray
  split_N: np.ndarray | None
  shards: tuple[str, ...]


def open_folder(path: str | os.PathLike) -> PreparedFolder:
  """Opens a finished folder.

  Raises:
    DataError: no such folder, an unfinished one, another format, or a file that is
      missing, damaged or not of the recorded size.
  """
  folder = Path(os.path.expanduser(path))
  if not (folder / MANIFEST).is_file():
    raise sources.DataError(
      "data.path must be a folder written by `python -m launch.prepare`; "
      f"{str(folder)!r} {_why_not(folder)}."
    )
  try:
    manifest = json.loads((folder / MANIFEST).read_text())
    found = manifest["format"]
    if found == FORMAT:
      index_N = np.load(folder / INDEX, mmap_mode="r")
      sizes = {shard["name"]: shard["size"] for shard in manifest["shards"]}
      settings, source = manifest["settings"], manifest["source"]
      splits = manifest.get("splits")
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise sources.DataError(
      f"{folder} is damaged ({type(error).__name__}: {error}); prepare it again."
    ) from error
  if found != FORMAT:
    raise sources.DataError(
      f"{folder / MANIFEST}: format must be {FORMAT}, got {found!r}."
    )
  # Sizes tell a truncated copy from a whole one without reading the shards.
  for name, expected in sizes.items():
    file = folder / name
    size = file.stat().st_size if file.is_file() else None
    if size != expected:
      raise sources.DataError(
        f"{file}: must have {expected} bytes as in {MANIFEST}, it "
        f"{'is missing' if size is None else f'has {size}'}."
      )
  tokenizer = tokenizers_lib.load_tokenizer(folder / TOKENIZER)
  shards = tuple(str(folder / name) for name in sizes)
  split_N = None if splits is None else np.array(splits)
  return PreparedFolder(folder, settings, source, tokenizer, index_N, split_N, shards)


def num_records(lengths_N: np.ndarray) -> np.ndarray:
  """Returns the number of records of each document, given its tokens."""
  return -(-lengths_N // RECORD_TOKENS)


def _why_not(folder: Path) -> str:
  if not folder.is_dir():
    return "is not a folder" if folder.exists() else "does not exist"
  if (folder / SETTINGS).is_file():
    return "is not finished: run the same launch.prepare again to continue it"
  return f"has no {MANIFEST}"
