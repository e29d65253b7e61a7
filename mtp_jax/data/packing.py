"""Documents to rows: an endless stream cut into rows, without padding or loss.

Pure index arithmetic on top of a token store; reading it is the best way to learn what
a `Batch` holds. Legend: N documents, B batch, T sequence, M = 1 + mtp.depth tokens
after the row.

  stream     a0 a1 a2 a3 | b0 b1 b2 b3 | a0 ...     (T = 5, M = 2; a0, b0 = bos)
  row 0      a0 a1 a2 a3 b0 | b1 b2       row 1      b1 b2 b3 a0 a1 | a2 a3
  segment     1  1  1  1  2 |  2  2                   1  1  1  2  2 |  2  2
  position    0  1  2  3  0 |                         0  1  2  0  1 |
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from mtp_jax.batch import Batch


class TokenStore(Protocol):
  """Token ids of documents, each as [bos, tokens..., eos], or a part of that.

  lengths_N: [N] int64, at least 1 each. hashes_NX: [N, 32] uint8 content hashes.
  identity:  what tells corpora apart (JSON values); goes into checkpoints.
  """

  lengths_N: np.ndarray
  hashes_NX: np.ndarray
  identity: dict[str, str | int | float]

  def read(self, document: int, begin: int, end: int) -> np.ndarray:
    """Returns tokens [end - begin] of a document, 0 <= begin <= end <= length."""


class PackedRows:
  """Random access to the rows of the endless stream of a set of documents.

  The documents stand in a given order, and the stream repeats it for ever. Row r is
  `stream[r * T : r * T + T]`, so its tokens do not depend on M, and every token of the
  stream is in exactly one row. One epoch is `len(self)` = floor(stream length / T) rows
  (at least 1); what is left over opens the next epoch, so nothing is ever dropped and
  the cuts fall elsewhere each time. Any index >= 0 can be read; iteration yields one
  epoch.

  Segment ids number the documents of a row from 1 and go on into the tokens after it.
  Positions restart with each document and with each row.
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
    if row < 0:
      raise IndexError(f"row must be at least 0, got {row}.")
    T, M = self.seq_len, self.num_extra
    begin = row * T
    tokens, segments, positions = np.zeros((3, T + M), np.int32)
    epoch, offset = divmod(begin, self.num_tokens)
    document = int(np.searchsorted(self._starts, offset, side="right")) - 1
    start = epoch * self.num_tokens + int(self._starts[document])
    at, segment = begin, 1
    while at < begin + T + M:
      length = int(self._lengths[document])
      stop = min(start + length, begin + T + M)
      here = slice(at - begin, stop - begin)
      tokens[here] = self.store.read(
        int(self._order[document]), at - start, stop - start
      )
      segments[here] = segment
      positions[here] = np.arange(stop - at)
      start += length
      at, segment = stop, segment + 1
      document = (document + 1) % len(self._order)
    return Batch(tokens[:T], segments[:T], positions[:T], tokens[T:], segments[T:])


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

  Documents come in the given order, at most `rows_per_document` consecutive rows of
  each, until there are `num_rows`. A row holds one document as segment 1 and is padded
  with segment 0; the tokens after it are the document's own. `document_B` [B] int32 is
  the index into `documents`, -1 for the empty rows that fill up the last batch. A row
  begins only where there is something left to predict.
  """
  rows: list[Batch] = []
  owners: list[int] = []
  for owner, begin in _eval_positions(
    store, documents, seq_len, num_rows, rows_per_document
  ):
    document = int(documents[owner])
    end = min(begin + seq_len + num_extra, int(store.lengths_N[document]))
    rows.append(_one_row(store.read(document, begin, end), seq_len, num_extra))
    owners.append(owner)
    if len(rows) == batch_size:
      yield stack_rows(rows), np.array(owners, np.int32)
      rows, owners = [], []
  if rows:
    missing = batch_size - len(rows)
    rows += [_one_row(np.zeros(0, np.int32), seq_len, num_extra)] * missing
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
    # The last token is only ever a target: no row needs to begin with it.
    begins = range(0, int(store.lengths_N[document]) - 1, seq_len)
    for begin in begins[:rows_per_document]:
      if count == num_rows:
        return
      yield owner, begin
      count += 1


def _one_row(tokens: np.ndarray, seq_len: int, num_extra: int) -> Batch:
  T = seq_len
  padded, segments, positions = np.zeros((3, T + num_extra), np.int32)
  padded[: len(tokens)] = tokens
  segments[: len(tokens)] = 1
  positions[: len(tokens)] = np.arange(len(tokens))
  return Batch(padded[:T], segments[:T], positions[:T], padded[T:], segments[T:])


def stack_rows(rows: Sequence[Batch]) -> Batch:
  """Returns rows without a leading axis as one Batch [B, ...]."""
  return map_fields(np.stack, *rows)


def map_fields(function: Callable[..., np.ndarray], *rows: Batch) -> Batch:
  """Returns a Batch of `function` of each field's values; None stays None."""
  fields = zip(*rows, strict=True)
  return Batch(*(None if x[0] is None else function(x) for x in fields))
