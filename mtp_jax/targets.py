"""Future targets and masks: pure index arithmetic, the heart of multi-token prediction.

Depth m = 0..D predicts token i + 1 + m from position i (m = 0 is next-token
prediction). Every offset is taken from the source in one shot. Repeating a one-step
shift of tokens *and* segment ids would compare neighbours instead of the two ends, and
from depth 2 on would score tokens of the next document.

Legend: B batch, T sequence, M = 1 + depth.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.batch import Batch


def shifted_tokens(batch: Batch, offset: int) -> tuple[jax.Array, jax.Array]:
  """Returns `(tokens_BT, segment_ids_BT)`: the token `offset` places after each token.

  `offset` is in [0, M]; the tokens after the row come from `next_tokens`.
  """
  return (
    _shifted(batch.tokens, batch.next_tokens, offset),
    _shifted(batch.segment_ids, batch.next_segment_ids, offset),
  )


def _shifted(
  row_BT: jax.Array | np.ndarray, after_BM: jax.Array | np.ndarray, offset: int
) -> jax.Array:
  """Returns, for each place of the row, the entry `offset` places later."""
  whole = jnp.concatenate([row_BT, after_BM], axis=1)
  return jax.lax.slice_in_dim(whole, offset, offset + row_BT.shape[1], axis=1)


def future_targets(
  batch: Batch, depth: int, score_from: str = "start"
) -> tuple[jax.Array, jax.Array]:
  """Returns `(targets_MBT, mask_MBT)` for M = 1 + depth predictors.

  `mask[m, b, i]` is true where token i + 1 + m exists and belongs to the same document
  as token i, and is scored. Example: two documents a and b, a row of 5 tokens, 2 tokens
  after the row, all scored; a dot is a masked place:

    tokens     a0 a1 a2 b0 b1 | b2 b3
    depth 0    a1 a2  .  b1 b2
    depth 1    a2  .  .  b2 b3

  Args:
    batch: with at least M tokens after each row.
    depth: D extra predictors.
    score_from: "start" scores an extra depth wherever its own target is scored;
      "answer" only where the target of depth 0 is scored too, that is, from the last
      token of a prompt on.

  Raises:
    ValueError: if the batch holds fewer than M tokens after the row.
  """
  if batch.next_tokens.shape[1] < 1 + depth:
    raise ValueError(
      f"batch.next_tokens must hold at least 1 + depth = {1 + depth} tokens after the "
      f"row, got {batch.next_tokens.shape[1]}."
    )
  shifted = [shifted_tokens(batch, 1 + m) for m in range(1 + depth)]
  targets_MBT = jnp.stack([tokens for tokens, _ in shifted])
  mask_MBT = jnp.stack(
    [(ids == batch.segment_ids) & (batch.segment_ids != 0) for _, ids in shifted]
  )
  if batch.scored is not None:
    assert batch.next_scored is not None  # A batch has both or none.
    mask_MBT &= jnp.stack(
      [_shifted(batch.scored, batch.next_scored, 1 + m) for m in range(1 + depth)]
    )
  if score_from == "answer":
    mask_MBT &= mask_MBT[:1]
  return targets_MBT, mask_MBT
