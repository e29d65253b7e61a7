"""Examples of a task as rows and batches: what `pipeline.Corpus` is for text.

An example is `[bos, prompt, answer, eos]`, a document of its own; answer and eos are
scored. A row holds as many whole examples as always fit, `seq_len` over the longest,
and padding: no example is cut, and none is likelier to be left out than another.

The n-th example of a split follows from (data.seed, split, n) alone, so it is the same
on every host and after every restart. Which split a prompt belongs to is decided by the
hash of its text, as for documents.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mtp_jax.batch import Batch
from mtp_jax.config import Config, ConfigError, DataConfig, TaskConfig
from mtp_jax.data import packing, sources
from mtp_jax.data.tasks.countdown import Countdown
from mtp_jax.data.tasks.induction import Induction
from mtp_jax.data.tasks.interface import Example, Task
from mtp_jax.data.tasks.polynomial import Polynomial
from mtp_jax.data.tasks.sat import Sat
from mtp_jax.data.tasks.siblings import Siblings
from mtp_jax.data.tasks.star_graph import StarGraph
from mtp_jax.data.tokenizers import SymbolTokenizer, check_vocab_size

# All trials are examined with the same examples, whatever their data.seed.
_HELD_OUT_SEED = 2**31
# Rows of an epoch that never ends; more than any run takes.
_ENDLESS = 1 << 30


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


class Examples:
  """Random access to the examples of one split, computed when they are asked for."""

  def __init__(self, task: Task, data: DataConfig, split: str, seed: int):
    self._task, self._data = task, data
    self._split = sources.SPLITS.index(split)
    self._seed = seed

  def __getitem__(self, number: int) -> Example:
    # The key names the stream: examples share no randomness.
    key = [self._seed * len(sources.SPLITS) + self._split, number]
    rng = np.random.Generator(np.random.Philox(key=key))
    while True:
      example = self._task.sample(rng, is_held_out=self._split > 0)
      if not self._task.splits_by_prompt or self._belongs(example):
        return example

  def _belongs(self, example: Example) -> bool:
    digest = hashlib.sha256(" ".join(example.prompt).encode()).digest()
    split_1 = sources.split_of(
      sources.hash_array([digest]),
      self._data.validation_fraction,
      self._data.test_fraction,
    )
    return split_1[0] == self._split


class TaskRows:
  """Rows of training examples, with the interface of `packing.PackedRows`.

  An epoch is every example of the training set once; what does not fill a row opens the
  next epoch. A set without end (`task.num_train` 0) has one endless epoch.
  """

  def __init__(self, corpus: "TaskCorpus", num_extra: int):
    self._corpus = corpus
    self._num_extra = num_extra
    self.store = corpus
    self.seq_len = corpus.config.data.seq_len
    self.num_tokens = corpus.config.task.num_train

  def __len__(self) -> int:
    num_train = self._corpus.config.task.num_train
    return max(1, num_train // self._corpus.per_row) if num_train else _ENDLESS

  def __getitem__(self, row: int) -> Batch:
    corpus, count = self._corpus, self._corpus.per_row
    numbers = range(row * count, (row + 1) * count)
    num_train = corpus.config.task.num_train
    if num_train:
      examples = [corpus.train_set[number % num_train] for number in numbers]
    else:
      examples = [corpus.encode(corpus.train_examples[number]) for number in numbers]
    return pack(examples, self.seq_len, self._num_extra)

  def read(self, rows_B: np.ndarray) -> Batch:
    return packing.stack_rows([self[row] for row in rows_B.tolist()])


def pack(
  examples: list[tuple[np.ndarray, int]], seq_len: int, num_extra: int
) -> Batch:
  """Returns one row, without leading axis, of examples `(tokens, first scored)`."""
  total = seq_len + num_extra
  tokens, segments, positions = np.zeros((3, total), np.int32)
  scored = np.zeros(total, bool)
  begin = 0
  for segment, (ids, first) in enumerate(examples, start=1):
    here = slice(begin, begin + len(ids))
    tokens[here], segments[here] = ids, segment
    positions[here] = np.arange(len(ids))
    scored[begin + first : here.stop] = True
    begin = here.stop
  row, after = slice(seq_len), slice(seq_len, None)
  return Batch(
    tokens[row], segments[row], positions[row], tokens[after], segments[after],
    scored[row], scored[after],
  )


@dataclasses.dataclass(frozen=True)
class TaskCorpus:
  """The examples of a config. `stats` goes into run.json (JSON values)."""

  config: Config
  task: Task
  tokenizer: SymbolTokenizer

  @functools.cached_property
  def train_examples(self) -> Examples:
    return Examples(self.task, self.config.data, "train", self.config.data.seed)

  @property
  def train_set(self) -> list[tuple[np.ndarray, int]]:
    """The encoded training examples of a set with an end."""
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
    return {"manifest": hashlib.sha256(text.encode()).hexdigest()}

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
    """Returns one line on what is generated."""
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
    examples = Examples(
      self.task, self.config.data, self.config.eval.split, _HELD_OUT_SEED
    )
    return [examples[number] for number in range(count)]

  def eval_batches(self, num_extra: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yields `(Batch, document_B)`: held-out examples, each on a row of its own."""
    limits, seq_len = self.config.eval, self.config.data.seq_len
    for begin in range(0, limits.num_rows, limits.batch_size):
      owners = np.arange(begin, begin + limits.batch_size)
      owners[owners >= limits.num_rows] = -1
      rows = [
        pack([self._to_score(i)] if i >= 0 else [], seq_len, num_extra)
        for i in owners
      ]
      yield packing.stack_rows(rows), owners.astype(np.int32)

  def _to_score(self, number: int) -> tuple[np.ndarray, int]:
    """Returns a held-out example without the end that its text does not have there."""
    ids, first = self.encode(self._held_out[number])
    return (ids if self.task.answer_ends else ids[:-1]), first

  @functools.cached_property
  def _held_out(self) -> list[Example]:
    return self.held_out(self.config.eval.num_rows)


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
def _train_set(data: DataConfig, config: TaskConfig) -> list[tuple[np.ndarray, int]]:
  task = make_task(data.source, config)
  tokenizer = SymbolTokenizer(task.symbols)
  examples = Examples(task, data, "train", data.seed)
  return [_encode(tokenizer, examples[number]) for number in range(config.num_train)]
