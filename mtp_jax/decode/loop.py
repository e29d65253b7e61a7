"""Self-speculative decoding: draft, verify, commit, in one jitted while loop.

A round runs the target on the newest token and K drafts, keeps the longest prefix of
the drafts that the acceptance rule allows, adds one token of the target's own, and
drafts again from the features that became known. So a round commits 1 to K + 1 tokens.
Rejected tokens leave stale entries in the caches, always at the positions that are
written next, so that no query ever sees them and nothing has to be rolled back. Where
drafts are a tree (`trees`) the path that was accepted is moved to its positions first.

Randomness is a function of (sequence, absolute position, role), see `noise`.

Legend: B batch, S slots, P padded prompt length, R = K + 1 rows of a verification,
K drafts, W window rows, D feature, V vocab; N nodes of a tree, whose depth is K, and
X = N + 1 rows of its verification.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.decode import noise, stops, trees
from mtp_jax.decode.target import Target
from mtp_jax.decode.verify import match_tokens, sample_tokens, verify_sampled
from mtp_jax.decode.warp import Warp, warp
from mtp_jax.kernels.argmax import argmax
from mtp_jax.predictors.drafting import (
  Choice,
  Drafter,
  Nodes,
  Window,
  take_rows,
  tokens_of,
)

# Values of `DecodeState.source_BS` for a committed token; k >= 1: accepted draft k.
PROMPT, CORRECTION, OWN = -2, -1, 0


class Plan(NamedTuple):
  """What a compiled program is for; hashable.

  rule: see `verify.RULES`.
  proposal: how drafts are chosen from a drafter's logits: argmax (q is one-hot), sample
    (from the warped q), or coupled (with the noise of the target's own choice; for rule
    `match` only, whose output does not depend on drafts).
  """

  target: Target
  drafter: Drafter
  rule: str
  proposal: str


class Inputs(NamedTuple):
  """What programs of one `Plan` may differ in without being compiled again.

  stop_SV: see `stops.transitions`; None where no string ends a completion.
  """

  weights: Any
  draft_weights: Any
  warp: Warp | None
  stop_ids: jax.Array
  stop_SV: jax.Array | None = None


class Stats(NamedTuple):
  """Counts per sequence; the prefill's token is not in them.

  rounds: verifications of a sequence that was not done.
  reached: rounds in which draft k could be emitted: those before it were accepted, none
    of them ended the sequence, and the limit left room for it.
  accepted: rounds in which draft k was emitted.
  histogram: rounds by number of drafts emitted.
  """

  rounds_B: jax.Array
  reached_BK: jax.Array
  accepted_BK: jax.Array
  histogram_BR: jax.Array


class DecodeState(NamedTuple):
  """Everything between two rounds.

  tokens_BS, source_BS: the first `length_B` are committed; see `OWN` and its likes.
  limit_B: greatest length. done_B: a stop was committed or the limit reached.
  cache, draft_cache: of target and drafter.
  drafts_BK, log_q_BKV: proposed next; the latter None unless they were sampled.
  nodes: proposed next in their stead where drafts are a tree, else None.
  stop_B: uint8 state of `stops.transitions` after the committed tokens.
  """

  tokens_BS: jax.Array
  source_BS: jax.Array
  length_B: jax.Array
  limit_B: jax.Array
  done_B: jax.Array
  key_B: jax.Array
  cache: Any
  draft_cache: Any
  drafts_BK: jax.Array
  log_q_BKV: jax.Array | None
  nodes: Nodes | None
  stats: Stats
  stop_B: jax.Array


def slots_for(limit: int, num_drafted: int) -> int:
  """Returns the slots a sequence of at most `limit` tokens needs: drafts overrun it.

  `num_drafted` is `Drafter.num_drafted`: all nodes of a tree have slots.
  """
  return limit + num_drafted


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(
  plan: Plan,
  prompt_slots: int,
  inputs: Inputs,
  tokens_BS: jax.Array,
  prompt_length_B: jax.Array,
  limit_B: jax.Array,
  seed: jax.Array,
  sequence_B: jax.Array,
) -> DecodeState:
  """Reads the prompts, commits the first new token and drafts what may follow it.

  Args:
    plan, inputs: see there.
    prompt_slots: P; the first P of the S slots hold the prompts, padded on the right.
    tokens_BS: S >= `slots_for(limit, num_drafted)`.
    prompt_length_B: 1 to P each.
    limit_B: more than the prompt each.
    seed, sequence_B: the noise of a sequence depends on the seed and on its number.
  """
  target, drafter = plan.target, plan.drafter
  rows, slots = tokens_BS.shape
  tokens_BP = tokens_BS[:, :prompt_slots]
  positions_BP = jnp.broadcast_to(jnp.arange(prompt_slots), tokens_BP.shape)
  # Pad tokens are cached too, where the real tokens of those positions come later.
  hidden_BPD, feature_BPD, cache = target.forward(
    inputs.weights, tokens_BP, positions_BP, target.init(rows, slots)
  )
  last_B = prompt_length_B - 1
  logits_BV = target.unembed(inputs.weights, take_rows(hidden_BPD, last_B))
  K = drafter.num_drafts
  is_prompt_BS = jnp.arange(slots) < prompt_length_B[:, None]
  counts = lambda *shape: jnp.zeros((rows, *shape), jnp.int32)  # noqa: E731
  state = DecodeState(
    tokens_BS,
    jnp.where(is_prompt_BS, PROMPT, OWN).astype(jnp.int8),
    prompt_length_B,
    limit_B,
    jnp.zeros(rows, bool),
    jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), sequence_B),
    cache,
    drafter.init(rows, slots),
    counts(K),
    None,
    None,
    Stats(counts(), counts(K), counts(K), counts(1 + K)),
    jnp.zeros(rows, jnp.uint8),
  )
  first_B1 = _own_tokens(
    plan, inputs, state, logits_BV[:, None], prompt_length_B[:, None]
  )
  state = _commit(inputs, state, first_B1, counts(), counts())[0]
  return _draft(plan, inputs, state, feature_BPD, counts())


def run_round(plan: Plan, inputs: Inputs, state: DecodeState) -> DecodeState:
  """Verifies the drafts, commits what is accepted and one token more, drafts again."""
  verify = _verify_chain if plan.drafter.num_nodes is None else _verify_tree
  found = verify(plan, inputs, state)
  accepted_B = found.accepted_B
  offsets_R = jnp.arange(1 + plan.drafter.num_drafts)
  emitted_BR = jnp.where(
    offsets_R < accepted_B[:, None],
    jnp.pad(found.drafts_BK, ((0, 0), (0, 1))),
    found.next_B[:, None],
  )
  origin_B = jnp.where(found.has_failed_B, CORRECTION, OWN)
  committed, count_B, before_stop_BR = _commit(
    inputs, state._replace(cache=found.cache), emitted_BR, accepted_B, origin_B
  )
  committed = committed._replace(
    stats=_count(state, accepted_B, count_B, before_stop_BR)
  )
  return _draft(plan, inputs, committed, found.feature_BRD, state.length_B - 1)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def finish(plan: Plan, inputs: Inputs, state: DecodeState) -> DecodeState:
  """Runs rounds until every sequence is done; the state given is used up."""
  return jax.lax.while_loop(
    lambda state: ~jnp.all(state.done_B),
    functools.partial(run_round, plan, inputs),
    state,
  )


# One round of `finish`, for streaming and debugging.
step = jax.jit(run_round, static_argnums=0, donate_argnums=2)


class _Verified(NamedTuple):
  """The drafts after their verification by the target.

  drafts_BK: of a tree, the accepted path; entries past `accepted_B` mean nothing.
  feature_BRD: of the newest token and the drafts; do not read rejected drafts.
  next_B: the target's own token after what is accepted.
  has_failed_B: whether there were drafts for that place.
  cache: the target's, accepted drafts in their slots.
  """

  drafts_BK: jax.Array
  accepted_B: jax.Array
  next_B: jax.Array
  has_failed_B: jax.Array
  feature_BRD: jax.Array
  cache: Any


def _verify_chain(plan: Plan, inputs: Inputs, state: DecodeState) -> _Verified:
  target, n_B = plan.target, state.length_B
  K = plan.drafter.num_drafts
  newest_B1 = take_rows(state.tokens_BS, n_B - 1)[:, None]
  hidden_BRD, feature_BRD, cache = target.forward(
    inputs.weights,
    jnp.concatenate([newest_B1, state.drafts_BK], axis=1),
    n_B[:, None] - 1 + jnp.arange(1 + K),
    state.cache,
  )
  logits_BRV = target.unembed(inputs.weights, hidden_BRD)
  accepted_B, next_B = _judge(plan, inputs, state, logits_BRV)
  return _Verified(
    state.drafts_BK, accepted_B, next_B, accepted_B < K, feature_BRD, cache
  )


def _verify_tree(plan: Plan, inputs: Inputs, state: DecodeState) -> _Verified:
  target, nodes, n_B = plan.target, state.nodes, state.length_B
  K, slots = plan.drafter.num_drafts, state.tokens_BS.shape[1]
  newest_B1 = take_rows(state.tokens_BS, n_B - 1)[:, None]
  token_BX = jnp.concatenate([newest_B1, nodes.token_BN], axis=1)
  sees_BXX = trees.ancestors(nodes.parent_BN, K)
  places = trees.places(sees_BXX, n_B, slots)
  hidden_BXD, feature_BXD, cache = target.forward(
    inputs.weights, token_BX, places, state.cache
  )
  logits_BXV = target.unembed(inputs.weights, hidden_BXD)
  own_BX = _own_tokens(plan, inputs, state, logits_BXV, places.position_BT + 1)
  path_BR, accepted_B = trees.accepted_path(own_BX, nodes, sees_BXX, K)
  first_B1, offsets_R = n_B[:, None] - 1, jnp.arange(1 + K)
  cache = target.move(
    cache,
    first_B1 + path_BR,
    jnp.where(offsets_R <= accepted_B[:, None], first_B1 + offsets_R, slots),
  )
  last_B = take_rows(path_BR, accepted_B)
  return _Verified(
    take_rows(token_BX, path_BR[:, 1:]),
    accepted_B,
    take_rows(own_BX, last_B),
    jnp.any(nodes.parent_BN == last_B[:, None], axis=1),
    take_rows(feature_BXD, path_BR),
    cache,
  )


def _judge(
  plan: Plan, inputs: Inputs, state: DecodeState, logits_BRV: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the number of accepted drafts and the target's own token after them."""
  if plan.rule in ("greedy", "match"):
    position_BR = state.length_B[:, None] + jnp.arange(logits_BRV.shape[1])
    own_BR = _own_tokens(plan, inputs, state, logits_BRV, position_BR)
    return match_tokens(own_BR, state.drafts_BK)
  position_BK = state.length_B[:, None] + jnp.arange(plan.drafter.num_drafts)
  uniform_BK = _noise(plan, state).uniform(position_BK)
  accepted_B, log_weights_BV = verify_sampled(
    plan.rule, warp(logits_BRV, inputs.warp), state.log_q_BKV, state.drafts_BK,
    uniform_BK,
  )
  position_B1 = (state.length_B + accepted_B)[:, None]
  gumbel_B1V = _noise(plan, state).gumbel(
    position_B1, noise.TARGET, log_weights_BV
  )
  return accepted_B, sample_tokens(log_weights_BV, gumbel_B1V[:, 0])


def _own_tokens(
  plan: Plan,
  inputs: Inputs,
  state: DecodeState,
  logits_BRV: jax.Array,
  position_BR: jax.Array,
) -> jax.Array:
  """Returns the target's own tokens for these positions."""
  if plan.rule == "greedy":
    return argmax(logits_BRV)
  log_p_BRV = warp(logits_BRV, inputs.warp)
  gumbel_BRV = _noise(plan, state).gumbel(position_BR, noise.TARGET, log_p_BRV)
  return sample_tokens(log_p_BRV, gumbel_BRV)


def _commit(
  inputs: Inputs,
  state: DecodeState,
  emitted_BR: jax.Array,
  accepted_B: jax.Array,
  origin_B: jax.Array,
) -> tuple[DecodeState, jax.Array, jax.Array]:
  """Appends up to and with the first token that stops, and up to the limit.

  Returns `(state, count_B, before_stop_BR)`: how many tokens were appended, and which
  of the emitted have no stop before them.
  """
  offsets_R = jnp.arange(emitted_BR.shape[1])
  is_stop_BR = jnp.isin(emitted_BR, inputs.stop_ids)
  if inputs.stop_SV is not None:
    states = [state.stop_B]
    for token_B in emitted_BR.T:
      states.append(inputs.stop_SV[states[-1], token_B])
    stop_BX = jnp.stack(states, axis=1)  # Before the first token and after each.
    is_stop_BR |= stop_BX[:, 1:] == stops.FOUND
  stops_before_BR = jnp.cumsum(is_stop_BR, axis=1) - is_stop_BR
  before_stop_BR = stops_before_BR == 0
  kept_BR = (
    (offsets_R <= accepted_B[:, None])
    & before_stop_BR
    & (offsets_R < (state.limit_B - state.length_B)[:, None])
    & ~state.done_B[:, None]
  )
  count_B = jnp.sum(kept_BR, axis=1, dtype=jnp.int32)
  slots = state.tokens_BS.shape[1]
  slot_BR = jnp.where(kept_BR, state.length_B[:, None] + offsets_R, slots)
  rows_B1 = jnp.arange(emitted_BR.shape[0])[:, None]
  put = lambda old, new: old.at[rows_B1, slot_BR].set(  # noqa: E731
    new.astype(old.dtype), mode="drop"
  )
  is_draft_BR = offsets_R < accepted_B[:, None]
  source_BR = jnp.where(is_draft_BR, 1 + offsets_R, origin_B[:, None])
  length_B = state.length_B + count_B
  stop_B = state.stop_B
  if inputs.stop_SV is not None:
    stop_B = take_rows(stop_BX, count_B)
  done_B = (
    state.done_B | jnp.any(is_stop_BR & kept_BR, axis=1) | (length_B >= state.limit_B)
  )
  state = state._replace(
    tokens_BS=put(state.tokens_BS, emitted_BR),
    source_BS=put(state.source_BS, source_BR),
    length_B=length_B,
    done_B=done_B,
    stop_B=stop_B,
  )
  return state, count_B, before_stop_BR


def _count(
  state: DecodeState,
  accepted_B: jax.Array,
  count_B: jax.Array,
  before_stop_BR: jax.Array,
) -> Stats:
  stats, active_B = state.stats, ~state.done_B
  K = stats.reached_BK.shape[1]
  offsets_K = jnp.arange(K)
  reached_BK = (
    (offsets_K <= accepted_B[:, None])
    & before_stop_BR[:, :K]
    & (offsets_K < (state.limit_B - state.length_B)[:, None])
    & active_B[:, None]
  )
  accepted_BK = reached_BK & (offsets_K < accepted_B[:, None])
  emitted_B = jnp.minimum(accepted_B, count_B)
  is_bin_BR = (jnp.arange(1 + K) == emitted_B[:, None]) & active_B[:, None]
  return Stats(
    stats.rounds_B + active_B,
    stats.reached_BK + reached_BK,
    stats.accepted_BK + accepted_BK,
    stats.histogram_BR + is_bin_BR,
  )


def _draft(
  plan: Plan,
  inputs: Inputs,
  state: DecodeState,
  feature_BWD: jax.Array,
  start_B: jax.Array,
) -> DecodeState:
  """Returns the state with new drafts; row w of the features is position start + w."""
  drafter, n_B = plan.drafter, state.length_B
  if drafter.num_drafts == 0:
    return state
  slots = state.tokens_BS.shape[1]
  position_BW = start_B[:, None] + jnp.arange(feature_BWD.shape[1])
  window = Window(
    state.tokens_BS,
    n_B,
    feature_BWD,
    jnp.where(position_BW <= n_B[:, None] - 2, position_BW, slots),
    start_B,
    n_B - 2 - start_B,
  )

  def choose(logits_BV: jax.Array, k: int) -> Choice:
    if plan.proposal == "argmax":
      return Choice(argmax(logits_BV))
    log_q_BV = warp(logits_BV, inputs.warp)
    role = noise.TARGET if plan.proposal == "coupled" else noise.DRAFT
    position_B1 = (n_B + k - 1)[:, None]
    gumbel_B1V = _noise(plan, state).gumbel(position_B1, role, log_q_BV)
    return Choice(sample_tokens(log_q_BV, gumbel_B1V[:, 0]), log_q_BV)

  cache, carry = drafter.catch_up(inputs.draft_weights, state.draft_cache, window)
  cache, drafts = drafter.propose(inputs.draft_weights, cache, carry, window, choose)
  if drafter.num_nodes is not None:
    return state._replace(draft_cache=cache, nodes=drafts)
  keeps_q = plan.proposal == "sample" and plan.rule != "match"
  return state._replace(
    draft_cache=cache,
    drafts_BK=tokens_of(drafts),
    log_q_BKV=jnp.stack([x.note for x in drafts], axis=1) if keeps_q else None,
  )


def _noise(plan: Plan, state: DecodeState) -> noise.Noise:
  return noise.Noise(state.key_B, state.length_B, is_of_round=plan.rule == "block")
