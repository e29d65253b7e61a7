"""Text out of a trained model, with its own predictors as drafters.

    generate -> loop.prefill, loop.finish -> loop.run_round -> verify

Prompts of one bucket (padded length, new tokens, batch size) share compiled programs.

Legend: B batch, S slots, K drafts.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mtp_jax import executables
from mtp_jax.config import MOST_DRAFTS, Config
from mtp_jax.decode import drafters, loop, stops, trees
from mtp_jax.decode.target import make_target, unstack
from mtp_jax.decode.verify import RULES
from mtp_jax.decode.warp import Warp
from mtp_jax.environment import device_memory
from mtp_jax.model.layers import compute_dtype
from mtp_jax.predictors import num_trunk_layers
from mtp_jax.predictors.drafting import Drafter
from mtp_jax.predictors.weights import Weights

PROPOSALS = ("auto", "argmax", "sample", "coupled")

_SMALLEST_BUCKET = 16
_INT32 = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Completion:
  """What one prompt was continued with.

  tokens: [n] the new tokens; the one that ended it, if one did, is the last: a stop
    token, or that in which a stop string ends.
  source: [n] where each is from: k >= 1 accepted draft of depth k; `loop.OWN` the
    target's own after all drafts were accepted (or none made); `loop.CORRECTION` its
    own in place of a rejected draft.
  is_stopped: a stop token or string ended it, not the limit.
  rounds, reached, accepted, histogram: see `loop.Stats`.
  is_finished: nothing will follow.
  """

  tokens: np.ndarray
  source: np.ndarray
  is_stopped: bool
  rounds: int
  reached: np.ndarray
  accepted: np.ndarray
  histogram: np.ndarray
  is_finished: bool = True


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How to decode.

  rule: greedy | match (sampling; equals plain sampling with the same seed token for
    token) | leviathan | block (sampling, equal in distribution); see `verify`.
  warp: temperature and the like for the rules that sample; None for greedy.
  proposal: how drafts are chosen, see `loop.Plan`. `auto` samples where the rule can
    use the distribution (leviathan, block), and else takes the arg max.
  num_drafts: K; None takes all of the model's predictors.
  recurse: allows K > D, see `drafters.own_predictors`.
  tree: see `trees`; None verifies a chain. The depth of a tree is K.
  """

  rule: str = "greedy"
  warp: Warp | None = None
  proposal: str = "auto"
  num_drafts: int | None = None
  recurse: bool = False
  tree: trees.Tree | None = None


GREEDY = Decoding()


def make_plan(
  config: Config, decoding: Decoding, drafter: Drafter | None = None
) -> loop.Plan:
  """Returns the plan of a model and a way to decode; checks that they fit.

  Raises:
    ValueError: names the setting, the rule that it breaks, and its value.
  """
  rule, proposal = decoding.rule, decoding.proposal
  for name, value, choices in (
    ("rule", rule, RULES), ("proposal", proposal, PROPOSALS)
  ):
    if value not in choices:
      known = ", ".join(map(repr, choices))
      raise ValueError(f"{name} must be one of {known}, got {value!r}.")
  if rule == "greedy" and decoding.warp is not None:
    raise ValueError(
      "rule 'greedy' takes the arg max and no temperature, top_k, top_p or min_p; use "
      "rule 'match', 'leviathan' or 'block' to sample."
    )
  if rule != "greedy" and decoding.warp is None:
    raise ValueError(
      f"rule {rule!r} samples and must have a positive temperature, got none; use rule "
      "'greedy' for temperature 0."
    )
  if drafter is None:
    drafter = _own_drafter(config, decoding)
  if drafter.num_nodes is not None and rule not in ("greedy", "match"):
    raise ValueError(
      "a tree must have rule 'greedy' or 'match': its drafts are chosen, not sampled, "
      "and from a one-hot q no rule accepts more than 'match', which is as exact; got "
      f"rule {rule!r}."
    )
  if drafter.num_drafts == 0 and rule != "greedy":
    rule = "match"  # Nothing is drafted: every rule is plain sampling.
  if proposal == "auto":
    uses_q = rule in ("leviathan", "block")
    proposal = "sample" if uses_q and drafter.has_distribution else "argmax"
  if drafter.num_drafts:
    if proposal in ("sample", "coupled") and not drafter.has_distribution:
      raise ValueError(
        f"proposal {proposal!r} needs a drafter with a distribution, and this one "
        "proposes tokens only; use proposal 'argmax'."
      )
    if rule == "block" and proposal != "sample":
      raise ValueError(
        "rule 'block' must have the distribution q of sampled drafts (proposal "
        f"'sample'), got proposal {decoding.proposal!r}"
        + ("" if drafter.has_distribution else " and a drafter of tokens only")
      )
    if proposal == "coupled" and rule != "match":
      raise ValueError(
        "proposal 'coupled' draws drafts with the target's own noise, which only rule "
        f"'match' may use, got rule {rule!r}."
      )
    if rule == "greedy" and proposal != "argmax":
      raise ValueError(f"rule 'greedy' must have proposal 'argmax', got {proposal!r}.")
    if drafter.num_nodes is not None and proposal != "argmax":
      raise ValueError(
        "a tree must have proposal 'argmax', its nodes are the most likely tokens; got "
        f"{proposal!r}."
      )
  return loop.Plan(make_target(config), drafter, rule, proposal)


def _own_drafter(config: Config, decoding: Decoding) -> Drafter:
  """Returns the drafter that a way to decode makes of a model's predictors."""
  tree, num_drafts = decoding.tree, decoding.num_drafts
  if num_drafts is not None:
    check_integer("num_drafts", num_drafts, 0, MOST_DRAFTS)
  if tree is None:
    return drafters.own_predictors(config, decoding.num_drafts, decoding.recurse)
  if decoding.num_drafts is not None:
    raise ValueError(
      "num_drafts must be None with a tree, which has a depth of its own, got "
      f"{decoding.num_drafts}."
    )
  check_integer("depth of a tree", tree.depth, 1, MOST_DRAFTS)
  most = config.mtp.draft_vocab or config.tokenizer.vocab_size
  if tree.width > most:
    raise ValueError(
      f"{tree}: must be at most as wide as the vocabulary that is drafted from, "
      f"{most}, got width {tree.width}."
    )
  try:
    if isinstance(tree, trees.DynamicTree):
      return trees.dynamic(drafters.own_recursion(config), tree)
    chain = drafters.own_predictors(config, tree.depth, decoding.recurse)
    return trees.static(chain, tree)
  except ValueError as error:
    raise ValueError(f"{tree}: {error}") from error


def generate(
  config: Config,
  weights: Weights,
  prompts: Sequence[np.ndarray],
  *,
  max_new_tokens: int,
  stop_ids: Sequence[int] = (),
  stop_SV: np.ndarray | None = None,
  decoding: Decoding = GREEDY,
  seed: int = 0,
  first: int = 0,
  batch_size: int | None = None,
  prompt_length: int | None = None,
  batch_sharding: Any = None,
  before_batch: Callable[[], None] | None = None,
) -> list[Completion]:
  """Returns the completion of every prompt.

  Args:
    config: of the model.
    weights: `target.unstack` of its parameters, on any mesh.
    prompts: token ids, each with at least one.
    max_new_tokens: longest completion; completions of fewer share compiled programs
      with it up to the next power of two.
    stop_ids: tokens that end a completion.
    stop_SV: of the strings that end one, see `stops.transitions`.
    decoding: how.
    seed: of sampling; sequence i uses its own key, whatever the batch.
    first: number of the first prompt among the sequences of this seed.
    batch_size: prompts decoded at once; None takes all.
    prompt_length: prompts are padded to it; None takes a power of two.
    batch_sharding: of arrays with a leading batch axis; None leaves them where JAX puts
      them (copies on every device that has weights).
    before_batch: called before each batch; what it raises ends the call.

  Raises:
    ValueError: a prompt that is empty, too long or has unknown ids, or settings that do
      not fit the model.
  """
  if not prompts:
    return []
  batch_size = len(prompts) if batch_size is None else batch_size
  check_integer("batch_size", batch_size, 1, _INT32)
  check_integer("seed", seed, 0, 2**32 - 1)
  check_integer("first", first, 0, _INT32 - len(prompts) - batch_size)
  plan = make_plan(config, decoding)
  sizes = _Sizes(config, plan, prompts, max_new_tokens, prompt_length)
  if batch_sharding is None:
    sizes.check_memory(config, batch_size)
  inputs = _inputs(weights, decoding, stop_ids, stop_SV)
  completions = []
  for begin in range(0, len(prompts), batch_size):
    if before_batch is not None:
      before_batch()
    batch = prompts[begin : begin + batch_size]
    # Copies of the last prompt fill up the last batch, and are not read.
    filled = [*batch, *[batch[-1]] * (batch_size - len(batch))]
    state = _prefill(plan, inputs, sizes, filled, seed, first + begin, batch_sharding)
    state = loop.finish(plan, inputs, state)
    completions += _completions(state, batch, stop_ids)
  return completions


def compile_ahead(
  config: Config,
  params: Any,
  *,
  max_new_tokens: int,
  num_stops: int,
  decodings: Sequence[Decoding],
  batch_size: int,
  prompt_length: int,
) -> None:
  """Compiles what `generate` will call for these ways to decode.

  Args:
    config: of the model.
    params: shapes of its parameters, with shardings.
    num_stops: number of `stop_ids`.
    max_new_tokens, decodings, batch_size, prompt_length: see `generate`.
  """
  prompts = [np.zeros(1, np.int32)] * batch_size
  weights = executables.results(unstack, params, config)
  for decoding in decodings:
    plan = make_plan(config, decoding)
    sizes = _Sizes(config, plan, prompts, max_new_tokens, prompt_length)
    inputs = _inputs(weights, decoding, (0,) * num_stops)
    rows = _rows(sizes, prompts, 0)
    state = executables.results(
      loop.prefill, plan, sizes.prompt_slots, inputs, *rows[:-1], np.uint32(0), rows[-1]
    )
    loop.finish.lower(plan, inputs, state).compile()


def stream(
  config: Config,
  weights: Weights,
  prompt: np.ndarray,
  *,
  max_new_tokens: int,
  stop_ids: Sequence[int] = (),
  stop_SV: np.ndarray | None = None,
  decoding: Decoding = GREEDY,
  seed: int = 0,
) -> Iterator[Completion]:
  """Yields the completion of one prompt so far, after the prefill and every round.

  The last one is what `generate` returns for the prompt alone.
  """
  check_integer("seed", seed, 0, 2**32 - 1)
  plan = make_plan(config, decoding)
  sizes = _Sizes(config, plan, [prompt], max_new_tokens, None)
  sizes.check_memory(config, 1)
  inputs = _inputs(weights, decoding, stop_ids, stop_SV)
  state = _prefill(plan, inputs, sizes, [prompt], seed, 0, None)
  yield _completions(state, [prompt], stop_ids)[0]
  while not bool(state.done_B[0]):
    state = loop.step(plan, inputs, state)
    yield _completions(state, [prompt], stop_ids)[0]


class _Sizes:
  """The bucket that a call falls into, checked against the model and the prompts."""

  def __init__(
    self,
    config: Config,
    plan: loop.Plan,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    prompt_length: int | None,
  ):
    check_integer("max_new_tokens", max_new_tokens, 1, _INT32 // 4)
    longest = max(len(prompt) for prompt in prompts)
    bucket = bucket_size(longest) if prompt_length is None else prompt_length
    vocab_size = config.tokenizer.vocab_size
    for i, prompt in enumerate(prompts):
      if not 1 <= len(prompt) <= bucket:
        raise ValueError(
          f"prompts must have 1 to {bucket} tokens, prompt {i} has {len(prompt)}."
        )
      check_ids(np.asarray(prompt), vocab_size, f"prompt {i} has")
    most = config.data.seq_len
    if config.trunk.kind == "gpt2" and longest + max_new_tokens > most:
      raise ValueError(
        f"prompt and max_new_tokens must be at most {most} tokens together: the model "
        f"has so many learned positions (data.seq_len); got {longest} + "
        f"{max_new_tokens}."
      )
    self.prompt_slots = bucket
    self.max_new_tokens = max_new_tokens
    self.slots = loop.slots_for(
      bucket + bucket_size(max_new_tokens), plan.drafter.num_drafted
    )


  def check_memory(self, config: Config, batch_size: int) -> None:
    """Refuses what does not fit, by the least that it takes: scores and cache.

    Raises:
      ValueError: names the memory that is needed and the memory of the device.
    """
    trunk, width = config.trunk, np.dtype(compute_dtype(config.trunk)).itemsize
    each = 2 * trunk.num_kv_heads * trunk.head_dim
    if trunk.attention_kind == "latent":
      each = trunk.latent.kv_rank + trunk.latent.rope_dim
    scores = 4 * trunk.num_heads * self.prompt_slots * self.slots
    cache = num_trunk_layers(config) * self.slots * each * width
    needed, memory = batch_size * (scores + cache), device_memory()
    if memory is not None and needed > memory:
      raise ValueError(
        f"prompt and max_new_tokens must fit into memory: {batch_size} prompt(s) "
        f"padded to {self.prompt_slots} tokens, with {self.max_new_tokens} new ones, "
        f"take at least {needed / 1e9:,.1f} GB, and there are {memory / 1e9:,.1f} GB."
      )


def check_integer(name: str, value: Any, low: int, high: int) -> None:
  """Raises ValueError unless `value` is an integer from `low` to `high`."""
  is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
  if not (is_integer and low <= value <= high):
    raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}.")


def check_ids(ids: np.ndarray, vocab_size: int, found: str) -> None:
  """Raises ValueError if an id is not in the vocabulary."""
  unknown = ids[(ids < 0) | (ids >= vocab_size)]
  if unknown.size:
    raise ValueError(
      f"token ids must be in [0, {vocab_size}), {found} {int(unknown[0])}."
    )


def bucket_size(size: int) -> int:
  """Returns the padded length, a power of two, with which texts share programs."""
  return max(_SMALLEST_BUCKET, 1 << (size - 1).bit_length())


def _inputs(
  weights: Weights,
  decoding: Decoding,
  stop_ids: Sequence[int],
  stop_SV: np.ndarray | None = None,
) -> loop.Inputs:
  ids = np.asarray(stop_ids, np.int32).reshape(-1)
  return loop.Inputs(weights, weights, decoding.warp, ids, stop_SV)


def _prefill(
  plan: loop.Plan,
  inputs: loop.Inputs,
  sizes: _Sizes,
  prompts: Sequence[np.ndarray],
  seed: int,
  first: int,
  sharding: Any,
) -> loop.DecodeState:
  rows = _rows(sizes, prompts, first)
  if sharding is not None:
    rows = jax.device_put(rows, sharding)
  *rows, sequence_B = rows
  return loop.prefill(
    plan, sizes.prompt_slots, inputs, *rows, np.uint32(seed), sequence_B
  )


def _rows(
  sizes: _Sizes, prompts: Sequence[np.ndarray], first: int
) -> tuple[np.ndarray, ...]:
  """Returns tokens_BS, lengths_B, limits_B and sequence_B of a batch."""
  lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens_BS = np.zeros((len(prompts), sizes.slots), np.int32)
  for row, prompt in zip(tokens_BS, prompts, strict=True):
    row[: len(prompt)] = prompt
  limits_B = lengths_B + np.int32(sizes.max_new_tokens)
  sequence_B = first + np.arange(len(prompts), dtype=np.int32)
  return tokens_BS, lengths_B, limits_B, sequence_B


def _completions(
  state: loop.DecodeState, prompts: Sequence[np.ndarray], stop_ids: Sequence[int]
) -> list[Completion]:
  kept = (
    state.tokens_BS, state.source_BS, state.length_B, state.stats, state.stop_B,
    state.done_B,
  )
  tokens_BS, source_BS, length_B, stats, stop_B, done_B = (
    multihost_utils.process_allgather(kept, tiled=True)
  )
  ids = set(map(int, stop_ids))
  completions = []
  for i, prompt in enumerate(prompts):
    new = slice(len(prompt), int(length_B[i]))
    tokens = tokens_BS[i, new]
    completions.append(
      Completion(
        tokens,
        source_BS[i, new],
        int(tokens[-1]) in ids or int(stop_B[i]) == stops.FOUND,
        int(stats.rounds_B[i]),
        stats.reached_BK[i],
        stats.accepted_BK[i],
        stats.histogram_BR[i],
        bool(done_B[i]),
      )
    )
  return completions
