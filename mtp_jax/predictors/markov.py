"""The Markov head of DSpark: heads that see the token before the one they predict.

arXiv 2607.05147, the variant without a gate. With `mtp.markov_rank` R head m >= 1 adds
to the logits of token i + 1 + m the row of token i + m of a table [V, V] = previous
[V, R] @ next [R, V], which all these heads share. So a draft depends on the one before
it. In training token i + m is the true one. The sum is one product, `[h; previous[t]]
@ [unembed; next]`: what leaves the module is the vector on the left, and the loss reads
the matrix on the right (`lm.unembeddings`). `next` is 0 at the start, so that training
begins as without the table. The next-token head adds nothing: it has read its last
token.

Legend: B batch, T sequence, D embed, V vocab, M = 1 + depth, R rank of the table.
"""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import Config, MtpConfig
from mtp_jax.model.layers import fan_in_normal, look_up, partitioned
from mtp_jax.predictors.drafting import Choice, Choose, Window, take_rows
from mtp_jax.predictors.interface import Given
from mtp_jax.predictors.weights import Weights, unembed


def with_previous(
  module: nn.Module, rank: int, given: Given, hidden_MBTD: jax.Array
) -> jax.Array:
  """Returns states [M, B, T, D + R]; the zeros at the end of depth 0 are not read.

  Call it in the module's `__call__`: the table becomes the module's. Without a rank
  there is none, and the states are returned as they are.
  """
  if not rank:
    return hidden_MBTD
  vocab = given.unembed_DV.shape[1]
  previous_VR = module.param(
    "markov_previous",
    partitioned(fan_in_normal(rank), "vocab", "rank"),
    (vocab, rank),
  ).astype(hidden_MBTD.dtype)
  # The loss reads it from the tree.
  zeros = partitioned(nn.initializers.zeros, "rank", "vocab")
  module.param("markov_next", zeros, (rank, vocab))
  rows = [
    look_up(previous_VR, given.ahead(m), "vocab") for m in range(1, len(hidden_MBTD))
  ]
  rows_MBTR = jnp.stack([jnp.zeros_like(rows[0]), *rows])
  return jnp.concatenate([hidden_MBTD, rows_MBTR], axis=-1)


def draft(
  weights: Weights,
  heads: Iterable[tuple[jax.Array, jax.Array | None]],
  window: Window,
  choose: Choose,
) -> list[Choice]:
  """Returns the drafts of heads of `(state_BD, previous_VR)`, one after the other.

  previous_VR: the rows of the table, None without one; then no head waits for another.
  """
  token_B = take_rows(window.tokens_BS, window.length_B - 1)
  drafts: list[Choice] = []
  for k, (hidden_BD, previous_VR) in enumerate(heads, start=1):
    if previous_VR is not None:
      hidden_BD = jnp.concatenate([hidden_BD, previous_VR[token_B]], axis=-1)
    drafts.append(choose(unembed(weights, hidden_BD, depth=k), k))
    token_B = drafts[-1].token_B
  return drafts


def reads_ahead(mtp: MtpConfig, m: int) -> int:
  """Returns how many tokens after position i depth m reads there."""
  return m if mtp.markov_rank else 0


def flops(config: Config) -> float:
  """Returns the forward FLOPs per token of the rows times the table's other factor."""
  mtp = config.mtp
  return 2.0 * mtp.depth * mtp.markov_rank * config.tokenizer.vocab_size


def contract(mtp: MtpConfig) -> dict[str, Any]:
  """Returns the entry of a contract, if there is a table."""
  if not mtp.markov_rank:
    return {}
  rows = "markov_previous[token i + m] @ markov_next"
  return {"added_logits": f"{rows}, for depth m of at least 1"}
