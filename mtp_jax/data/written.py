"""Texts that a model wrote, to train on (`data.train_on`): the lines of one file.

  {"text": "...", "bos": true, "eos": false, ...}

`bos` says that the text begins a document, `eos` that it goes on to its end; both are
true where a line does not say. Nothing is left out: a text that was sampled twice is
there twice. Other keys are for people.
"""

import hashlib
import os
from typing import Any

import numpy as np

from mtp_jax.data import sources


def check_file(path: str) -> str:
  """Returns the path of an existing file, `~` expanded; raises DataError."""
  file = os.path.expanduser(path)
  if not os.path.isfile(file):
    raise sources.DataError(
      f"data.train_on must be a JSONL file, got {path!r}, which "
      f"{'is none' if os.path.exists(file) else 'is not there'}."
    )
  return file


def load(path: str) -> sources.Documents:
  """Reads a plain, .gz or .zst file into memory.

  Raises:
    DataError: no such file, no line in it, or a line that is damaged or has no text.
  """
  file = check_file(path)
  texts, edges = [], []
  try:
    with open(file, "rb") as handle:
      for number, line in enumerate(sources.read_lines(handle, file), start=1):
        text, *ends = _parse(line, f"{file}:{number}")
        texts.append(text)
        edges.append(ends)
  except OSError as error:
    raise sources.DataError(
      f"{file}: cannot be read ({error.strerror or error})."
    ) from error
  if not texts:
    raise sources.DataError(
      f"data.train_on must have at least one text, got {path!r}, which is empty."
    )
  hashes = [_hash(text, *ends) for text, ends in zip(texts, edges, strict=True)]
  stats = sources.SourceStats(
    where=file,
    num_files=1,
    num_documents=len(texts),
    num_bytes=sum(len(text.encode()) for text in texts),
    num_empty=0,
    num_duplicates=0,
    encoding_errors=(),
    manifest=sources.manifest_of(hashes),
  )
  return sources.Documents(
    names=[f"{file}:{number}" for number in range(1, 1 + len(texts))],
    texts=texts,
    hashes_NX=sources.hash_array(hashes),
    stats=stats,
    edges_N2=np.array(edges, bool),
  )


def _parse(line: bytes, where: str) -> tuple[str, bool, bool]:
  """Returns the text of a line, and whether it begins and ends a document."""
  rule = f"{where}: every line of data.train_on must"
  try:
    record = sources.parse_line(line.decode(), where)
  except UnicodeDecodeError as error:
    raise sources.DataError(f"{rule} be UTF-8 ({error}).") from error
  if "text" not in record:
    raise sources.DataError(f"{rule} have a key 'text', its keys are {sorted(record)}.")
  text = record["text"]
  if not isinstance(text, str) or not text or not _is_encodable(text):
    raise sources.DataError(f"{rule} have a text in 'text', got {text!r:.80}.")
  return text, _flag(record, "bos", rule), _flag(record, "eos", rule)


def _flag(record: dict[str, Any], key: str, rule: str) -> bool:
  value = record.get(key, True)
  if not isinstance(value, bool):
    raise sources.DataError(f"{rule} have true or false in {key!r}, got {value!r}.")
  return value


def _is_encodable(text: str) -> bool:
  """Whether a text has a UTF-8 form: JSON can escape half of a surrogate pair."""
  return not any("\ud800" <= character <= "\udfff" for character in text)


def _hash(text: str, bos: bool, eos: bool) -> bytes:
  return hashlib.sha256(bytes([bos, eos]) + text.encode()).digest()
