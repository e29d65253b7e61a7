"""Mixtures: rows of several sources, interleaved by weight (`data.source` mixture).

`data.path` names the parts, each with its weight, source and path:

  0.7 jsonl code/*.jsonl; 0.2 array_record prepared/web; 0.1 stdlib

A weight is the share of the part's rows in training. Every part repeats for ever, in an
order of its own that starts anew with each of its epochs. All parts have held-out
texts. Legend: B rows of a batch, C parts, N documents.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import grain
import numpy as np

from mtp_jax.batch import Batch
from mtp_jax.config import DataConfig
from mtp_jax.data import packing
from mtp_jax.sections import TEXTS

# Rows of a part in the endless order of all; more than any run reads.
_ENDLESS = 1 << 48


class Part(NamedTuple):
  """One source of a mixture; `data` is the section of the mixture with its source."""

  weight: float
  data: DataConfig


def parts(data: DataConfig) -> list[Part]:
  """Returns the parts of a mixture; another source is one part.

  Raises:
    ValueError: states the rule that `data.path` breaks.
  """
  if data.source != "mixture":
    return [Part(1.0, data)]
  found = []
  for text in data.path.rstrip().removesuffix(";").split(";"):
    weight, source, path = (*text.split(maxsplit=2), "", "", "")[:3]
    try:
      share = float(weight)
    except ValueError:
      share = math.nan
    if not 0 < share < math.inf or source not in TEXTS or source == "mixture":
      raise ValueError(
        "parts divided by ';', each of a positive weight, a data.source of text and "
        f"its data.path, as '0.7 jsonl a.jsonl; 0.3 stdlib' ({text.strip()!r} is none)"
      )
    found.append(Part(share, replace(data, source=source, path=path.strip())))
  return found


class MixedStore:
  """`packing.TokenStore` of the documents of several stores, one after the other."""

  def __init__(
    self,
    stores: Sequence[packing.TokenStore],
    identity: dict[str, str | int | float],
  ):
    self.stores, self.identity = stores, identity
    self.has_unscored = any(store.has_unscored for store in stores)
    self.lengths_N = np.concatenate([store.lengths_N for store in stores])
    self.hashes_NX = np.concatenate([store.hashes_NX for store in stores])
    sizes_C = np.array([len(store.lengths_N) for store in stores])
    self._first_C = np.cumsum(sizes_C) - sizes_C

  def read(self, document: int, begin: int, end: int) -> np.ndarray:
    part = int(np.searchsorted(self._first_C, document, side="right")) - 1
    return self.stores[part].read(document - int(self._first_C[part]), begin, end)


class MixedRows:
  """Rows of several `packing.PackedRows`, with the same interface.

  Row number C * r + c is row r of part c.
  """

  def __init__(
    self,
    rows: Sequence[packing.PackedRows],
    weights: Sequence[float],
    store: MixedStore,
  ):
    self.store, self._rows, self._weights = store, rows, tuple(weights)
    self.seq_len = rows[0].seq_len
    for part in rows:  # Batches of one run have the same fields.
      part.has_unscored = store.has_unscored
    self.num_tokens = sum(x.num_tokens for x in rows)

  @property
  def most_documents(self) -> int:
    """The most documents of a row."""
    return max(x.most_documents for x in self._rows)

  def __len__(self) -> int:
    return sum(map(len, self._rows))

  def order(self, seed: int, begin: int, end: int) -> np.ndarray:
    """Returns row numbers [end - begin] of the endless order."""
    chosen = [_interleaved(self._weights)[place] for place in range(begin, end)]
    part_B, place_B = np.divmod(np.array(chosen, np.int64), _ENDLESS)
    numbers_B = np.zeros_like(part_B)
    for part in np.unique(part_B):
      at = np.flatnonzero(part_B == part)
      first, last = place_B[at[0]], place_B[at[-1]]  # Places of a part are consecutive.
      rows = self._rows[part].order(seed, int(first), int(last) + 1)
      numbers_B[at] = len(self._rows) * rows + part
    return numbers_B

  def read(self, rows_B: np.ndarray) -> Batch:
    row_B, part_B = np.divmod(rows_B, len(self._rows))
    batches = [
      self._rows[part].read(row_B[part_B == part]) for part in np.unique(part_B)
    ]
    # Rows stand part by part; the inverse of the sort returns each to its place.
    at_B = np.argsort(np.argsort(part_B, kind="stable"))
    return packing.map_fields(lambda x: np.concatenate(x)[at_B], *batches)


@functools.cache
def _interleaved(weights: tuple[float, ...]) -> grain.MapDataset:
  """Returns at place p the part c and the place i in it, as c * _ENDLESS + i."""
  places = [
    grain.MapDataset.range(c * _ENDLESS, (1 + c) * _ENDLESS)
    for c in range(len(weights))
  ]
  return grain.MapDataset.mix(places, weights)
