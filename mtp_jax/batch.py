"""`Batch`: the packed rows that data, model and losses share.

Legend: B batch, T sequence, M = 1 + mtp.depth.
"""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
  """Packed rows, and the M tokens after each row, so that no target is lost.

  tokens:           [B, T] int32.
  segment_ids:      [B, T] int32; 0 is padding, 1, 2, ... the document within the row.
  positions:        [B, T] int32; restarts at 0 with every document (and every row).
  next_tokens:      [B, M] int32; the M tokens of the stream after the row.
  next_segment_ids: [B, M] int32; documents of `next_tokens`, numbered as in the row.
  scored:           [B, T] bool; false where a token is never a target, such as the
                    prompt of a task. None: every token can be a target.
  next_scored:      [B, M] bool; `scored` for `next_tokens`.
  """

  tokens: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray
  next_tokens: np.ndarray
  next_segment_ids: np.ndarray
  scored: np.ndarray | None = None
  next_scored: np.ndarray | None = None

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns the fields that are not None, by name."""
    return {name: x for name, x in self._asdict().items() if x is not None}
