"""Examples of a task as rows and batches: the counterpart of `pipeline.Corpus`.

An example is `[bos, prompt, answer, eos]`, a document of its own; answer and eos are
scored. Every row holds the same number of whole examples, `seq_len` over the longest
example, and padding: no example is cut, whatever its length.

The n-th example of a split depends on (data.seed, split, n) alone, so it is the same on
every host and after every restart. The hash of a prompt decides its split, as for
documents.

Legend: N examples, L tokens of the longest, S symbols of an example, W random words.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np

from mtp_jax.batch import Batch
from mtp_jax.config import Config, ConfigError, DataConfig, TaskConfig
from mtp_jax.data import packing, sources
from mtp_jax.data.tasks.countdown import Countdown
from mtp_jax.data.tasks.induction import Induction
from mtp_jax.data.tasks.interface import DrawnTask, Example, Task
from mtp_jax.data.tasks.polynomial import Polynomial
from mtp_jax.data.tasks.sat import Sat
from mtp_jax.data.tasks.siblings import Siblings
from mtp_jax.data.tasks.star_graph import StarGraph
from mtp_jax.data.tokenizers import SymbolTokenizer, check_vocab_size

# Held-out examples are the same for every data.seed.
_HELD_OUT_SEED = 2**31
# Rows of an endless epoch; more than any run reads.
_ENDLESS = 1 << 30
# Examples drawn at once, which bounds memory.
_MOST_DRAWS = 4096
# The step of SplitMix64's counter.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def make_task(source: str, config: TaskConfig) -> Task:
  """Returns the task of `data.source`, one of `config.TASKS`."""
  match source:
    case "star_graph":
      return StarGraph(config.star_graph)
    case "sat":
      return Sat(config.sat)
    case "countdown":
      return Countdown(config.countdown)
    case "polynomial":
      return Polynomial(config.polynomial)
    case "induction":
      return Induction(config.induction)
    case "siblings":
      return Siblings(config.siblings)
  raise ValueError(f"data.source must be a task, got {source!r}.")


class Encoded(NamedTuple):
  """N examples as ids, [bos, prompt, answer, eos], padded to the longest, L.

  tokens_NL: int32. lengths_N: without padding. firsts_N: tokens before the answer.
  """

  tokens_NL: np.ndarray
  lengths_N: np.ndarray
  firsts_N: np.ndarray

  def at(self, numbers: np.ndarray) -> "Encoded":
    return Encoded(*(x[numbers] for x in self))


class Examples:
  """Random access to the examples of one split, computed on access."""

  def __init__(self, task: Task, data: DataConfig, split: str, seed: int):
    self._task, self._data = task, data
    self._tokenizer = SymbolTokenizer(task.symbols)
    self._ids_S = self._tokenizer.encode_symbols(task.symbols)
    self._split = sources.SPLITS.index(split)
    self._seed = seed
    seeds = np.random.SeedSequence((seed, self._split))
    self._state = seeds.generate_state(1, np.uint64)

  def __getitem__(self, number: int) -> Example:
    if isinstance(self._task, DrawnTask):
      symbols = [self._task.symbols[i] for i in self._draw(np.array([number]))[0]]
      end = self._task.max_prompt
      return Example(tuple(symbols[:end]), tuple(symbols[end:]))
    # The key names the stream: examples share no randomness.
    key = [self._seed * len(sources.SPLITS) + self._split, number]
    rng = np.random.Generator(np.random.Philox(key=key))
    while True:
      example = self._task.sample(rng, is_held_out=self._split > 0)
      if not self._task.splits_by_prompt or self._belongs(example):
        return example

  def encoded(self, numbers_N: np.ndarray) -> Encoded:
    """Returns the examples of these numbers."""
    bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
    if isinstance(self._task, DrawnTask):
      ids_NS = self._ids_S[self._draw(numbers_N)]
      tokens_NL = np.pad(ids_NS, ((0, 0), (1, 1)))
      tokens_NL[:, 0], tokens_NL[:, -1] = bos, eos
      N, L = tokens_NL.shape
      return Encoded(tokens_NL, np.full(N, L), np.full(N, 1 + self._task.max_prompt))
    pairs = [_encode(self._tokenizer, self[number]) for number in numbers_N.tolist()]
    lengths_N = np.array([len(ids) for ids, _ in pairs])
    tokens_NL = np.zeros((len(pairs), max(lengths_N)), np.int32)
    for row, (ids, _) in zip(tokens_NL, pairs, strict=True):
      row[: len(ids)] = ids
    return Encoded(tokens_NL, lengths_N, np.array([first for _, first in pairs]))

  def _draw(self, numbers_N: np.ndarray) -> np.ndarray:
    """Returns symbols_NS of a `DrawnTask`.

    Every example has a SplitMix64 generator of its own (Steele et al. 2014) and is the
    first of its draws that is valid and of this split. The number of tries at a time
    affects speed only. Legend: A examples without a draw so far, C tries.
    """
    if len(numbers_N) > _MOST_DRAWS:
      parts = np.array_split(numbers_N, -(-len(numbers_N) // _MOST_DRAWS))
      return np.concatenate([self._draw(part) for part in parts])
    task, W = self._task, self._task.num_words
    state_N = sources.mix(self._state ^ sources.mix(numbers_N.astype(np.uint64)))
    symbols_NS = np.zeros((len(numbers_N), task.max_tokens), np.int64)
    left_A, tried, tries = np.arange(len(numbers_N)), 0, 1
    while len(left_A):
      # SplitMix64 is a mixed counter: any stretch of a stream can be computed at once.
      at = np.arange(1 + tried * W, 1 + (tried + tries) * W, dtype=np.uint64)
      words = sources.mix(state_N[left_A, None] + at * _GOLDEN)
      symbols, is_valid = task.draw(words.reshape(-1, W))
      if task.splits_by_prompt:
        is_valid &= self._are_of_split(symbols[:, : task.max_prompt])
      is_valid_AC = is_valid.reshape(-1, tries)
      first_A, found_A = np.argmax(is_valid_AC, axis=1), np.any(is_valid_AC, axis=1)
      symbols_ACS = symbols.reshape(len(left_A), tries, -1)
      symbols_NS[left_A[found_A]] = symbols_ACS[found_A, first_A[found_A]]
      # The fewer examples are left, the more tries each gets at once.
      left_A, tried = left_A[~found_A], tried + tries
      tries = max(1, min(4 * tries, _MOST_DRAWS // max(1, len(left_A))))
    return symbols_NS

  def _are_of_split(self, prompts_NP: np.ndarray) -> np.ndarray:
    # Tabulation hashing: a random word for every symbol at every place.
    num_symbols, P = len(self._task.symbols), prompts_NP.shape[1]
    table = sources.mix(_GOLDEN + np.arange(P * num_symbols, dtype=np.uint64))
    words_NP = table[prompts_NP + num_symbols * np.arange(P)]
    hash_N = sources.mix(np.bitwise_xor.reduce(words_NP, axis=1))
    return self._is_split(hash_N.astype(">u8")[:, None].view(np.uint8))

  def _belongs(self, example: Example) -> bool:
    digest = hashlib.sha256(" ".join(example.prompt).encode()).digest()
    return bool(self._is_split(sources.hash_array([digest]))[0])

  def _is_split(self, hashes_NX: np.ndarray) -> np.ndarray:
    fractions = self._data.validation_fraction, self._data.test_fraction
    return sources.split_of(hashes_NX, *fractions) == self._split


class TaskRows:
  """Rows of training examples, with the interface of `packing.PackedRows`.

  An epoch is every example of the training set once; examples that do not fill a row
  begin the next epoch. An endless set (`task.num_train` 0) has one endless epoch.
  """

  def __init__(self, corpus: "TaskCorpus", num_extra: int):
    self._corpus = corpus
    self._num_extra = num_extra
    self.store = corpus
    self.seq_len = corpus.config.data.seq_len
    self.num_tokens = corpus.config.task.num_train
    self.most_documents = corpus.per_row + 1  # And padding.

  def __len__(self) -> int:
    num_train = self._corpus.config.task.num_train
    return max(1, num_train // self._corpus.per_row) if num_train else _ENDLESS

  def __getitem__(self, row: int) -> Batch:
    return packing.map_fields(lambda field: field[0][0], self.read(np.array([row])))

  def order(self, seed: int, begin: int, end: int) -> np.ndarray:
    """Returns row numbers [end - begin] of the endless order, shuffled every epoch."""
    # grain's shuffle visits at least 2^16 numbers for an epoch of any size, which takes
    # longer than a step of a small model.
    if self.num_tokens:
      num_rows, places = len(self), np.arange(begin, end)
      first, last = begin // num_rows, (end - 1) // num_rows
      epochs = [_shuffled(num_rows, seed, epoch) for epoch in range(first, 1 + last)]
      return np.concatenate(epochs)[places - first * num_rows]
    # Endless drawn examples are independent: their order is random already.
    if isinstance(self._corpus.task, DrawnTask):
      return np.arange(begin, end)
    return packing.shuffled_rows(len(self), seed, begin, end)

  def read(self, rows_B: np.ndarray) -> Batch:
    corpus, count = self._corpus, self._corpus.per_row
    numbers_N = (count * rows_B[:, None] + np.arange(count)).reshape(-1)
    num_train = corpus.config.task.num_train
    if num_train:
      examples = corpus.train_set.at(numbers_N % num_train)
    else:
      examples = corpus.train_examples.encoded(numbers_N)
    return pack(examples, count, self.seq_len, self._num_extra)


@functools.lru_cache(maxsize=4)
def _shuffled(num_rows: int, seed: int, epoch: int) -> np.ndarray:
  """Returns the shuffled row numbers of an epoch; they continue those before it."""
  (state,) = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
  keys = sources.mix(state ^ sources.mix(np.arange(num_rows, dtype=np.uint64)))
  return epoch * num_rows + np.argsort(keys)


def pack(examples: Encoded, per_row: int, seq_len: int, num_extra: int) -> Batch:
  """Returns rows of `per_row` examples each.

  Legend: B rows, P examples of a row, A tokens of all rows.
  """
  total = seq_len + num_extra
  # Where each example begins in an array of all rows, one after the other.
  begins_BP = np.cumsum(examples.lengths_N.reshape(-1, per_row), axis=1)
  begins_BP -= examples.lengths_N.reshape(-1, per_row)
  begins_BP += total * np.arange(len(begins_BP))[:, None]
  offset_L = np.arange(examples.tokens_NL.shape[1])
  is_token_NL = offset_L < examples.lengths_N[:, None]
  at_A = (begins_BP.reshape(-1, 1) + offset_L)[is_token_NL]
  segment_N = 1 + np.arange(len(is_token_NL)) % per_row

  def place(values: np.ndarray, dtype: type = np.int32) -> tuple[np.ndarray, ...]:
    """Returns a field of the rows, and of the tokens after the rows."""
    field = np.zeros(len(begins_BP) * total, dtype)
    field[at_A] = np.broadcast_to(values, is_token_NL.shape)[is_token_NL]
    parts = np.split(field.reshape(-1, total), [seq_len], axis=1)
    return tuple(map(np.ascontiguousarray, parts))

  tokens, next_tokens = place(examples.tokens_NL)
  segments, next_segments = place(segment_N[:, None])
  scored, next_scored = place(offset_L >= examples.firsts_N[:, None], bool)
  positions, _ = place(offset_L)
  return Batch(
    tokens, segments, positions, next_tokens, next_segments, scored, next_scored
  )


@dataclasses.dataclass(frozen=True)
class TaskCorpus:
  """The examples of a config's task; `stats` (JSON values) is for run.json."""

  config: Config
  task: Task
  tokenizer: SymbolTokenizer
  has_unscored: ClassVar[bool] = True  # No token of a prompt is scored.

  @functools.cached_property
  def train_examples(self) -> Examples:
    return Examples(self.task, self.config.data, "train", self.config.data.seed)

  @property
  def train_set(self) -> Encoded:
    """The encoded training examples of a finite set."""
    c = self.config
    data = dataclasses.replace(c.data, seq_len=0, batch_size=0, num_workers=0)
    return _train_set(data, c.task)

  @functools.cached_property
  def per_row(self) -> int:
    return self.config.data.seq_len // (self.task.max_tokens + 2)

  @functools.cached_property
  def identity(self) -> dict[str, str | int | float]:
    c = self.config
    settings = getattr(c.task, c.data.source)
    text = f"{c.data.source} {settings} {c.data.validation_fraction} "
    text += f"{c.data.test_fraction} {c.data.seed} {c.task.num_train}"
    # These keys tell the present generators from the generators of older versions.
    drawn = {"draws": "splitmix64"} if isinstance(self.task, DrawnTask) else {}
    order = {"order": "splitmix64"} if c.task.num_train else {}
    return {"manifest": hashlib.sha256(text.encode()).hexdigest()} | drawn | order

  @property
  def stats(self) -> dict[str, Any]:
    source = self.config.data.source
    return {
      "task": source,
      "settings": dataclasses.asdict(getattr(self.config.task, source)),
      "num_train": self.config.task.num_train,
      "examples_per_row": self.per_row,
    }

  def describe(self) -> str:
    """Returns one line about the task, its settings and its examples."""
    settings = ", ".join(f"{k} {v}" for k, v in self.stats["settings"].items())
    count = self.config.task.num_train
    return (
      f"task {self.config.data.source} ({settings}): "
      f"{f'{count:,}' if count else 'endless'} examples, {self.per_row} to a row"
    )

  def encode(self, example: Example) -> tuple[np.ndarray, int]:
    """Returns `(tokens, number of tokens before the answer)`."""
    return _encode(self.tokenizer, example)

  def train_rows(self, num_extra: int) -> TaskRows:
    return TaskRows(self, num_extra)

  def held_out(self, count: int) -> list[Example]:
    """Returns the first `count` examples of the evaluation's split."""
    drawn = self._drawn  # Kept: every validation asks for the same examples.
    drawn += [self._held_out_examples[number] for number in range(len(drawn), count)]
    return drawn[:count]

  def eval_batches(self, num_extra: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields `(Batch, document_B)`: held-out examples, each on a row of its own."""
    limits, seq_len = self.config.eval, self.config.data.seq_len
    for begin in range(0, limits.num_rows, limits.batch_size):
      owners = np.arange(begin, begin + limits.batch_size)
      owners[owners >= limits.num_rows] = -1
      examples = self._to_score.at(owners)
      lengths = np.where(owners >= 0, examples.lengths_N, 0)
      batch = pack(examples._replace(lengths_N=lengths), 1, seq_len, num_extra)
      yield batch, owners.astype(np.int32)

  @functools.cached_property
  def _drawn(self) -> list[Example]:
    return []

  @functools.cached_property
  def _held_out_examples(self) -> Examples:
    return Examples(self.task, self.config.data, self.config.eval.split, _HELD_OUT_SEED)

  @functools.cached_property
  def _to_score(self) -> Encoded:
    """The held-out examples; without eos if the text continues after the answer."""
    examples = self._held_out_examples.encoded(np.arange(self.config.eval.num_rows))
    end = 0 if self.task.answer_ends else 1
    return examples._replace(lengths_N=examples.lengths_N - end)


def load_task(config: Config) -> TaskCorpus:
  """Returns the examples of a config whose `data.source` is a task.

  Raises:
    ConfigError: a row or the vocabulary is too small for the task.
  """
  task = make_task(config.data.source, config.task)
  tokenizer = SymbolTokenizer(task.symbols)
  check_vocab_size(tokenizer, config.tokenizer.vocab_size)
  if config.data.seq_len < task.max_tokens + 2:
    raise ConfigError(
      f"data.seq_len must be at least {task.max_tokens + 2}, the longest example of "
      f"task {config.data.source!r} with its begin and end, got {config.data.seq_len}."
    )
  return TaskCorpus(config, task, tokenizer)


def _encode(tokenizer: SymbolTokenizer, example: Example) -> tuple[np.ndarray, int]:
  ids = tokenizer.encode_symbols([*example.prompt, *example.answer])
  tokens = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]])
  return tokens.astype(np.int32), 1 + len(example.prompt)


@functools.lru_cache(maxsize=2)
def _train_set(data: DataConfig, config: TaskConfig) -> Encoded:
  examples = Examples(make_task(data.source, config), data, "train", data.seed)
  return examples.encoded(np.arange(config.num_train))
