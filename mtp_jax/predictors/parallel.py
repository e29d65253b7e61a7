"""Parallel heads (Gloeckle et al. 2024): one transformer layer a token.

With `mtp.markov_rank` R they have the Markov head of DSpark (arXiv 2607.05147, the
variant without a gate): head m >= 1 adds to the logits of token i + 1 + m the row of
token i + m of a table [V, V] = previous [V, R] @ next [R, V], which all these heads
share. So a draft depends on the one before it. In training token i + m is the true one.
The sum is one product, `[h; previous[t]] @ [unembed; next]`: what leaves the module is
the vector on the left, and the loss reads the matrix on the right (`lm.unembeddings`).
`next` is 0 at the start, so that training begins as without the table. The next-token
head adds nothing: it has read its last token.

Legend: B batch, T sequence, D embed, M = 1 + depth, W rows of the window, K drafts,
R rank of the table.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import Config, MtpConfig, TrunkConfig
from mtp_jax.model.block import Block, rematted
from mtp_jax.model.layers import fan_in_normal, look_up, partitioned
from mtp_jax.model.moe import Routing
from mtp_jax.predictors.drafting import Choose, Drafter, Window, take_rows
from mtp_jax.predictors.interface import Given, Kind
from mtp_jax.predictors.weights import (
  Weights,
  empty_caches,
  final_norm,
  layers,
  run_block,
  unembed,
)


class ParallelHeads(nn.Module):
  """n = D + 1 heads, each one transformer layer on the same trunk state.

  Gloeckle et al. 2024, section 2. The next-token head is the first of the n and has its
  own layer. All share the final norm and the unembedding, so that with D = 0 trunk and
  head together are the plain model with one more trunk layer.
  """

  trunk: TrunkConfig
  mtp: MtpConfig

  @nn.compact
  def __call__(self, given: Given) -> tuple[jax.Array, Routing | None]:
    def head(block: nn.Module, x_BTD: jax.Array, _: None):
      head_BTD, _, routing = block(x_BTD, given.positions_BT, given.segment_ids_BT)
      return x_BTD, (head_BTD, routing)

    num_heads = 1 + self.mtp.depth
    _, (heads_MBTD, routing) = nn.scan(
      head,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=num_heads,
      unroll=1 if self.trunk.loops else num_heads,
      metadata_params={nn.PARTITION_NAME: "depths"},
    )(rematted(Block, self.trunk)(self.trunk, name="heads"), given.residual_BTD, None)
    # One head at a time: a leading axis of 1 would sum in another order at D = 0.
    hidden_MBTD = jnp.stack([given.final_norm(head_BTD) for head_BTD in heads_MBTD])
    if self.mtp.markov_rank:
      hidden_MBTD = self._with_previous(given, hidden_MBTD)
    return hidden_MBTD, routing

  def _with_previous(self, given: Given, hidden_MBTD: jax.Array) -> jax.Array:
    """Returns states [M, B, T, D + R]; the zeros at the end of depth 0 are not read."""
    rank, vocab = self.mtp.markov_rank, given.unembed_DV.shape[1]
    previous_VR = self.param(
      "markov_previous",
      partitioned(fan_in_normal(rank), "vocab", "rank"),
      (vocab, rank),
    ).astype(hidden_MBTD.dtype)
    # The loss reads it from the tree.
    zeros = partitioned(nn.initializers.zeros, "rank", "vocab")
    self.param("markov_next", zeros, (rank, vocab))
    rows = [
      look_up(previous_VR, given.ahead(m), "vocab") for m in range(1, len(hidden_MBTD))
    ]
    rows_MBTR = jnp.stack([jnp.zeros_like(rows[0]), *rows])
    return jnp.concatenate([hidden_MBTD, rows_MBTR], axis=-1)


@functools.cache
def _drafter(trunk: TrunkConfig, num_drafts: int, is_markov: bool) -> Drafter:
  """One layer per draft on the trunk's features; its cache never holds a draft."""

  def init(rows: int, slots: int):
    return empty_caches(trunk, num_drafts, rows, slots)

  def catch_up(weights: Weights, caches, window: Window):
    written, last = [], []
    for (head, _), cache in zip(weights.predictors, caches, strict=False):
      x_BWD, cache = run_block(
        trunk, head, window.feature_BWD, window.position_BW, cache
      )
      written.append(cache)
      last.append(take_rows(x_BWD, window.last_B))
    return tuple(written), last

  def propose(weights: Weights, caches, last, window: Window, choose: Choose):
    token_B = take_rows(window.tokens_BS, window.length_B - 1)
    drafts = []
    for k, x_BD in enumerate(last, start=1):
      hidden_BD = final_norm(trunk, weights, x_BD)
      if is_markov:
        _, previous_VR = weights.predictors[k - 1]
        hidden_BD = jnp.concatenate([hidden_BD, previous_VR[token_B]], axis=-1)
      drafts.append(choose(unembed(weights, hidden_BD, depth=1), k))
      token_B = drafts[-1].token_B
    return caches, drafts

  return Drafter(num_drafts, True, init, catch_up, propose, feeds_choices=is_markov)


def _unstack(params: dict[str, Any], mtp: MtpConfig) -> list[Any]:
  """Returns the first head, and of each further one its layer and the table's rows."""
  first, *heads = layers(params["heads"], 1 + mtp.depth)
  return [first, *((head, params.get("markov_previous")) for head in heads)]


def _flops(config: Config) -> float:
  """The product of the rows with the other factor of the table, for every extra head.
  """
  mtp = config.mtp
  return 2.0 * mtp.depth * mtp.markov_rank * config.tokenizer.vocab_size


def _contract(mtp: MtpConfig, tapped: tuple[int, ...]) -> dict[str, Any]:
  del tapped
  found = {
    "hidden_source": "trunk residual stream before the final norm",
    "next_token_head": "first parallel head",
  }
  if mtp.markov_rank:
    found["added_logits"] = (
      "markov_previous[token i + m] @ markov_next, for depth m of at least 1"
    )
  return found


PARALLEL = Kind(
  module=ParallelHeads,
  reads=("markov_rank",),
  deployed_blocks=1,
  blocks=lambda mtp: 1 + mtp.depth,
  added_layers=lambda mtp: mtp.depth,
  flops=_flops,
  unstack=_unstack,
  reads_ahead=lambda mtp, m: m if mtp.markov_rank else 0,
  drafter=lambda trunk, mtp, num_drafts: _drafter(
    trunk, num_drafts, mtp.markov_rank > 0
  ),
  contract=_contract,
)
