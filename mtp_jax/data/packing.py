"""Packing: an endless stream of documents, cut into rows without padding or loss.

Index arithmetic on top of a token store; read this file to learn what a `Batch` holds.

Legend: N documents, B batch, T sequence, M = 1 + mtp.depth tokens after the row.

  stream     a0 a1 a2 a3 | b0 b1 b2 b3 | a0 ...     (T = 5, M = 2; a0, b0 = bos)
  row 0      a0 a1 a2 a3 b0 | b1 b2       row 1      b1 b2 b3 a0 a1 | a2 a3
  segment     1  1  1  1  2 |  2  2                   1  1  1  2  2 |  2  2
  position    0  1  2  3  0 |                         0  1  2  0  1 |
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from grain.experimental import index_shuffle

from mtp_jax.batch import Batch

# Rows that `token_counts` reads at once.
_GROUP_ROWS = 1024


class TokenStore(Protocol):
  """Token ids of documents, each [bos, tokens..., eos].

  Documents have no bos or eos if the tokenizer has none (some model folders), and parts
  of documents lack the end that they were cut from.

  lengths_N: [N] int64, at least 1 each.
  hashes_NX: [N, 32] uint8 content hashes.
  identity:  JSON values that differ between corpora; written into checkpoints.
  has_unscored: some tokens are never targets. Such a token is read as ~id, which is
    negative.
  """

  lengths_N: np.ndarray
  hashes_NX: np.ndarray
  identity: dict[str, str | int | float]
  has_unscored: bool

  def read(self, document: int, begin: int, end: int) -> np.ndarray:
    """Returns tokens [end - begin] of a document, 0 <= begin <= end <= length."""


def token_ids(marked: np.ndarray) -> np.ndarray:
  """Returns the ids of tokens from a store, whether they are targets or not."""
  return np.where(marked < 0, ~marked, marked)


class PackedRows:
  """Random access to the rows of the endless stream of a set of documents.

  The stream repeats the documents, in a given order, for ever. Row r is
  `stream[r * T : r * T + T]`: its tokens do not depend on M, and every token of the
  stream is in exactly one row. One epoch is `len(self)` = floor(stream length / T) rows
  (at least 1). The remainder begins the next epoch, so no token is dropped, and the
  cuts between rows differ from epoch to epoch. Any index >= 0 can be read; iteration
  yields one epoch.

  Segment ids number the documents of a row from 1, and continue in the tokens after the
  row. Positions restart with each document and with each row.
  """

  def __init__(
    self, store: TokenStore, order: np.ndarray, seq_len: int, num_extra: int
  ):
    """Args: `order`: document numbers of the store in stream order; not empty."""
    if len(order) == 0:
      raise ValueError("PackedRows needs at least one document.")
    self.store = store
    self.seq_len = seq_len
    self.num_extra = num_extra
    self.has_unscored = store.has_unscored
    self._order = np.asarray(order)
    self._lengths = store.lengths_N[self._order]
    ends = np.cumsum(self._lengths)
    self._starts = ends - self._lengths
    self.num_tokens = int(ends[-1])

  def __len__(self) -> int:
    return max(1, self.num_tokens // self.seq_len)

  def __iter__(self) -> Iterator[Batch]:
    return (self[row] for row in range(len(self)))

  def __getitem__(self, row: int) -> Batch:
    """Returns row `row >= 0` as a Batch without its leading axis."""
    return map_fields(lambda field: field[0][0], self.read(np.array([row])))

  @property
  def most_documents(self) -> int:
    """The most documents of `seq_len` tokens of the stream, wherever a row begins."""
    last_N = self._starts + self._lengths - 1
    begin_N, end_N = (self._document_at(last_N + x) for x in (0, self.seq_len - 1))
    return int(1 + np.max(end_N - begin_N))

  def order(self, seed: int, begin: int, end: int) -> np.ndarray:
    """Returns row numbers [end - begin] of the endless order; see `shuffled_rows`."""
    return shuffled_rows(len(self), seed, begin, end)

  def read(self, rows_B: np.ndarray) -> Batch:
    """Returns the rows of these numbers, each at least 0, as a Batch [B, ...]."""
    if np.min(rows_B) < 0:
      raise IndexError(f"row must be at least 0, got {np.min(rows_B)}.")
    # All rows at once: several times as fast as row after row.
    T, X = self.seq_len, self.seq_len + self.num_extra
    begin_B = rows_B.astype(np.int64) * T
    first_B, last_B = self._document_at(begin_B), self._document_at(begin_B + X - 1)
    # A piece is the part of one document in one row. Legend: P pieces of all rows, and
    # X = T + M.
    count_B = 1 + last_B - first_B
    before_P = np.repeat(np.cumsum(count_B) - count_B, count_B)
    segment_P = 1 + np.arange(len(before_P)) - before_P
    epoch_P, document_P = np.divmod(
      np.repeat(first_B, count_B) + segment_P - 1, len(self._order)
    )
    start_P = epoch_P * self.num_tokens + self._starts[document_P]
    row_begin_P = np.repeat(begin_B, count_B)
    begin_P = np.maximum(start_P, row_begin_P)
    end_P = np.minimum(start_P + self._lengths[document_P], row_begin_P + X)
    tokens = np.concatenate([
      self.store.read(document, begin, end)
      for document, begin, end in zip(
        self._order[document_P].tolist(),
        (begin_P - start_P).tolist(),
        (end_P - start_P).tolist(),
        strict=True,
      )
    ])
    # Positions count from the piece's begin, so that they restart with every row.
    size_P = end_P - begin_P
    segments = np.repeat(segment_P.astype(np.int32), size_P)
    at_P = np.cumsum(size_P) - size_P
    positions = np.arange(len(tokens), dtype=np.int32)
    positions -= np.repeat(at_P.astype(np.int32), size_P)
    marked_BX, segments_BX, positions_BX = (
      x.reshape(-1, X) for x in (tokens, segments, positions)
    )
    tokens_BX = token_ids(marked_BX) if self.has_unscored else marked_BX
    fields = [
      *(x[:, :T] for x in (tokens_BX, segments_BX, positions_BX)),
      *(x[:, T:] for x in (tokens_BX, segments_BX)),
    ]
    if self.has_unscored:
      fields += [marked_BX[:, :T] >= 0, marked_BX[:, T:] >= 0]
    return Batch(*map(np.ascontiguousarray, fields))

  def _document_at(self, at_B: np.ndarray) -> np.ndarray:
    """Returns the numbers, in the endless stream, of the documents of tokens `at_B`."""
    epoch_B, offset_B = np.divmod(at_B, self.num_tokens)
    document_B = np.searchsorted(self._starts, offset_B, side="right") - 1
    return epoch_B * len(self._order) + document_B


def has_targets(store: TokenStore, is_asked_N: np.ndarray) -> bool:
  """Returns whether a token of the documents asked for can be a target."""
  if not store.has_unscored:
    return True
  documents, lengths_N = np.flatnonzero(is_asked_N), store.lengths_N
  return any(np.any(store.read(i, 0, int(lengths_N[i])) >= 0) for i in documents)


def shuffled_rows(num_rows: int, seed: int, begin: int, end: int) -> np.ndarray:
  """Returns rows [end - begin] of the endless order: every epoch shuffled anew.

  Row numbers increase from epoch to epoch, which moves the cuts between rows: see
  `PackedRows`. The order within an epoch equals the order of grain's
  `MapDataset.range(num_rows).seed(seed).shuffle().repeat()`. That takes several times
  as long, because four Python objects handle every row.
  """
  (first_seed,) = np.random.SeedSequence((seed, 1)).generate_state(1).tolist()
  numbers = []
  for place in range(begin, end):
    epoch, index = divmod(place, num_rows)
    epoch_seed = (first_seed + epoch) % 2**32
    shuffled = index_shuffle(
      index, max_index=num_rows - 1, seed=epoch_seed, rounds=4
    )
    numbers.append(epoch * num_rows + shuffled)
  return np.array(numbers)


def token_counts(
  rows: Any, vocab_size: int, most: int = 10**7
) -> np.ndarray:
  """Returns counts_V: how often each token occurs in `most` tokens, shuffled.

  Counts one epoch at most, and one row at least.
  """
  counts_V = np.zeros(vocab_size, np.int64)
  numbers = rows.order(0, 0, min(len(rows), max(1, most // rows.seq_len)))
  for group in np.array_split(numbers, -(-len(numbers) // _GROUP_ROWS)):
    batch = rows.read(group)
    counts_V += np.bincount(batch.tokens[batch.segment_ids > 0], minlength=vocab_size)
  return counts_V


def eval_batches(
  store: TokenStore,
  documents: np.ndarray,
  *,
  seq_len: int,
  num_extra: int,
  num_rows: int,
  rows_per_document: int,
  batch_size: int,
) -> Iterator[tuple[Batch, np.ndarray]]:
  """Yields `(Batch, document_B)`: held-out documents, each on rows of its own.

  Documents are read in the given order, at most `rows_per_document` consecutive rows of
  each, until there are `num_rows` rows. A row holds one document as segment 1 and is
  padded with segment 0; the tokens after the row are from the same document.
  `document_B` [B] int32 holds indices into `documents`, -1 for the empty rows that fill
  up the last batch. Every row has at least one token to predict.
  """
  rows: list[Batch] = []
  owners: list[int] = []
  for owner, begin in _eval_positions(
    store, documents, seq_len, num_rows, rows_per_document
  ):
    document = int(documents[owner])
    end = min(begin + seq_len + num_extra, int(store.lengths_N[document]))
    tokens = store.read(document, begin, end)
    rows.append(_one_row(tokens, seq_len, num_extra, store.has_unscored))
    owners.append(owner)
    if len(rows) == batch_size:
      yield stack_rows(rows), np.array(owners, np.int32)
      rows, owners = [], []
  # The last batch is filled up, so that all batches have one shape and one program.
  if rows:
    missing = batch_size - len(rows)
    empty = np.zeros(0, np.int32)
    rows += [_one_row(empty, seq_len, num_extra, store.has_unscored)] * missing
    yield stack_rows(rows), np.array(owners + [-1] * missing, np.int32)


def _eval_positions(
  store: TokenStore,
  documents: np.ndarray,
  seq_len: int,
  num_rows: int,
  rows_per_document: int,
) -> Iterator[tuple[int, int]]:
  """Yields (index into documents, first token) of each evaluation row."""
  count = 0
  for owner, document in enumerate(documents):
    # No row begins with the last token: nothing follows it that could be predicted.
    begins = range(0, int(store.lengths_N[document]) - 1, seq_len)
    for begin in begins[:rows_per_document]:
      if count == num_rows:
        return
      yield owner, begin
      count += 1


def _one_row(
  tokens: np.ndarray, seq_len: int, num_extra: int, has_unscored: bool
) -> Batch:
  T = seq_len
  padded, segments, positions = np.zeros((3, T + num_extra), np.int32)
  padded[: len(tokens)] = token_ids(tokens)
  segments[: len(tokens)] = 1
  positions[: len(tokens)] = np.arange(len(tokens))
  fields = [padded[:T], segments[:T], positions[:T], padded[T:], segments[T:]]
  if has_unscored:
    scored = np.pad(tokens >= 0, (0, T + num_extra - len(tokens)))
    fields += [scored[:T], scored[T:]]
  return Batch(*fields)


def stack_rows(rows: Sequence[Batch]) -> Batch:
  """Returns rows without a leading axis as one Batch [B, ...]."""
  return map_fields(np.stack, *rows)


def map_fields(function: Callable[..., np.ndarray], *rows: Batch) -> Batch:
  """Returns a Batch of `function` of each field's values; None stays None."""
  fields = zip(*rows, strict=True)
  return Batch(*(None if x[0] is None else function(x) for x in fields))
