"""Sequential modules (DeepSeek-V3, section 2.2): the complete causal chain.

Legend: B batch, T sequence, D embed, M = 1 + depth, W rows of the window, K drafts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import PUBLISHED_MODULES, Config, MtpConfig, TrunkConfig
from mtp_jax.kernels.dense import dense
from mtp_jax.model.block import Block, Cache, rematted
from mtp_jax.model.cache_slots import Positions
from mtp_jax.model.layers import compute_dtype, fan_in_normal, make_norm, partitioned
from mtp_jax.model.moe import Routing
from mtp_jax.predictors.drafting import (
  Choose,
  Drafter,
  Recursion,
  Window,
  take_rows,
  take_tokens,
)
from mtp_jax.predictors.interface import Given, Kind
from mtp_jax.predictors.weights import (
  Weights,
  embed,
  empty_caches,
  final_norm,
  layers,
  unembed,
)
from mtp_jax.sharding import constrain

# What sequential modules pass on: the next one's state, and the last one's output where
# own tokens are chosen from it.
Carry = tuple[jax.Array, jax.Array | None]


class SequentialModule(nn.Module):
  """One module of the causal chain, DeepSeek-V3 equations 21 and 22.

  `out_norm` and `norm`: see `config.MtpConfig`.
  """

  trunk: TrunkConfig
  out_norm: str
  norm: str

  @nn.compact
  def __call__(
    self,
    hidden_BTD: jax.Array,
    embedding_BTD: jax.Array | None,
    positions_BT: Positions,
    segment_ids_BT: jax.Array,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, Cache | None, Routing | None]:
    """Returns this depth's state from the one given, cache and routing.

    Without an embedding there are zeros in the place of its normed form.
    """
    dim, dtype = self.trunk.embed_dim, compute_dtype(self.trunk)
    hidden_BTD = make_norm(self.trunk, "hidden_norm", self.norm)(hidden_BTD)
    no_embedding_BTD = jnp.zeros_like(hidden_BTD)
    # The norm has parameters in any case, and a layer norm makes its bias of zeros.
    embedded_BTD = make_norm(self.trunk, "embed_norm", self.norm)(
      no_embedding_BTD if embedding_BTD is None else embedding_BTD
    )
    if embedding_BTD is None:
      embedded_BTD = no_embedding_BTD
    joined = jnp.concatenate([hidden_BTD, embedded_BTD], axis=-1)
    projection = self.param(
      "projection",
      partitioned(fan_in_normal(2 * dim), "concat", "embed"),
      (2 * dim, dim),
    )
    x_BTD = dense(joined, projection.astype(dtype))
    block = Block(self.trunk, name="block")
    x_BTD, cache, routing = block(x_BTD, positions_BT, segment_ids_BT, cache)
    if self.out_norm == "own":
      x_BTD = make_norm(self.trunk, "out_norm", self.norm)(x_BTD)
    return x_BTD, cache, routing


class SequentialModules(nn.Module):
  """The complete causal chain of D modules (DeepSeek-V3, section 2.2), and relatives.

  `h_k = out_norm(Block_k(W_k [norm(h_{k-1}); norm(Emb(t_{i+k}))]))` with h_0 the
  trunk's normed state. Gradients flow through the whole chain. With `share_modules` one
  module serves every depth.

  Other inputs than the published ones, by key of `mtp`:

  - `hidden`: what stands for h_{k-1} at position i. `trunk` is h_0[i] for every k.
    `trunk_shifted` is h_0[i + k - 1], which has seen all that t_{i+k} follows, as the
    teacher-forced features of EAGLE (Li et al. 2024, arXiv 2401.15077) have. The row
    ends at T - 1, and j places after its end h_j[T - 1] stands in, which fed with true
    tokens has seen as many. So at the end of a row, and there alone, training computes
    what drafting always does: the trunk has not run on what is drafted. Only
    positions whose target lies in the next document read a state of that document.
  - `hidden_norm`: h_0 as the modules get it; depth 0 is always the normed state.
  - `fed`: `own` embeds the arg max of depth k - 1 at i instead of t_{i+k}, and `none`
    has zeros for its normed embedding.

  And other norms: with `out_norm` `none` h_k is the output of the block, and with
  `norm` `rms` the norms in the equation are RMSNorm on a trunk with layer norms too.
  """

  trunk: TrunkConfig
  mtp: MtpConfig

  @nn.compact
  def __call__(self, given: Given) -> tuple[jax.Array, Routing | None]:
    mtp, depth = self.mtp, self.mtp.depth
    normed_BTD = given.final_norm(given.residual_BTD)
    if depth == 0:
      return normed_BTD[None], None
    ahead_kBTD = None
    if mtp.fed == "true":
      ahead_kBTD = jnp.stack([given.embed_ahead(k) for k in range(1, 1 + depth)])

    def step(module: nn.Module, carry: Carry, embedding_BTD: jax.Array | None):
      from_BTD, last_BTD = carry
      if mtp.fed == "own":
        embedding_BTD = given.embed_own(last_BTD)
      if embedding_BTD is not None:
        embedding_BTD = constrain(embedding_BTD, "batch", "seq", "act_embed")
      h_BTD, _, routing = module(
        from_BTD, embedding_BTD, given.positions_BT, given.segment_ids_BT
      )
      return following(from_BTD, h_BTD), (h_BTD, routing)

    def following(from_BTD: jax.Array, h_BTD: jax.Array) -> Carry:
      last_BTD = h_BTD if mtp.fed == "own" else None
      if mtp.hidden == "chained":
        return h_BTD, last_BTD
      if mtp.hidden == "trunk":
        return from_BTD, last_BTD
      shifted_BTD = jnp.concatenate([from_BTD[:, 1:], h_BTD[:, -1:]], axis=1)
      return constrain(shifted_BTD, "batch", "seq", "act_embed"), last_BTD

    first_BTD = normed_BTD if mtp.hidden_norm == "after" else given.residual_BTD
    shared, trunk = mtp.share_modules, self.trunk
    _, (chain, routing) = nn.scan(
      step,
      variable_broadcast="params" if shared else False,
      variable_axes={} if shared else {"params": 0},
      split_rngs={"params": not shared},
      length=depth,
      unroll=1 if self.trunk.loops else depth,
      metadata_params={nn.PARTITION_NAME: "depths"},
    )(
      rematted(SequentialModule, trunk)(
        trunk, mtp.out_norm, mtp.norm, name="modules"
      ),
      (first_BTD, normed_BTD if mtp.fed == "own" else None),
      ahead_kBTD,
    )
    return jnp.concatenate([normed_BTD[None], chain]), routing


def _flops(config: Config) -> float:
  """The projections of the modules, from twice the width."""
  return 2.0 * config.mtp.depth * 2 * config.trunk.embed_dim**2


def _contract(mtp: MtpConfig, tapped: tuple[int, ...]) -> dict[str, Any]:
  del tapped
  has_norm = mtp.out_norm == "own"
  further = {
    "chained": f"the {'normed ' if has_norm else ''}output of module k - 1",
    "trunk": "the same",
    "trunk_shifted": "the same, k - 1 positions on",
  }[mtp.hidden]
  return {
    "hidden_source": f"depth 1: trunk output {mtp.hidden_norm} its final norm; depth "
    f"k: {further}",
    "embedding_source": {
      "true": "token i + k", "none": None, "own": "arg max of depth k - 1"
    }[mtp.fed],
    "output_norm": "own norm per module" if has_norm else None,
    "module_norms": {"rms": "RMSNorm", "trunk": "as in the trunk"}[mtp.norm],
    "concat_order": ["hidden", "embedding"],
  }


class _Rows(NamedTuple):
  """The rows that a module runs on: their states, positions, and the last real one."""

  given_BWD: jax.Array
  position_BW: jax.Array
  last_B: jax.Array


@functools.cache
def _chain(
  module: SequentialModule,
  depth: int,
  num_drafts: int,
  hidden: str,
  hidden_norm: str,
  fed: str,
) -> Drafter:
  """The causal chain in decoding: module k reads the token k places after each row.

  That token is committed or drafted, so that the last k - 1 rows of module k hold
  drafts. They run again in the next round, with the tokens that were committed then:
  `_with_edge` and `_shifted` choose the rows. Past the last module, the last one runs
  on its own output (`_beyond`).

  `hidden`, `hidden_norm` and `fed`: see `config.MtpConfig`. At the newest position each
  module reads the state that it reads in training at the end of a row.

  With `fed` "own" the tokens are the committed and drafted ones too. In the newest row
  of a greedy generation these are the modules' own choices, as in training: the newest
  committed token is the arg max of the main head, and draft k - 1 of module k - 1.
  Earlier rows differ from training where a committed token (of a prompt, or in place of
  a rejected draft) was not predicted, and so does the newest row where tokens are
  sampled. The drafts are then worse; the text is the same.
  """
  chained, trunk = min(num_drafts, depth), module.trunk

  def init(rows: int, slots: int):
    # One state before the first row of every module but the first, see `_with_edge`.
    edge_BD = jnp.zeros((rows, trunk.embed_dim), compute_dtype(trunk))
    caches = empty_caches(trunk, chained, rows, slots)
    return caches, (edge_BD,) * (0 if hidden == "trunk_shifted" else chained - 1)

  def run(weights: Weights, k: int, cache, rows: _Rows, tokens_BS: jax.Array):
    """Runs module k >= 1."""
    number = min(k, len(weights.predictors)) - 1  # One serves all depths if shared.
    ahead_BW = rows.position_BW + k
    return _apply(
      module, fed, weights, number, cache, rows.given_BWD,
      lambda: take_tokens(tokens_BS, ahead_BW), rows.position_BW,
    )

  def catch_up(weights: Weights, cache, window: Window):
    # Module 1 reads committed tokens only: its rows are final.
    (first, *caches), edges = cache
    given_BWD = _given(hidden_norm, trunk, weights, window)
    rows = _Rows(given_BWD, window.position_BW, window.last_B)
    hidden_BWD, first = run(weights, 1, first, rows, window.tokens_BS)
    return ((first, *caches), edges), (rows, hidden_BWD)

  def propose(weights: Weights, cache, carry, window: Window, choose: Choose):
    caches, edges = map(list, cache)
    rows, hidden_BWD = carry
    tokens_BS, sequence_B = window.tokens_BS, jnp.arange(len(window.length_B))
    states, drafts = [], []  # states: that each draft was read from, [B, D].
    for k in range(1, 1 + num_drafts):
      if k > depth:
        # From the state that has read as many tokens as the one in training.
        num_read = k - depth if hidden == "trunk" else k - 1
        rows = _beyond(k - depth, states[num_read - 1], window)
      elif k > 1 and hidden == "trunk_shifted":
        rows = _shifted(rows, states[-1], window)
      elif k > 1:
        source_BWD = hidden_BWD if hidden == "chained" else rows.given_BWD
        rows, edges[k - 2] = _with_edge(rows, source_BWD, edges[k - 2], k, window)
      if k > 1:
        number = min(k, depth)
        hidden_BWD, caches[number - 1] = run(
          weights, number, caches[number - 1], rows, tokens_BS
        )
      states.append(take_rows(hidden_BWD, rows.last_B))
      drafts.append(choose(unembed(weights, states[-1]), k))
      # The next module reads this draft where the token will stand that it predicts.
      slot_B = window.length_B + k - 1
      tokens_BS = tokens_BS.at[sequence_B, slot_B].set(drafts[-1].token_B, mode="drop")
    return (tuple(caches), tuple(edges)), drafts

  return Drafter(num_drafts, True, init, catch_up, propose, feeds_choices=fed != "none")


def _with_edge(
  rows: _Rows, source_BWD: jax.Array, edge_BD: jax.Array, k: int, window: Window
) -> tuple[_Rows, jax.Array]:
  """Returns the rows of module k, which begin one before module k - 1's, and an edge.

  In the round before, the newest row of module k read a draft. That row runs again,
  from the state that it was given then, which was final already: `edge_BD`. The edge of
  the next round is `source_BWD` at the last row whose state is final in this round.
  """
  slots = window.tokens_BS.shape[1]
  has_new_B1 = (window.last_B >= 0)[:, None]
  final_BD = take_rows(source_BWD, window.last_B)
  next_BD = jnp.where(has_new_B1, final_BD, edge_BD)
  before_B = window.start_B - (k - 1)
  before_B = jnp.where(before_B >= 0, before_B, slots)  # No row before the first.
  return _Rows(
    jnp.concatenate([edge_BD[:, None], source_BWD], axis=1),
    jnp.concatenate([before_B[:, None], rows.position_BW], axis=1),
    rows.last_B + 1,
  ), next_BD


def _shifted(rows: _Rows, state_BD: jax.Array, window: Window) -> _Rows:
  """Returns the rows of the next module with `hidden` "trunk_shifted".

  The features of the window belong to positions one earlier for each module. At the
  newest position the trunk has no state yet: the draft before lends its state.
  """
  slots, newest_B1 = window.tokens_BS.shape[1], window.length_B[:, None] - 2
  before_BW = jnp.where(rows.position_BW < slots, rows.position_BW - 1, slots)
  before_BW = jnp.where(before_BW >= 0, before_BW, slots)
  given_BWD = jnp.concatenate([rows.given_BWD, state_BD[:, None]], axis=1)
  position_BW = jnp.concatenate([before_BW, newest_B1], axis=1)
  last_B = jnp.full_like(rows.last_B, given_BWD.shape[1] - 1)
  return _Rows(given_BWD, position_BW, last_B)


def _beyond(steps: int, state_BD: jax.Array, window: Window) -> _Rows:
  """Returns the row of the last module `steps` positions after the newest one.

  The next round writes this row anew.
  """
  position_B1 = window.length_B[:, None] - 2 + steps
  return _Rows(state_BD[:, None], position_B1, jnp.zeros_like(window.last_B))


@functools.cache
def _recursion(module: SequentialModule, hidden_norm: str, fed: str) -> Recursion:
  """One module that starts from the trunk's features, and then from its own output.

  Row i has read token i + 1. This is what depth 1 is trained on, and the same as
  `_chain` with more drafts than depths at D = 1.
  """
  trunk = module.trunk

  def init(rows: int, slots: int):
    return empty_caches(trunk, 1, rows, slots)[0]

  def step(weights: Weights, cache, given_BWD, token_BW, places):
    hidden_BWD, cache = _apply(
      module, fed, weights, 0, cache, given_BWD, lambda: token_BW, places
    )
    return cache, hidden_BWD

  def catch_up(weights: Weights, cache, window: Window):
    given_BWD = _given(hidden_norm, trunk, weights, window)
    token_BW = take_tokens(window.tokens_BS, window.position_BW + 1)
    cache, hidden_BWD = step(weights, cache, given_BWD, token_BW, window.position_BW)
    return cache, take_rows(hidden_BWD, window.last_B)

  return Recursion(init, catch_up, step, unembed)


def _given(
  hidden_norm: str, trunk: TrunkConfig, weights: Weights, window: Window
) -> jax.Array:
  """Returns the trunk's states of a window as module 1 reads them."""
  if hidden_norm == "before":
    return window.feature_BWD
  return final_norm(trunk, weights, window.feature_BWD)


def _apply(
  module: SequentialModule,
  fed: str,
  weights: Weights,
  number: int,
  cache: Cache,
  given_BWD: jax.Array,
  tokens: Callable[[], jax.Array],
  places: Positions,
) -> tuple[jax.Array, Cache]:
  """Returns `(hidden_BWD, cache)` of one module, fed with `tokens()` if with any."""
  embedding_BWD = None if fed == "none" else embed(weights, tokens())
  no_segments = jnp.zeros(given_BWD.shape[:2], jnp.int32)  # A document per sequence.
  hidden_BWD, cache, _ = module.apply(
    {"params": weights.predictors[number]},
    given_BWD, embedding_BWD, places, no_segments, cache,
  )
  return hidden_BWD, cache


def _drafter(trunk: TrunkConfig, mtp: MtpConfig, num_drafts: int) -> Drafter:
  module = SequentialModule(trunk, mtp.out_norm, mtp.norm)
  return _chain(module, mtp.depth, num_drafts, mtp.hidden, mtp.hidden_norm, mtp.fed)


def _own_recursion(trunk: TrunkConfig, mtp: MtpConfig) -> Recursion | None:
  if mtp.depth != 1 and not (mtp.depth and mtp.share_modules):
    return None
  module = SequentialModule(trunk, mtp.out_norm, mtp.norm)
  return _recursion(module, mtp.hidden_norm, mtp.fed)


SEQUENTIAL = Kind(
  module=SequentialModules,
  reads=("share_modules", "dense_blocks", "mlp_dim", *PUBLISHED_MODULES),
  is_autoregressive=True,
  reads_ahead=lambda mtp, m: m,
  blocks=lambda mtp: mtp.depth,
  added_layers=lambda mtp: 1 if mtp.share_modules else mtp.depth,
  flops=_flops,
  contract=_contract,
  unstack=lambda params, mtp: [params["modules"]] if mtp.share_modules else layers(
    params["modules"], mtp.depth
  ),
  drafter=_drafter,
  recursion=_own_recursion,
)
