"""Texts that a model wrote, to train on (`data.train_on`): the lines of one file.

  {"text": "...", "bos": true, "eos": false, ...}

`bos` says that the text begins a document, `eos` that it goes on to its end; both are
true where a line does not say. Blank lines are passed over. No text is left out: one
that was sampled twice is there twice. Other keys are for people.
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
  names, texts, edges = [], [], []
  try:
    with open(file, "rb") as handle:
      for number, line in enumerate(sources.read_lines(handle, file), start=1):
        if parsed := _parse(line, f"{file}:{number}"):
          names.append(f"{file}:{number}")
          texts.append(parsed[0])
          edges.append(parsed[1:])
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
    names=names,
    texts=texts,
    hashes_NX=sources.hash_array(hashes),
    stats=stats,
    edges_N2=np.array(edges, bool),
  )


def _parse(line: bytes, where: str) -> tuple[str, bool, bool] | None:
  """Returns the text of a line, and whether it begins and ends a document.

  None stands for a blank line.
  """
  rule = f"{where}: every line of data.train_on must"
  try:
    record = sources.parse_line(line, where)
  except UnicodeDecodeError as error:
    raise sources.DataError(f"{rule} be UTF-8 ({error}).") from error
  if record is None:
    return None
  if "text" not in record:
    raise sources.DataError(f"{rule} have a key 'text', its keys are {sorted(record)}.")
  text = record["text"]
  if isinstance(text, str):
    text = text.removeprefix(sources.BYTE_ORDER_MARK)
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
