"""The folder of tokenized documents that `launch.prepare` writes and a cluster reads.

  manifest.json   written last: without it the folder is not finished
  settings.json   what it was made from; a second run must agree to continue
  tokenizer.json
  index.npy       one entry a document, in the order of the shards (`INDEX_DTYPE`)
  shard-00000.array_record, ...   tokens as int32 bytes, [bos, tokens..., eos]
  shard-00000.npy, ...            the index of that shard; its presence = finished

A document of more than `RECORD_TOKENS` tokens takes several consecutive records, so
that reading one row out of a very long document stays cheap.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_data_source, array_record_module

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
  ):
    self.identity = identity
    self.lengths_N = np.ascontiguousarray(index_N["num_tokens"])
    self.hashes_NX = np.ascontiguousarray(index_N["hash"])
    num_records_N = _num_records(self.lengths_N)
    self._first_record_N = np.cumsum(num_records_N) - num_records_N
    self._records = array_record_data_source.ArrayRecordDataSource(list(shards))

  def read(self, document: int, begin: int, end: int) -> np.ndarray:
    if begin == end:
      return np.zeros(0, np.int32)
    base = int(self._first_record_N[document])
    first, last = begin // RECORD_TOKENS, (end - 1) // RECORD_TOKENS
    parts = [
      np.frombuffer(self._records[base + i], "<i4") for i in range(first, last + 1)
    ]
    skipped = first * RECORD_TOKENS
    return np.concatenate(parts)[begin - skipped : end - skipped]


@dataclasses.dataclass(frozen=True)
class PreparedFolder:
  """An opened folder: its manifest, tokenizer, index [N] and shard files."""

  path: Path
  manifest: dict[str, Any]
  tokenizer: tokenizers_lib.Tokenizer
  index_N: np.ndarray
  shards: tuple[str, ...]


def open_folder(path: str | os.PathLike) -> PreparedFolder:
  """Opens a finished folder.

  Raises:
    DataError: no such folder, not finished, another format, or a shard that is missing
      or not of the recorded size.
  """
  folder = Path(os.path.expanduser(path))
  if not (folder / MANIFEST).is_file():
    reason = "has no such folder"
    if folder.is_dir():
      reason = f"has no {MANIFEST}"
    if (folder / SETTINGS).is_file():
      reason = "is not finished: run the same launch.prepare again to continue it"
    raise sources.DataError(
      "data.path must be a folder written by `python -m launch.prepare`; "
      f"{str(folder)!r} {reason}."
    )
  manifest = json.loads((folder / MANIFEST).read_text())
  if manifest["format"] != FORMAT:
    raise sources.DataError(
      f"{folder / MANIFEST}: format must be {FORMAT}, got {manifest['format']}."
    )
  shards = []
  for shard in manifest["shards"]:
    file = folder / shard["name"]
    size = file.stat().st_size if file.is_file() else None
    if size != shard["size"]:
      raise sources.DataError(
        f"{file}: must have {shard['size']} bytes as in {MANIFEST}, it "
        f"{'is missing' if size is None else f'has {size}'}."
      )
    shards.append(str(file))
  index_N = np.load(folder / INDEX, mmap_mode="r")
  tokenizer = tokenizers_lib.load_tokenizer(folder / TOKENIZER)
  return PreparedFolder(folder, manifest, tokenizer, index_N, tuple(shards))


def write_shard(
  folder: Path,
  number: int,
  documents: Sequence[sources.Document],
  tokenizer: tokenizers_lib.Tokenizer,
) -> np.ndarray:
  """Tokenizes and writes one shard and returns its index.

  The shard is written beside its name, closed, reopened and counted, and only then
  renamed; its index follows in the same way. A kill or a full disk at any point leaves
  no shard that looks finished.

  Raises:
    OSError: the shard could not be written in full.
  """
  index_N = np.zeros(len(documents), INDEX_DTYPE)
  name = shard_name(number)
  temporary = folder / f"{name}.tmp-{os.getpid()}"
  try:
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    texts = [document.text for document in documents]
    encoded = tokenizer.encode_batch(texts)
    for entry, document, ids in zip(index_N, documents, encoded, strict=True):
      tokens = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]])
      tokens = tokens.astype("<i4")
      for begin in range(0, len(tokens), RECORD_TOKENS):
        writer.write(tokens[begin : begin + RECORD_TOKENS].tobytes())
      entry["hash"] = np.frombuffer(document.content_hash, np.uint8)
      entry["num_tokens"] = len(tokens)
      entry["num_bytes"] = len(document.text.encode("utf-8"))
    writer.close()
    _check_records(temporary, int(_num_records(index_N["num_tokens"]).sum()))
    _commit(temporary, folder / name)
  except RuntimeError as error:  # What the ArrayRecord library raises for I/O errors.
    raise OSError(f"{folder / name} could not be written: {error}") from error
  finally:
    temporary.unlink(missing_ok=True)
  write_index(folder / f"{name.removesuffix('.array_record')}.npy", index_N)
  return index_N


def read_shard_index(folder: Path, number: int) -> np.ndarray | None:
  """Returns the index of a finished shard, or None if it is not finished."""
  file = folder / f"shard-{number:05d}.npy"
  if not file.is_file() or not (folder / shard_name(number)).is_file():
    return None
  return np.load(file)


def shard_name(number: int) -> str:
  """Returns the file name of a shard."""
  return f"shard-{number:05d}.array_record"


def write_index(file: Path, index_N: np.ndarray) -> None:
  """Writes an index; whole or not at all."""
  temporary = file.with_name(f"{file.name}.tmp-{os.getpid()}")
  try:
    with open(temporary, "wb") as handle:
      np.save(handle, index_N)
    _commit(temporary, file)
  finally:
    temporary.unlink(missing_ok=True)


def write_json(file: Path, values: dict[str, Any]) -> None:
  """Writes a JSON file; whole or not at all."""
  temporary = file.with_name(f"{file.name}.tmp-{os.getpid()}")
  try:
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    _commit(temporary, file)
  finally:
    temporary.unlink(missing_ok=True)


def _commit(temporary: Path, file: Path) -> None:
  """Renames after the bytes are on the disk: a rename must not overtake them."""
  descriptor = os.open(temporary, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
  os.replace(temporary, file)


def _check_records(file: Path, expected: int) -> None:
  # The library's writer can lose records on a full disk without raising.
  reader = array_record_module.ArrayRecordReader(str(file))
  found = reader.num_records()
  reader.close()
  if found != expected:
    raise OSError(
      f"{file} could not be written: it holds {found} of {expected} records."
    )


def _num_records(lengths_N: np.ndarray) -> np.ndarray:
  return -(-lengths_N // RECORD_TOKENS)
