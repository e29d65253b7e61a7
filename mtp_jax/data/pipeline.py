"""`Corpus` and `TrainLoader`: from documents to an endless stream of batches.

    source -> documents -> split by hash -> tokenizer -> token store -> rows -> batches

With so few documents that a split would be empty, every document is cut into the three
splits. `data.train_on` replaces the training rows only, not the tokenizer or the
held-out text.

The order of documents and rows depends on the corpus and `data.seed` alone, not on the
model's seed, the depth, or the number of hosts or workers.
"""

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from mtp_jax import config as config_lib
from mtp_jax.batch import Batch
from mtp_jax.config import Config, DataConfig, TokenizerConfig
from mtp_jax.data import distilled_text, mixture, packing, prepared, sources, workers
from mtp_jax.data import tokenizers as tokenizers_lib
from mtp_jax.data.memory_store import DecodedTexts, MemoryStore
from mtp_jax.data.tasks.corpus import TaskCorpus, TaskRows, load_task

_WHOLE_DOCUMENTS = (
  " The folder was prepared to be split by whole documents; prepared with these "
  f"fractions, fewer than {sources.FEW} documents are cut by position."
)
# Batches to read ahead, in all and per worker. grain's defaults are 500, which takes
# too much memory, and 1, with which workers wait for each other.
_READ_AHEAD = 4
# Groups of rows; more than any run reads.
_ENDLESS = 1 << 48


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The tokenized documents of a config, and their splits.

  store:       documents of the source.
  split_N:     0 train, 1 validation, 2 test for each document of the store.
  train_store: documents of `data.train_on`; None trains on the train split.
  stats:       counts of texts read and skipped (JSON values), for run.json.
  """

  config: Config
  store: packing.TokenStore
  tokenizer: tokenizers_lib.Tokenizer
  split_N: np.ndarray
  train_store: packing.TokenStore | None
  stats: dict[str, Any]

  def documents(self, split: str, seed: int | None = None) -> np.ndarray:
    """Returns the split's documents by hash, or in the shuffled order of `seed`."""
    order_N = sources.document_order(self.store.hashes_NX, seed)
    return order_N[self.split_N[order_N] == sources.SPLITS.index(split)]

  def texts(self, split: str) -> Sequence[str]:
    """Returns the split's documents as text, in the order of their hashes."""
    return DecodedTexts(self.store, self.tokenizer, self.documents(split))

  @property
  def has_unscored(self) -> bool:
    """Whether batches say which tokens of the held-out text are scored."""
    return self.store.has_unscored

  def train_rows(self, num_extra: int) -> packing.PackedRows:
    """Returns the training rows, each with the `num_extra` tokens after it."""
    data, store = self.config.data, self.train_store
    if store is None:
      store, order = self.store, self.documents("train", data.seed)
    else:
      order = sources.document_order(store.hashes_NX, data.seed)
    return packing.PackedRows(store, order, data.seq_len, num_extra)

  def eval_batches(self, num_extra: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields the evaluation's `(Batch, document_B)`; see `packing.eval_batches`."""
    limits = self.config.eval
    return packing.eval_batches(
      self.store,
      self.documents(limits.split),
      seq_len=self.config.data.seq_len,
      num_extra=num_extra,
      num_rows=limits.num_rows,
      rows_per_document=limits.rows_per_document,
      batch_size=limits.batch_size,
    )


@dataclasses.dataclass(frozen=True)
class MixedCorpus(Corpus):
  """The documents of all parts of a mixture; training rows follow the weights."""

  parts: tuple[Corpus, ...]

  def train_rows(self, num_extra: int) -> packing.PackedRows | mixture.MixedRows:
    if self.train_store is not None:
      return super().train_rows(num_extra)
    rows = [part.train_rows(num_extra) for part in self.parts]
    weights = [weight for weight, _ in mixture.parts(self.config.data)]
    return mixture.MixedRows(rows, weights, self.store)


def load_corpus(
  config: Config, tokenizer: tokenizers_lib.Tokenizer | None = None
) -> Corpus | TaskCorpus:
  """Reads, splits and tokenizes the corpus of a config; caches the last two.

  Returns a `TaskCorpus` if `data.source` is a synthetic task.

  Args:
    config: of the run.
    tokenizer: replaces the tokenizer at `tokenizer.path`.

  Raises:
    DataError: no input, unreadable input, or no document in a split that training or
      evaluation needs; see `distilled_text.load` for `data.train_on`.
    ConfigError: `tokenizer.vocab_size` is too small for the tokenizer.
  """
  if config.data.source in config_lib.TASKS:
    return load_task(config)
  if config.data.source == "mixture":
    return _load_mixture(config, tokenizer)
  data, tokenizer_config = config.data, config.tokenizer
  # Keys that do not change the tokens are blanked, so that trials share the cache.
  same_text = dataclasses.replace(
    data, train_on="", seq_len=0, batch_size=0, seed=0, num_workers=0
  )
  is_prepared = data.source == "array_record"
  if is_prepared:
    store, folder = _open_prepared(data.path)
    _check_prepared(folder, config, tokenizer)
    tokenizer, stats = folder.tokenizer, folder.source
    is_cut = folder.split_N is not None
    split_N = folder.split_N if is_cut else _split(store.hashes_NX, data)
  else:
    # Only BPE is trained to a size; other tokenizers have a fixed one, checked below.
    size = tokenizer_config.vocab_size if tokenizer_config.kind == "bpe" else 0
    same_tokenizer = dataclasses.replace(tokenizer_config, vocab_size=size)
    given = tokenizer if tokenizer_config.kind == "file" else None
    store, tokenizer, stats, split_N, is_cut = _tokenized(
      same_text, same_tokenizer, given
    )
  tokenizers_lib.check_vocab_size(tokenizer, tokenizer_config.vocab_size)
  if is_cut:
    store, split_N = _with_gaps(store, split_N, data.seq_len)
  counts = _counts(store, split_N)
  # Only the splits that this run reads have to hold documents.
  tested = sources.SPLITS if config.train.eval_test else ()
  for name in dict.fromkeys(("train", config.eval.split, *tested)):
    if not counts[name]["documents"] and is_cut:
      raise sources.DataError(
        f"{stats['where']} has too little text: {stats['num_documents']} document(s) "
        f"({stats['num_bytes']:,} bytes) are cut into train, validation and test with "
        f"a gap of data.seq_len ({data.seq_len}) tokens, and none is left for "
        f"{name!r}. Give more text, lower data.seq_len, or change "
        f"data.validation_fraction ({data.validation_fraction}) and "
        f"data.test_fraction ({data.test_fraction})."
      )
    if not counts[name]["documents"]:
      raise sources.DataError(
        f"data.{'validation' if name == 'train' else name}_fraction must leave at "
        f"least one of the {len(split_N)} document(s) for the {name} split, got "
        f"data.validation_fraction = {data.validation_fraction}, "
        f"data.test_fraction = {data.test_fraction}.{_WHOLE_DOCUMENTS * is_prepared}"
      )
    if not packing.has_targets(store, split_N == sources.SPLITS.index(name)):
      raise sources.DataError(
        f"data.path must hold text of an assistant in the {name} split, got none in "
        f"{stats['where']} ({stats['num_chats']:,} chats)."
      )
  stats = stats | {"splits": counts, "is_cut": is_cut, "train_on": None}
  train_store = None
  if data.train_on:
    train_store, stats["train_on"] = _written(data.train_on, store, tokenizer)
  return Corpus(config, store, tokenizer, split_N, train_store, stats)


def _load_mixture(
  config: Config, tokenizer: tokenizers_lib.Tokenizer | None
) -> MixedCorpus:
  """Returns the corpora of all parts as one, with their counts added up."""
  weights, sections = zip(*mixture.parts(config.data), strict=True)
  parts = tuple(
    load_corpus(
      dataclasses.replace(config, data=dataclasses.replace(section, train_on="")),
      tokenizer,
    )
    for section in sections
  )
  tokenizer = parts[0].tokenizer
  identities = [part.store.identity for part in parts]
  contents = [*zip(weights, (x["manifest"] for x in identities), strict=True)]
  store = mixture.MixedStore(
    [part.store for part in parts],
    identities[0] | {"manifest": hashlib.sha256(repr(contents).encode()).hexdigest()},
  )
  split_N = np.concatenate([part.split_N for part in parts])
  # Prepared folders of older versions have no count of chats.
  counts = (
    "num_files", "num_documents", "num_bytes", "num_empty", "num_duplicates",
    "num_chats",
  )
  stats = {key: sum(x.stats.get(key, 0) for x in parts) for key in counts} | {
    "where": config.data.path,
    "encoding_errors": [x for part in parts for x in part.stats["encoding_errors"]],
    "is_cut": any(part.stats["is_cut"] for part in parts),
    "splits": _counts(store, split_N),
    "parts": [part.stats for part in parts],
    "train_on": None,
  }
  train_store = None
  if config.data.train_on:
    train_store, stats["train_on"] = _written(config.data.train_on, store, tokenizer)
  return MixedCorpus(config, store, tokenizer, split_N, train_store, stats, parts)


def _counts(store: packing.TokenStore, split_N: np.ndarray) -> dict[str, Any]:
  """Returns the documents and tokens of each split."""
  return {
    name: {
      "documents": int(np.sum(split_N == i)),
      "tokens": int(store.lengths_N[split_N == i].sum()),
    }
    for i, name in enumerate(sources.SPLITS)
  }


@functools.lru_cache(maxsize=2)
def _tokenized(
  data: DataConfig,
  tokenizer_config: TokenizerConfig,
  tokenizer: tokenizers_lib.Tokenizer | None,
) -> tuple[
  MemoryStore, tokenizers_lib.Tokenizer, dict[str, Any], np.ndarray, bool
]:
  """Returns `(store, tokenizer, stats, split_N, is_cut)` of a source of texts."""
  if tokenizer is None and tokenizer_config.kind != "bpe":
    tokenizer = tokenizers_lib.make_tokenizer(tokenizer_config, ())
  documents = sources.load_documents(
    data.source, data.path, data.text_field, tokenizer
  )
  split_N = _split(documents.hashes_NX, data)
  manifest = documents.stats.manifest
  held_out = (data.validation_fraction, data.test_fraction)
  is_cut = sources.must_cut(documents.hashes_NX, *held_out)
  if is_cut:
    documents, split_N = sources.cut(documents, *held_out)
    manifest = sources.manifest_of(map(bytes, documents.hashes_NX))
  # A BPE tokenizer must not see held-out text.
  train_texts = (
    text for text, i in zip(documents.texts, split_N, strict=True) if i == 0
  )
  if tokenizer is None:
    tokenizer = tokenizers_lib.make_tokenizer(tokenizer_config, train_texts)
  identity = {
    "manifest": manifest,
    "tokenizer": hashlib.sha256(tokenizer.to_json().encode()).hexdigest(),
  }
  store = MemoryStore(documents, tokenizer, identity)
  return store, tokenizer, dataclasses.asdict(documents.stats), split_N, is_cut


def _split(hashes_NX: np.ndarray, data: DataConfig) -> np.ndarray:
  return sources.split_of(hashes_NX, data.validation_fraction, data.test_fraction)


def _with_gaps(
  store: MemoryStore, split_N: np.ndarray, seq_len: int
) -> tuple[MemoryStore, np.ndarray]:
  """Returns the store with training parts shortened by `seq_len` tokens, and splits.

  Training and held-out parts of one document are neighbours (`sources.cut`); the gap
  separates them. Parts with nothing left to predict are in no split (-1).
  """
  shorter = copy.copy(store)
  is_train_N = split_N == sources.SPLITS.index("train")
  shorter.lengths_N = np.maximum(store.lengths_N - seq_len * is_train_N, 0)
  return shorter, np.where(shorter.lengths_N < 2, -1, split_N)


@functools.lru_cache(maxsize=2)
def _written(
  path: str, held_out: packing.TokenStore, tokenizer: tokenizers_lib.Tokenizer
) -> tuple[MemoryStore, dict[str, Any]]:
  """Returns the store of `data.train_on`, and counts for run.json."""
  documents = distilled_text.load(path)
  # A resumed run must have the same held-out texts, too.
  identity = held_out.identity | {"train_on": documents.stats.manifest}
  store = MemoryStore(documents, tokenizer, identity)
  num_tokens = int(store.lengths_N.sum())
  return store, dataclasses.asdict(documents.stats) | {"num_tokens": num_tokens}


@functools.lru_cache(maxsize=2)
def _open_prepared(
  path: str,
) -> tuple[prepared.ArrayRecordStore, prepared.PreparedFolder]:
  folder = prepared.open_folder(path)
  manifest = folder.source["manifest"]
  if folder.split_N is not None:
    manifest = sources.manifest_of(map(bytes, folder.index_N["hash"]))
  identity = {
    "manifest": manifest,
    "tokenizer": hashlib.sha256(folder.tokenizer.to_json().encode()).hexdigest(),
  }
  # Folders of older versions hold no chats.
  has_unscored = folder.source.get("num_chats", 0) > 0
  store = prepared.ArrayRecordStore(
    folder.shards, folder.index_N, identity, has_unscored
  )
  return store, folder


def _check_prepared(
  folder: prepared.PreparedFolder,
  config: Config,
  given: tokenizers_lib.Tokenizer | None,
) -> None:
  """Raises DataError if the config differs from the settings of a prepared folder."""
  # BPE was trained on the train split: another split would hold out text it has seen.
  # A folder of few documents holds their parts.
  values = config_lib.flatten(config_lib.to_dict(config))
  for key in ("tokenizer.kind", "data.validation_fraction", "data.test_fraction"):
    if key in folder.settings and folder.settings[key] != values[key]:
      raise sources.DataError(
        f"{key} must be {folder.settings[key]!r}, with which {str(folder.path)!r} was "
        f"prepared, got {values[key]!r}."
      )
  if config.tokenizer.kind == "file":
    given = given or tokenizers_lib.load_tokenizer(config.tokenizer.path)
    if given.to_json() != folder.tokenizer.to_json():
      raise sources.DataError(
        f"tokenizer.path must name the tokenizer with which {str(folder.path)!r} was "
        f"prepared ({prepared.TOKENIZER} in it), got {config.tokenizer.path!r}."
      )


class TrainLoader:
  """Endless batches of this host's rows, shuffled anew every epoch.

  The batches of all hosts, concatenated, are the batch of a single host, so that each
  row of an epoch is read exactly once. The state is the number of batches taken: a
  batch depends on its number alone, whatever the number of workers.
  """

  def __init__(
    self,
    rows: packing.PackedRows | TaskRows,
    *,
    batch_size: int,
    seed: int,
    host_index: int = 0,
    num_hosts: int = 1,
    num_workers: int = 0,
  ):
    """Args: `batch_size` is global and divisible by `num_hosts`."""
    if batch_size % num_hosts:
      raise ValueError(
        f"data.batch_size must be divisible by the number of hosts ({num_hosts}), "
        f"got {batch_size}."
      )
    self.has_unscored = rows.store.has_unscored
    self._identity = rows.store.identity | {
      "seq_len": rows.seq_len,
      "batch_size": batch_size,
      "num_tokens": rows.num_tokens,
      "seed": seed,
    }
    self._num_workers = num_workers
    # Threads overlap their waits for a disk. Rows in memory are read twice as fast by
    # one thread.
    stores = getattr(rows.store, "stores", [rows.store])
    waits = any(isinstance(store, prepared.ArrayRecordStore) for store in stores)
    self._num_threads = _READ_AHEAD if waits else 1
    read = functools.partial(_read_group, rows, seed, batch_size // num_hosts)
    groups = grain.MapDataset.range(_ENDLESS).map(read)
    self._batches = groups[host_index::num_hosts]
    self._taken = 0
    self._iterator: Iterator[Batch] | None = None

  def __iter__(self) -> "TrainLoader":
    return self

  def __next__(self) -> Batch:
    if self._iterator is None:
      self._iterator = self._start()
    batch = next(self._iterator)
    self._taken += 1
    # Copied, because shared memory ends with the workers.
    if self._num_workers:
      return packing.map_fields(lambda field: np.array(field[0]), batch)
    return batch

  def get_state(self) -> dict[str, Any]:
    """Returns the state for `set_state` (JSON values)."""
    return {"batches": self._taken, "identity": self._identity}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues where `get_state` was called.

    Raises:
      DataError: corpus, tokenizer or order differ from the saved run's.
    """
    if state["identity"] != self._identity:
      keys = state["identity"].keys() | self._identity.keys()
      differing = [
        f"{key}: {state['identity'].get(key)!r} there, {self._identity.get(key)!r} now"
        for key in sorted(keys)
        if state["identity"].get(key) != self._identity.get(key)
      ]
      raise sources.DataError(
        "data must be the corpus of the saved run to continue it; "
        + "; ".join(differing)
        + "."
      )
    self.close()
    self._taken = state["batches"]

  def close(self) -> None:
    """Ends threads and worker processes; the next batch would start them again."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None

  def _start(self) -> Iterator[Batch]:
    options = grain.ReadOptions(self._num_threads, prefetch_buffer_size=_READ_AHEAD)
    rest = self._batches[self._taken :].to_iter_dataset(options)
    if self._num_workers:
      if not flags.FLAGS.is_parsed():  # Outside of a command; grain reads its flags.
        flags.FLAGS.mark_as_parsed()
      options = grain.multiprocessing.MultiprocessingOptions(
        self._num_workers, per_worker_buffer_size=_READ_AHEAD
      )
      rest = rest.mp_prefetch(options, worker_init_fn=workers.serve_training)
    return iter(rest)


def _read_group(
  rows: packing.PackedRows | TaskRows, seed: int, num_rows: int, index: int
) -> Batch:
  """Returns group number `index` of `num_rows` rows of the shuffled order."""
  return rows.read(rows.order(seed, index * num_rows, (1 + index) * num_rows))
