"""The work that `mtp-jax bench decode` times: generations, and parts of a round.

A part runs many times within one compiled loop, on the functions, caches and shapes of
`mtp_jax.decode.loop`, so that its work is measured and not the dispatch of programs.
Each turn of the loop uses results of the turn before, as in decoding, so the compiler
cannot leave the work out or take it out of the loop.

Legend: B batch, S slots, X rows of a verification, W rows of the window, D feature.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch.benchmarks import harness, limits
from launch.benchmarks.harness import TORCH, Contestant
from mtp_jax.config import Config
from mtp_jax.decode import loop, trees
from mtp_jax.decode.generate import Decoding, make_plan
from mtp_jax.kernels.argmax import argmax
from mtp_jax.model.layers import compute_dtype
from mtp_jax.predictors.drafting import (
  Choice,
  Drafter,
  Nodes,
  Window,
  take_tokens,
  tokens_of,
)
from mtp_jax.predictors.weights import Weights

_MOST_TURNS = 1 << 14


@dataclasses.dataclass(frozen=True)
class Model:
  """A model to decode with; `prompts_NP` are all of one length."""

  name: str
  config: Config
  weights: Weights
  prompts_NP: np.ndarray
  max_new_tokens: int
  stop_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Variant:
  """A way to draft.

  make_weights: (weights, true tokens drafts_BS) -> weights of the drafter.
  has_cost: making its drafts is work that is worth timing.
  """

  plan: loop.Plan
  make_weights: Callable[[Any, jax.Array], Any]
  has_cost: bool = True


class Part:
  """A piece of work that can be timed again and again."""

  def __init__(self, body: Callable[[Any, Any], Any], inputs: Any, carry: Any):
    """Args: `body(inputs, carry) -> carry` is one turn; the carry is used up."""

    def turns(inputs: Any, carry: Any, count: jax.Array) -> Any:
      return jax.lax.fori_loop(0, count, lambda _, c: body(inputs, c), carry)

    self._program = jax.jit(turns, donate_argnums=1)
    self._inputs, self._carry = inputs, carry
    self._count = 1

  def warm_up(self, least_seconds: float) -> None:
    """Compiles, and finds how many turns take `least_seconds`."""
    self.seconds()
    self._count = 4
    turn = min(self.seconds(), self.seconds())
    self._count = min(max(math.ceil(least_seconds / turn), 4), _MOST_TURNS)

  def seconds(self) -> float:
    """Returns the time of one turn, as a mean over the turns of one run."""
    start = time.perf_counter()
    self._carry = self._program(self._inputs, self._carry, self._count)
    jax.block_until_ready(self._carry)
    return (time.perf_counter() - start) / self._count


def forward(
  plan: loop.Plan, inputs: loop.Inputs, state: loop.DecodeState, rows: int | None
) -> Part:
  """Runs the target on the next `rows` tokens of every sequence, up to its choices.

  One row is the least that decoding can do for a token, K + 1 rows are a verification.
  None runs the newest token and all nodes of a tree.
  """
  target, slots = plan.target, state.tokens_BS.shape[1]
  if rows is None:
    sees_BXX = trees.ancestors(state.nodes.parent_BN, plan.drafter.num_drafts)
    places = trees.places(sees_BXX, state.length_B, slots)
    tokens_BX = jnp.zeros(sees_BXX.shape[:2], jnp.int32)
  else:
    places = state.length_B[:, None] - 1 + jnp.arange(rows)
    tokens_BX = jnp.zeros_like(places)

  def body(inputs: loop.Inputs, carry: Any) -> Any:
    tokens_BX, places, cache = carry
    hidden_BXD, _, cache = target.forward(inputs.weights, tokens_BX, places, cache)
    logits_BXV = target.unembed(inputs.weights, hidden_BXD)
    if rows is not None:
      places = (places + 1) % slots
    return argmax(logits_BXV), places, cache

  cache = jax.tree.map(jnp.copy, state.cache)
  return Part(body, inputs, (tokens_BX, places, cache))


def draft(
  plan: loop.Plan, inputs: loop.Inputs, state: loop.DecodeState
) -> Part:
  """Catches up with a window that is all new, then proposes K drafts, greedily."""
  drafter = plan.drafter
  rows = 1 + drafter.num_drafts
  length_B = jnp.maximum(state.length_B, 1 + rows)
  start_B = length_B - 1 - rows
  position_BW = start_B[:, None] + jnp.arange(rows)
  last_B = jnp.full_like(length_B, rows - 1)
  like_BWD = jax.eval_shape(
    plan.target.forward, inputs.weights, position_BW, position_BW, state.cache
  )[1]
  feature_BWD = jax.random.normal(jax.random.key(0), like_BWD.shape, like_BWD.dtype)
  places = (position_BW, start_B, last_B)
  fixed = (inputs.draft_weights, state.tokens_BS, length_B, places)

  def body(fixed: Any, carry: Any) -> Any:
    weights, tokens_BS, length_B, places = fixed
    drafts, feature_BWD, cache = carry
    # A tiny change, which depends on the turn before.
    token_B1 = jax.tree.leaves(drafts)[0][:, :1]
    drift = 1e-9 * token_B1[:, :, None].astype(feature_BWD.dtype)
    window = Window(tokens_BS, length_B, feature_BWD + drift, *places)
    cache, found = drafter.catch_up(weights, cache, window)
    cache, drafts = drafter.propose(weights, cache, found, window, most_likely)
    is_tree = isinstance(drafts, Nodes)
    return drafts if is_tree else tokens_of(drafts), window.feature_BWD, cache

  cache = jax.tree.map(jnp.copy, state.draft_cache)
  drafts = state.drafts_BK if state.nodes is None else state.nodes
  return Part(
    body, fixed, (jax.tree.map(jnp.zeros_like, drafts), feature_BWD, cache)
  )


def most_likely(logits_BV: jax.Array, k: int) -> Choice:
  """The `Choose` of greedy decoding."""
  del k
  return Choice(argmax(logits_BV))


def forced(drafter: Drafter) -> Drafter:
  """Returns a drafter that does the work of `drafter` and then returns known tokens.

  Its weights are `(weights of drafter, drafts_BS)`, the latter as in `drafters.given`.
  """

  def propose(weights, cache, carry, window: Window, choose):
    own, drafts_BS = weights
    cache, found = drafter.propose(own, cache, carry, window, choose)
    ahead_BK = window.length_B[:, None] + jnp.arange(drafter.num_drafts)
    given_KB = take_tokens(drafts_BS, ahead_BK).T
    # Tokens are never negative, which the compiler does not know.
    return cache, [
      Choice(jnp.where(x.token_B < 0, x.token_B, given_B))
      for x, given_B in zip(found, given_KB, strict=True)
    ]

  return drafter._replace(
    has_distribution=False,
    catch_up=lambda weights, cache, window: drafter.catch_up(weights[0], cache, window),
    propose=propose,
  )


class Generation:
  """The decoding of all batches by one plan, again and again.

  tokens: what it decoded, tokens_BS of every batch. rounds: of all batches together.
  sequence_rounds, sequence_tokens: of all sequences together, prefill excluded.
  """

  def __init__(
    self,
    model: Model,
    plan: loop.Plan,
    batches: Sequence[np.ndarray],
    draft_weights: Sequence[Any],
  ):
    self.plan = plan
    self.limit = batches[0].shape[1] + model.max_new_tokens
    stop_ids = np.array(model.stop_ids, np.int32)
    self._batches = [
      (batch, loop.Inputs(model.weights, weights, None, stop_ids))
      for batch, weights in zip(batches, draft_weights, strict=True)
    ]
    self.tokens: list[jax.Array] = []
    self.rounds = self.sequence_rounds = self.sequence_tokens = 0
    for batch, inputs in self._batches:
      state = loop.finish(plan, inputs, self._start(batch, inputs))
      self.tokens.append(state.tokens_BS[:, : self.limit])
      self.rounds += int(state.stats.rounds_B.max())
      self.sequence_rounds += int(state.stats.rounds_B.sum())
      self.sequence_tokens += int((state.length_B - batch.shape[1] - 1).sum())

  def seconds(self) -> float:
    """Decodes everything; returns the time without prefill."""
    total = 0.0
    for batch, inputs in self._batches:
      state = jax.block_until_ready(self._start(batch, inputs))
      start = time.perf_counter()
      jax.block_until_ready(loop.finish(self.plan, inputs, state))
      total += time.perf_counter() - start
    return total

  def first(self) -> tuple[loop.Inputs, loop.DecodeState]:
    """Returns the inputs of the first batch and its state after the prefill."""
    batch, inputs = self._batches[0]
    return inputs, self._start(batch, inputs)

  def _start(self, batch_BP: np.ndarray, inputs: loop.Inputs) -> loop.DecodeState:
    rows, length = batch_BP.shape
    slots = loop.slots_for(self.limit, self.plan.drafter.num_drafted)
    tokens_BS = np.zeros((rows, slots), np.int32)
    tokens_BS[:, :length] = batch_BP
    full_B = functools.partial(np.full, rows, dtype=np.int32)
    return loop.prefill(
      self.plan, length, inputs, tokens_BS, full_B(length), full_B(self.limit),
      np.uint32(0), np.arange(rows, dtype=np.int32),  # Noise, which greedy has none of.
    )


# An array that fills memory is kept for all models of a run.
_read_all = functools.cache(limits.reads)


def measure(
  model: Model,
  variants: Mapping[str, Variant],
  batch_size: int,
  settings: SimpleNamespace,
  peers: Mapping[str, Contestant],
) -> list[dict[str, Any]]:
  """Returns a row per variant; everything that is timed takes turns."""
  batches = np.split(model.prompts_NP, len(model.prompts_NP) // batch_size)
  plain_plan = make_plan(model.config, Decoding(num_drafts=0))
  plain = Generation(model, plain_plan, batches, [None] * len(batches))
  reads = _read_all(compute_dtype(model.config.trunk))
  parts = {"step": forward(plain_plan, *plain.first(), 1)}
  generations = {"plain": plain}

  # Drafts are known from the plain generation, where a variant needs them.
  for name, variant in variants.items():
    plan = variant.plan
    drafts = (
      jnp.pad(tokens_BS, ((0, 0), (0, plan.drafter.num_drafts)))
      for tokens_BS in plain.tokens
    )
    weights = [variant.make_weights(model.weights, drafts_BS) for drafts_BS in drafts]
    generations[name] = Generation(model, plan, batches, weights)
    begun = generations[name].first()
    if (verify := _verify(name, plan)) not in parts:
      rows = None if plan.drafter.num_nodes else 1 + plan.drafter.num_drafts
      parts[verify] = forward(plan, *begun, rows)
    if variant.has_cost:
      parts[f"{name} draft"] = draft(plan, *begun)

  # A part is repeated for as long as the clock needs to measure it.
  for part in parts.values():
    part.warm_up(settings.least_seconds)
  timed = generations | parts | {"reads": reads}
  timers = {name: x.seconds for name, x in timed.items()}
  timers |= {name: functools.partial(_run_once, peer) for name, peer in peers.items()}
  taken = harness.take_turns(timers, settings.rounds)
  seconds = {name: np.array(times) for name, times in taken.items()}
  seconds["floor"] = seconds["reads"] * _step_bytes(model, plain) / reads.amount
  return [
    _row(model, batch_size, name, plain, generations[name], seconds)
    for name in variants
  ]


def _run_once(peer: Contestant) -> float:
  return peer.run(1)[0]


def _verify(name: str, plan: loop.Plan) -> str:
  """Returns the name of a variant's verification: chains of one length share theirs."""
  return f"verify {name if plan.drafter.num_nodes else plan.drafter.num_drafts}"


def _step_bytes(model: Model, plain: Generation) -> float:
  """Returns the bytes that a step of one token must read, as a mean over a generation.

  All experts count.
  """
  weights, (_, state) = model.weights, plain.first()
  read = (weights.blocks, weights.final_norm, weights.unembed_DV)
  filled = model.prompts_NP.shape[1] + model.max_new_tokens / 2
  return _size(read) + _size(state.cache) * filled / state.tokens_BS.shape[1]


def _size(tree: Any) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _row(
  model: Model,
  batch_size: int,
  name: str,
  plain: Generation,
  drafted: Generation,
  seconds: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Returns what was measured of one variant, and the ratios of every round."""
  step, verify = seconds["step"], seconds[_verify(name, drafted.plan)]
  draft = seconds.get(f"{name} draft", np.zeros_like(step))
  timed = {
    "floor": seconds["floor"], "step": step, "verify": verify, "draft": draft,
    "plain": seconds["plain"], "drafted": seconds[name],
  } | {peer: seconds[peer] for peer in TORCH if peer in seconds}
  # Predicted and measured are formed within one round, like all ratios.
  batch_tau = plain.rounds / drafted.rounds
  predicted = batch_tau * step / (verify + draft)
  measured = seconds["plain"] / seconds[name]
  found = {
    "floor_over_step": seconds["floor"] / step,
    "v": verify / step, "sum_c": draft / step,
    "predicted": predicted, "measured": measured,
    "measured_over_predicted": measured / predicted,
  }
  # Drafts must not change the text; by the programs that were timed.
  same = (
    np.all(a == b, axis=1).sum()
    for a, b in zip(plain.tokens, drafted.tokens, strict=True)
  )
  return {
    "model": model.name,
    "batch_size": batch_size,
    "num_prompts": len(model.prompts_NP),
    "prompt_tokens": model.prompts_NP.shape[1],
    "max_new_tokens": model.max_new_tokens,
    "drafter": name,
    "num_drafted": drafted.plan.drafter.num_drafted,
    "plain_rounds": plain.rounds,
    "rounds": drafted.rounds,
    "tau": drafted.sequence_tokens / drafted.sequence_rounds,
    "batch_tau": batch_tau,
    "identical": int(sum(same)),
    **{key: values.tolist() for key, values in found.items()},
    "plain_over_torch": {
      peer: (seconds["plain"] / timed[peer]).tolist() for peer in TORCH if peer in timed
    },
    "seconds": {key: values.tolist() for key, values in timed.items()},
  }
