"""Preparation of text as a folder (`prepared.py`): parallel, resumable after a kill.

One process reads the source, drops duplicates and cuts the stream of documents into
shards; worker processes tokenize and write them. The content of a shard depends on the
source and the settings alone. Finished shards of an earlier run are therefore checked
against the documents and kept; interruptions and the number of workers do not change
the result.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import io
import itertools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from mtp_jax import config as config_lib
from mtp_jax import files
from mtp_jax.config import Config, ConfigError
from mtp_jax.data import prepared, sources, workers
from mtp_jax.data import tokenizers as tokenizers_lib

# Called with the phase, the bytes of input done, and the bytes of input in all.
OnProgress = Callable[[str, int, int], None]
# Of the settings: the folder holds parts of documents, see `sources.must_cut`.
_CUT = "cut"


def prepare_folder(
  config: Config,
  output: str | os.PathLike,
  *,
  num_workers: int,
  shard_size: int,
  progress: OnProgress = lambda phase, done, total: None,
) -> prepared.PreparedFolder:
  """Tokenizes the source of a config into a folder, or finishes an earlier call.

  Args:
    config: `data` and `tokenizer` define the texts and their tokens.
    output: the folder; new, empty, or left by an earlier call.
    num_workers: processes that tokenize and write.
    shard_size: bytes of text after which a shard ends, at the end of a document.
    progress: called often, with bytes of the (compressed) input files.

  Raises:
    ConfigError: the folder was begun with other settings, or the source or tokenizer
      cannot be used.
    DataError: the source cannot be read, or is not what finished shards came from.
    OSError: the folder cannot be written, on a full disk for instance.
  """
  for name, value in (("num_workers", num_workers), ("shard_size", shard_size)):
    if value < 1:
      raise ConfigError(f"{name} must be at least 1, got {value}.")
  if config.data.source == "array_record":
    raise ConfigError("data.source must name texts to prepare, got 'array_record'.")
  data, kind = config.data, config.tokenizer.kind
  # A source of tokens is read with their tokenizer; BPE is learnt from what is read.
  given = tokenizers_lib.make_tokenizer(config.tokenizer, ()) if kind != "bpe" else None
  reader = sources.DocumentReader(data.source, data.path, data.text_field, given)
  folder = Path(os.path.expanduser(output))
  folder.mkdir(parents=True, exist_ok=True)
  # Settings are compared under the lock: two commands may start at the same time.
  with _locked(folder):
    settings = _claim(folder, config, shard_size, reader)
    held_out = config.data.validation_fraction, config.data.test_fraction
    texts = _Texts(reader, held_out, settings.get(_CUT, False))
    if not (folder / prepared.MANIFEST).is_file():
      for leftover in folder.glob("*.tmp-*"):
        leftover.unlink()
      tokenizer = _tokenizer(config, given, folder, texts, progress)
      num_shards = _write_shards(
        folder, texts, tokenizer, num_workers, shard_size, progress
      )
      _finish(folder, settings, texts, num_shards)
  return prepared.open_folder(folder)


class _Texts:
  """What a folder holds: the documents of a reader, or all parts of few documents.

  held_out: the fractions of the validation and the test split.
  splits: the split of each part of the last iteration; None for whole documents.
  """

  def __init__(
    self, reader: sources.DocumentReader, held_out: tuple[float, float], is_cut: bool
  ):
    self.reader, self._held_out = reader, held_out
    self.splits: list[int] | None = [] if is_cut else None

  def __iter__(self) -> Iterator[sources.Document]:
    if self.splits is None:
      yield from self.reader
      return
    self.splits.clear()
    for document in self.reader:
      for split, part in sources.cut_document(document, *self._held_out):
        self.splits.append(split)
        yield part

  def train(self) -> Iterator[str]:
    """Yields the texts of the train split."""
    for document in self:
      if self.splits is None:
        hashes_NX = sources.hash_array([document.content_hash])
        (split,) = sources.split_of(hashes_NX, *self._held_out)
      else:
        split = self.splits[-1]
      if split == 0:
        yield document.text


def write_shard(
  folder: Path,
  number: int,
  documents: Sequence[sources.Document],
  tokenizer: tokenizers_lib.Tokenizer,
) -> None:
  """Tokenizes and writes one shard, then its index.

  The shard is written under a temporary name, closed, reopened and counted, and only
  then renamed; its index follows in the same way. A kill or a full disk at any point
  leaves no shard that looks finished.

  Raises:
    OSError: the shard could not be written in full.
  """
  index_N = np.zeros(len(documents), prepared.INDEX_DTYPE)
  file = _shard_file(folder, number)
  temporary = Path(files.temporary_name(file))
  try:
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
    for entry, document in zip(index_N, documents, strict=True):
      (ids,) = tokenizers_lib.encode_batch(tokenizer, [document.text])
      tokens = tokenizers_lib.document(tokenizer, ids, *document.edges).astype("<i4")
      for begin in range(0, len(tokens), prepared.RECORD_TOKENS):
        writer.write(tokens[begin : begin + prepared.RECORD_TOKENS].tobytes())
      entry["hash"] = np.frombuffer(document.content_hash, np.uint8)
      entry["num_tokens"] = len(tokens)
      entry["num_bytes"] = document.num_bytes
    writer.close()
    # The library's writer can lose records on a full disk without raising.
    found, expected = _count_records(temporary), _expected_records(index_N)
    if found != expected:
      raise OSError(f"{file} holds {found} of {expected} records: is the disk full?")
    files.commit(temporary, file)
  except RuntimeError as error:  # The ArrayRecord library raises this for I/O errors.
    raise OSError(f"{file} could not be written ({error}).") from error
  finally:
    temporary.unlink(missing_ok=True)
  _write_index(file.with_suffix(".npy"), index_N)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  """Locks the folder against other processes; the lock ends with this process."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    _lock(descriptor, folder)
    yield
  finally:
    os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise ConfigError(
      f"output {str(folder)!r} is being written by another process."
    ) from error
  except OSError:  # Some network file systems have no locks.
    pass


def _settings(config: Config, shard_size: int, is_cut: bool) -> dict[str, Any]:
  """Returns all settings that the content of the folder depends on."""
  data, tokenizer = config.data, config.tokenizer
  settings = {"format": prepared.FORMAT, "data.source": data.source}
  for key in ("path", "text_field"):
    if data.source in config_lib.keys()[f"data.{key}"].when["data.source"]:
      settings[f"data.{key}"] = getattr(data, key)
  settings["tokenizer.kind"] = tokenizer.kind
  if tokenizer.kind == "bpe":
    settings["tokenizer.vocab_size"] = tokenizer.vocab_size
  if tokenizer.kind == "bpe" or is_cut:  # BPE is trained on the train split alone.
    settings["data.validation_fraction"] = data.validation_fraction
    settings["data.test_fraction"] = data.test_fraction
  return settings | ({_CUT: True} if is_cut else {}) | {"shard_size": shard_size}


def _must_cut(config: Config, reader: sources.DocumentReader) -> bool:
  """Returns whether the documents are too few; reads no more than are enough."""
  hashes = [x.content_hash for x in itertools.islice(reader, sources.FEW)]
  data = config.data
  return sources.must_cut(
    sources.hash_array(hashes), data.validation_fraction, data.test_fraction
  )


def _claim(
  folder: Path, config: Config, shard_size: int, reader: sources.DocumentReader
) -> dict[str, Any]:
  """Writes the settings, or checks that the folder has the same."""
  file = folder / prepared.SETTINGS
  if not file.is_file():
    others = [x.name for x in sorted(folder.iterdir()) if ".tmp-" not in x.name]
    if others:
      raise ConfigError(
        f"output must be a new or empty folder or one begun by launch.prepare, "
        f"{str(folder)!r} holds {others[0]!r}."
      )
    settings = _settings(config, shard_size, _must_cut(config, reader))
    files.write_whole(file, _json(settings))
    return settings
  try:
    begun = json.loads(file.read_text())
  except ValueError as error:
    raise ConfigError(f"output {str(folder)!r}: {file.name} is damaged.") from error
  settings = _settings(config, shard_size, begun.get(_CUT, False))
  if differing := files.changed_settings(begun, settings):
    raise ConfigError(
      f"output {str(folder)!r} was begun with other settings: {differing}. Use them, "
      "or another folder."
    )
  return begun


def _tokenizer(
  config: Config,
  given: tokenizers_lib.Tokenizer | None,
  folder: Path,
  texts: _Texts,
  progress: OnProgress,
) -> tokenizers_lib.Tokenizer:
  """Returns the folder's tokenizer; BPE is trained only if the folder has none yet."""
  file = folder / prepared.TOKENIZER
  if given is None and file.is_file():
    return tokenizers_lib.load_tokenizer(file)
  tokenizer = given or tokenizers_lib.make_tokenizer(
    config.tokenizer, _train_texts(texts, progress)
  )
  tokenizers_lib.check_vocab_size(tokenizer, config.tokenizer.vocab_size)
  if file.is_file() and tokenizers_lib.load_tokenizer(file).to_json() != (
    tokenizer.to_json()
  ):
    raise ConfigError(
      f"output {str(folder)!r} was begun with another tokenizer: the content of "
      f"tokenizer.path {config.tokenizer.path!r} has changed."
    )
  tokenizers_lib.save_tokenizer(tokenizer, file)
  return tokenizer


def _train_texts(texts: _Texts, progress: OnProgress) -> Iterator[str]:
  reader = texts.reader
  for text in texts.train():
    progress("training the tokenizer", reader.done_bytes, reader.total_bytes)
    yield text


def _write_shards(
  folder: Path,
  texts: _Texts,
  tokenizer: tokenizers_lib.Tokenizer,
  num_workers: int,
  shard_size: int,
  progress: OnProgress,
) -> int:
  """Writes the missing shards; returns the number of all shards."""
  reader = texts.reader
  pool = concurrent.futures.ProcessPoolExecutor(
    num_workers,
    # Forking a process with threads, as the tokenizer library has, can deadlock.
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_start_worker,
    initargs=(tokenizer.to_json(),),
  )
  # Waits in the order of submission, so that the progress reported never falls.
  pending = collections.deque()
  number = -1

  def wait_for_one() -> None:
    future, done = pending.popleft()
    future.result()
    progress("tokenizing", done, reader.total_bytes)

  try:
    for number, documents in enumerate(_shards(texts, shard_size)):
      if _is_finished(folder, number, documents):
        progress("checking finished shards", reader.done_bytes, reader.total_bytes)
        continue
      with workers.shielded_from_interrupts():  # The first one starts the processes.
        future = pool.submit(_work, folder, number, documents)
      pending.append((future, reader.done_bytes))
      if len(pending) >= 2 * num_workers:  # Bounds the texts in memory.
        wait_for_one()
    while pending:
      wait_for_one()
  except concurrent.futures.process.BrokenProcessPool as error:
    raise OSError(
      "a worker process died, perhaps for want of memory; the finished shards are "
      "kept, and the same command continues."
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)
  return number + 1


def _shards(
  texts: _Texts, shard_size: int
) -> Iterator[list[sources.Document]]:
  documents, size = [], 0
  for document in texts:
    documents.append(document)
    size += document.num_bytes
    if size >= shard_size:
      yield documents
      documents, size = [], 0
  if documents:
    yield documents


def _is_finished(
  folder: Path, number: int, documents: Sequence[sources.Document]
) -> bool:
  """Returns whether an earlier run has finished this shard.

  Raises:
    DataError: the finished shard has other documents.
  """
  file = _shard_file(folder, number)
  try:
    index_N = np.load(file.with_suffix(".npy"))
    if _count_records(file) != _expected_records(index_N):
      return False
  except (OSError, ValueError, RuntimeError):  # Missing or damaged: written again.
    return False
  hashes_NX = sources.hash_array(document.content_hash for document in documents)
  if not np.array_equal(index_N["hash"], hashes_NX):
    raise sources.DataError(
      f"{file} was made of other documents: the source has changed since. Use another "
      "folder."
    )
  return True


def _finish(
  folder: Path, settings: dict[str, Any], texts: _Texts, num_shards: int
) -> None:
  shards = [_shard_file(folder, number) for number in range(num_shards)]
  index_N = np.concatenate([np.load(file.with_suffix(".npy")) for file in shards])
  _write_index(folder / prepared.INDEX, index_N)
  manifest = {
    "format": prepared.FORMAT,
    "settings": settings,
    "source": dataclasses.asdict(texts.reader.stats()),
    "num_tokens": int(index_N["num_tokens"].sum()),
    "shards": [{"name": file.name, "size": file.stat().st_size} for file in shards],
  }
  if texts.splits is not None:
    manifest["splits"] = texts.splits
  files.write_whole(folder / prepared.MANIFEST, _json(manifest))


_worker_tokenizer: tokenizers_lib.Tokenizer


def _start_worker(tokenizer: str) -> None:
  global _worker_tokenizer
  workers.follow_parent()
  # The processes are the parallelism; threads of each would only compete.
  os.environ["TOKENIZERS_PARALLELISM"] = "false"
  _worker_tokenizer = tokenizers_lib.tokenizer_from_json(tokenizer)


def _work(folder: Path, number: int, documents: Sequence[sources.Document]) -> None:
  write_shard(folder, number, documents, _worker_tokenizer)


def _shard_file(folder: Path, number: int) -> Path:
  return folder / f"shard-{number:05d}.array_record"


def _count_records(file: Path) -> int:
  reader = array_record_module.ArrayRecordReader(str(file))
  count = reader.num_records()
  reader.close()
  return count


def _expected_records(index_N: np.ndarray) -> int:
  return int(prepared.num_records(index_N["num_tokens"]).sum())


def _write_index(file: Path, index_N: np.ndarray) -> None:
  content = io.BytesIO()
  np.save(content, index_N)
  files.write_whole(file, content.getvalue())


def _json(values: dict[str, Any]) -> bytes:
  return (json.dumps(values, indent=2) + "\n").encode()
