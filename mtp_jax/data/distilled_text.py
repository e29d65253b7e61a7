"""Texts that a model wrote (`data.train_on`): reads a JSONL file of documents.

  {"text": "...", "bos": true, "eos": false, ...}

`bos`: the text begins a document. `eos`: the text ends a document. Both are true by
default. Other keys are not read. Blank lines are skipped. Duplicates are kept: a text
that was sampled twice counts twice.
"""

import hashlib
import os
from typing import Any

from mtp_jax.data import sources, text_files


def check_file(path: str) -> str:
  """Returns the path of a file with `~` expanded; DataError if there is none."""
  file = os.path.expanduser(path)
  if not os.path.isfile(file):
    raise sources.DataError(
      f"data.train_on must be a JSONL file, got {path!r}, which "
      f"{'is no file' if os.path.exists(file) else 'does not exist'}."
    )
  return file


def load(path: str) -> sources.Documents:
  """Reads a plain, .gz or .zst file into memory.

  Raises:
    DataError: no such file, an empty file, or a line that is damaged or has no text.
  """
  file = check_file(path)
  documents = []
  try:
    with open(file, "rb") as handle:
      for number, line in enumerate(text_files.read_lines(handle, file), start=1):
        if parsed := _parse(line, f"{file}:{number}"):
          documents.append(parsed)
  except OSError as error:
    raise sources.DataError(
      f"{file}: cannot be read ({error.strerror or error})."
    ) from error
  if not documents:
    raise sources.DataError(
      f"data.train_on must have at least one text, got {path!r}, which is empty."
    )
  # Duplicates have equal hashes: the order of such documents does not matter.
  stats = sources.SourceStats(
    where=file,
    num_files=1,
    num_documents=len(documents),
    num_bytes=sum(document.num_bytes for document in documents),
    num_empty=0,
    num_duplicates=0,
    encoding_errors=(),
    manifest=sources.manifest_of(document.content_hash for document in documents),
  )
  return sources.Documents(documents, stats)


def _parse(line: bytes, where: str) -> sources.Document | None:
  """Returns the text of a line; None for a blank line."""
  rule = f"{where}: every line of data.train_on must"
  try:
    record = text_files.parse_line(line, where)
  except UnicodeDecodeError as error:
    raise sources.DataError(f"{rule} be UTF-8 ({error}).") from error
  if record is None:
    return None
  if "text" not in record:
    raise sources.DataError(f"{rule} have a key 'text', its keys are {sorted(record)}.")
  text = record["text"]
  if isinstance(text, str):
    text = text.removeprefix(text_files.BYTE_ORDER_MARK)
  if not isinstance(text, str) or not text or not _is_encodable(text):
    raise sources.DataError(f"{rule} have a text in 'text', got {text!r:.80}.")
  edges, data = (_flag(record, "bos", rule), _flag(record, "eos", rule)), text.encode()
  content_hash = hashlib.sha256(bytes(edges) + data).digest()
  return sources.Document(where, text, len(data), content_hash, edges)


def _flag(record: dict[str, Any], key: str, rule: str) -> bool:
  value = record.get(key, True)
  if not isinstance(value, bool):
    raise sources.DataError(f"{rule} have true or false in {key!r}, got {value!r}.")
  return value


def _is_encodable(text: str) -> bool:
  """Returns whether UTF-8 can encode `text`: JSON can escape half a surrogate pair."""
  return not any("\ud800" <= character <= "\udfff" for character in text)
