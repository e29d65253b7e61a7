"""The whole decoding loop has the target's law: a table as the trunk, many samples.

The target is a table of logits looked up by the whole prefix, so its law of four new
tokens can be written down. 200,000 sequences with prompts of five lengths are decoded
as one batch, and their counts are compared by a chi-square test with a fixed seed. The
faults at the end must make it fail. So are the counts of small models of every kind
that drafts, whose law whole forward passes over all sequences give.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from mtp_jax.decode import loop, noise, trees
from mtp_jax.decode.generate import Decoding, make_plan
from mtp_jax.decode.target import Target, unstack
from mtp_jax.decode.warp import Warp, warp
from mtp_jax.lm import MtpLm, unembed_matrix
from mtp_jax.model.cache_slots import Places, positions_of
from mtp_jax.predictors.drafting import Drafter, Recursion
from tests.common import batch_of, mostly_slow, random_params, tiny_config

VOCAB, NEW, TABLE = 4, 4, 211
SAMPLES = 200_000
PROMPTS = ((1,), (3, 0), (2, 2, 1), (0, 1, 2, 3), (3,))
PROMPT_SLOTS = 4

_RNG = np.random.default_rng(0)
TARGET_LOGITS = 1.5 * _RNG.standard_normal((TABLE, VOCAB)).astype(np.float32)
# Alike enough that drafts are often accepted, and often not.
DRAFT_LOGITS = TARGET_LOGITS + _RNG.standard_normal((TABLE, VOCAB)).astype(np.float32)


POWERS = np.array([pow(7, i, TABLE) for i in range(99)])


def code(tokens_BS):
  """Returns for every position the row of the table that its prefix selects."""
  powers = jnp.array(POWERS[: tokens_BS.shape[1]])
  return jnp.cumsum((tokens_BS + 1) * powers, axis=1) % TABLE


def table_target():
  def forward(weights, tokens_BT, places, cache_BS):
    del weights
    rows_B1 = jnp.arange(tokens_BT.shape[0])[:, None]
    slot_BT = places.slot_BT if isinstance(places, Places) else places
    cache_BS = cache_BS.at[rows_B1, slot_BT].set(tokens_BT, mode="drop")
    if isinstance(places, Places):
      # The row of the table that the tokens select which a node sees.
      position_BS = jnp.broadcast_to(jnp.arange(cache_BS.shape[1]), cache_BS.shape)
      position_BS = position_BS.at[rows_B1, slot_BT].set(places.position_BT)
      value_BS = (cache_BS + 1) * jnp.array(POWERS)[position_BS]
      seen_BTS = jnp.where(places.visible_BTS, value_BS[:, None], 0)
      hidden_BT1 = jnp.sum(seen_BTS, axis=2, keepdims=True) % TABLE
    else:
      hidden_BT1 = code(cache_BS)[rows_B1, slot_BT][..., None]
    return hidden_BT1, hidden_BT1, cache_BS

  def move(cache_BS, source_BT, slot_BT):
    rows_B1 = jnp.arange(len(cache_BS))[:, None]
    moved_BT = cache_BS[rows_B1, source_BT]
    return cache_BS.at[rows_B1, slot_BT].set(moved_BT, mode="drop")

  return Target(
    init=lambda rows, slots: jnp.zeros((rows, slots), jnp.int32),
    forward=forward,
    unembed=lambda weights, hidden: weights[hidden[..., 0]],
    move=move,
  )


def table_drafter(num_drafts):
  def propose(weights, cache, carry, window, choose):
    tokens_BS, drafts = window.tokens_BS, []
    rows_B = jnp.arange(tokens_BS.shape[0])
    for k in range(1, 1 + num_drafts):
      row_B = code(tokens_BS)[rows_B, window.length_B + k - 2]
      drafts.append(choose(weights[row_B], k))
      slot_B = window.length_B + k - 1
      tokens_BS = tokens_BS.at[rows_B, slot_B].set(drafts[-1].token_B, mode="drop")
    return cache, drafts

  return Drafter(
    num_drafts, True, lambda rows, slots: (),
    lambda weights, cache, window: (cache, ()), propose,
  )


def table_recursion():
  """The same drafter, its state the row of the table."""

  def catch_up(weights, cache, window):
    rows_B = jnp.arange(len(window.length_B))
    return cache, code(window.tokens_BS)[rows_B, window.length_B - 1][:, None]

  def step(weights, cache, state_BW1, token_BW, places):
    next_BW = positions_of(places) + 1  # A row has read the token after its position.
    value_BW = (token_BW + 1) * jnp.array(POWERS)[next_BW]
    return cache, (state_BW1 + value_BW[..., None]) % TABLE

  return Recursion(
    lambda rows, slots: (), catch_up, step,
    lambda weights, state: weights[state[..., 0]],
  )


# The spine's siblings and all that a beam finds; of 4 tokens.
TREES = {
  "static": lambda: trees.static(
    table_drafter(2), trees.StaticTree(((0,), (1,), (0, 0), (0, 1)))
  ),
  "dynamic": lambda: trees.dynamic(table_recursion(), trees.DynamicTree(3, 2, 6)),
}


def sample(rule, proposal, settings, drafter=2, seed=0):
  """Returns new tokens [SAMPLES, NEW] and the share of accepted drafts.

  `drafter` is one of `TREES`, or the number of drafts of a chain.
  """
  drafter = TREES[drafter]() if drafter in TREES else table_drafter(drafter)
  plan = loop.Plan(table_target(), drafter, rule, proposal)
  return decode(plan, (TARGET_LOGITS, DRAFT_LOGITS), settings, SAMPLES, seed)


def decode(plan, weights, settings, samples, seed=0):
  """Returns what `sample` does, given the weights of target and drafter."""
  slots = loop.slots_for(PROMPT_SLOTS + NEW, plan.drafter.num_drafted)
  tokens_BS = np.zeros((samples, slots), np.int32)
  lengths_B = np.zeros(samples, np.int32)
  for i, prompt in enumerate(PROMPTS):
    tokens_BS[i :: len(PROMPTS), : len(prompt)] = prompt
    lengths_B[i :: len(PROMPTS)] = len(prompt)
  inputs = loop.Inputs(*weights, settings, np.array([-1], np.int32))

  @jax.jit
  def run(inputs, tokens_BS, lengths_B):
    # The bodies as they are when called, so that a planted fault takes part.
    state = loop.prefill.__wrapped__(
      plan, PROMPT_SLOTS, inputs, tokens_BS, lengths_B, lengths_B + NEW, seed,
      jnp.arange(samples),
    )
    state = loop.finish.__wrapped__(plan, inputs, state)
    new_BN = lengths_B[:, None] + jnp.arange(NEW)
    tokens_BN = state.tokens_BS[jnp.arange(samples)[:, None], new_BN]
    return tokens_BN, state.stats

  tokens_BN, stats = jax.device_get(run(inputs, tokens_BS, lengths_B))
  return tokens_BN, stats.accepted_BK.sum() / stats.reached_BK.sum()


@functools.cache
def law(settings):
  """Returns the probability of every sequence of NEW tokens, per prompt."""
  log_p = np.asarray(
    jax.jit(warp)(TARGET_LOGITS.astype(np.float64), Warp(*settings)), np.float64
  )
  probability = np.exp(log_p)
  laws = []
  for prompt in PROMPTS:
    laws.append([])
    for new in itertools.product(range(VOCAB), repeat=NEW):
      tokens, p = list(prompt), 1.0
      for token in new:
        row = sum((t + 1) * pow(7, i, TABLE) for i, t in enumerate(tokens)) % TABLE
        p *= probability[row, token]
        tokens.append(token)
      laws[-1].append(p)
  return np.array(laws)


def p_value(tokens_BN, settings):
  """Returns the chi-square p-value of the counts, 0 where the impossible happened."""
  return p_value_of(tokens_BN, law(tuple(settings)))


def p_value_of(tokens_BN, laws):
  index_B = np.ravel_multi_index(tokens_BN.T, (VOCAB,) * NEW)
  statistic, freedom = 0.0, 0
  for i, probability in enumerate(laws):
    counts = np.bincount(index_B[i :: len(PROMPTS)], minlength=len(probability))
    expected = probability * counts.sum()
    if counts[expected == 0].any():
      return 0.0
    # Rare sequences are pooled: the test needs a handful of each.
    rare = expected < 10
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic += np.sum((counts - expected) ** 2 / expected)
    freedom += len(expected) - 1
  return chi2.sf(statistic, freedom)


CASES = (
  ("leviathan", "sample", Warp(1.0), 2),
  ("leviathan", "sample", Warp(0.7, None, 0.9), 3),
  ("leviathan", "argmax", Warp(0.7), 2),
  ("block", "sample", Warp(1.0), 3),
  ("block", "sample", Warp(0.7, None, 0.9), 2),
  ("match", "argmax", Warp(0.7, None, 0.9), 2),
  ("match", "coupled", Warp(1.0, 3), 2),
  ("match", "argmax", Warp(1.0), "static"),
  ("match", "argmax", Warp(0.7, None, 0.9), "dynamic"),
)


@pytest.mark.parametrize(
  "rule,proposal,settings,drafter", mostly_slow(CASES, CASES[2], CASES[5]),
  ids=[f"{c[0]}-{c[1]}-{'cut' if any(c[2][1:]) else 'full'}-{c[3]}" for c in CASES],
)
def test_the_law_is_that_of_the_target(rule, proposal, settings, drafter):
  tokens_BN, accepted = sample(rule, proposal, settings, drafter)
  assert 0.2 < accepted < 0.95  # Both outcomes of a verification are exercised.
  assert p_value(tokens_BN, settings) > 1e-4


MODELS = {
  "sequential": ("sequential", {}),
  "parallel": ("parallel", {}),
  "parallel-markov": ("parallel", {"mtp.markov_rank": 3}),
  "linear": ("linear", {}),
  "medusa-markov": ("medusa", {"mtp.markov_rank": 3}),
  "eagle": ("eagle", {}),
  "eagle3.1": ("eagle3", {"mtp.fc_norm": True, "mtp.norm_output": True}),
  "peagle": ("peagle", {}),
  "dflash": ("dflash", {}),
}


def law_of_model(config, params):
  """Returns the probability of every sequence of NEW tokens, per prompt."""
  length, laws = config.data.seq_len, []
  new_SN = np.array(list(itertools.product(range(VOCAB), repeat=NEW)))

  @jax.jit
  def log_probabilities(batch):
    hidden_BTX = MtpLm(config).apply({"params": params}, batch)[0]
    matrix_DV = unembed_matrix(params, config)
    return jax.nn.log_softmax(hidden_BTX[..., : len(matrix_DV)] @ matrix_DV)

  for prompt in PROMPTS:
    rows = np.zeros((len(new_SN), length + 1 + config.mtp.depth), int)
    rows[:, : len(prompt)] = prompt
    rows[:, len(prompt) : len(prompt) + NEW] = new_SN
    log_p_STV = np.asarray(
      log_probabilities(batch_of(rows, np.ones_like(rows), length)), np.float64
    )
    places = len(prompt) - 1 + np.arange(NEW)
    log_p_SN = log_p_STV[np.arange(len(new_SN))[:, None], places, new_SN]
    laws.append(np.exp(log_p_SN.sum(axis=1)))
  return np.array(laws)


@pytest.mark.parametrize("name, rule, proposal", mostly_slow(
  [
    *((name, "leviathan", "sample") for name in MODELS),
    *((name, "block", "sample") for name in ("parallel-markov", "peagle", "dflash")),
    *((name, "leviathan", "argmax") for name in ("medusa-markov", "dflash")),
  ],
  ("dflash", "leviathan", "sample"), ("parallel-markov", "leviathan", "sample"),
))
def test_every_kind_has_the_law_of_its_own_trunk(name, rule, proposal):
  kind, options = MODELS[name]
  config = tiny_config(kind, 2, options | {
    "tokenizer.vocab_size": VOCAB, "data.seq_len": PROMPT_SLOTS + NEW,
    "trunk.num_layers": 2, "trunk.embed_dim": 8, "trunk.mlp_dim": 8,
    "trunk.num_heads": 2,
  })
  params = random_params(config, seed=2)
  plan = make_plan(config, Decoding(rule, Warp(1.0), proposal))
  assert (plan.rule, plan.proposal) == (rule, proposal)
  weights = unstack(params, config)
  tokens_BN, accepted = decode(plan, (weights, weights), Warp(1.0), 12_000)
  assert 0.1 < accepted < 0.95
  assert p_value_of(tokens_BN, law_of_model(config, params)) > 1e-4


@pytest.mark.slow
def test_plain_sampling_has_the_law_and_match_reproduces_it_token_for_token():
  settings = Warp(0.7, None, 0.9)
  plain_BN, _ = sample("match", "argmax", settings, 1)
  assert p_value(plain_BN, settings) > 1e-4
  for proposal, drafter in (("argmax", 3), ("coupled", 2), ("argmax", "dynamic")):
    tokens_BN, _ = sample("match", proposal, settings, drafter)
    np.testing.assert_array_equal(tokens_BN, plain_BN)


def _reused_noise(patch):
  """Block: the noise of positions instead of rounds, biased by the rejection."""
  right = loop._noise
  patch.setattr(
    loop, "_noise", lambda *args: right(*args)._replace(is_of_round=False)
  )


def _one_role(patch):
  """Drafts are drawn with the noise of the correction that replaces them."""
  patch.setattr(noise, "DRAFT", noise.TARGET)


def _constant_noise(patch):
  """The target's noise does not depend on the position."""
  gumbel = noise.Noise.gumbel

  def wrong(self, position_BX, role, like):
    if role == noise.TARGET:
      position_BX = 0 * position_BX
    return gumbel(self, position_BX, role, like)

  patch.setattr(noise.Noise, "gumbel", wrong)


def _unwarped_draft(patch):
  """q is what the drafter says before temperature and cuts, not what it drew from."""
  verify = loop.verify_sampled
  patch.setattr(
    loop, "verify_sampled",
    lambda rule, p, q, *args: verify(rule, p, jax.nn.log_softmax(0.7 * q), *args),
  )


def _draft_for_granted(patch):
  """One draft more than the rule allows is kept, at times."""
  verify = loop.verify_sampled

  def wrong(rule, p, q, drafts_BK, uniform_BK):
    return verify(rule, p, q, drafts_BK, 0.97 * uniform_BK)

  patch.setattr(loop, "verify_sampled", wrong)


def _sibling_sees_sibling(patch):
  """A node sees the one before it, which is a sibling or another's child."""
  places = trees.places

  def wrong(*args):
    found = places(*args)
    visible_BXS = found.visible_BTS
    before_BXS = jnp.roll(visible_BXS, 1, axis=1).at[:, 0].set(False)
    return found._replace(visible_BTS=visible_BXS | before_BXS)

  patch.setattr(trees, "places", wrong)


def _path_not_moved(patch):
  """The cache keeps what was written first, accepted or not."""
  target = table_target()._replace(move=lambda cache, source, slot: cache)
  patch.setitem(globals(), "table_target", lambda: target)


def _own_token_of_another_row(patch):
  """What the target says after a node is what it said after the node before it."""
  own_tokens = loop._own_tokens
  patch.setattr(
    loop, "_own_tokens", lambda *args: jnp.roll(own_tokens(*args), 1, axis=1)
  )


def _noise_by_row(patch):
  """Noise goes by the number of a node instead of its position."""
  own_tokens = loop._own_tokens

  def wrong(plan, inputs, state, logits_BXV, position_BX):
    rows_X = jnp.arange(position_BX.shape[1])
    return own_tokens(plan, inputs, state, logits_BXV, position_BX[:, :1] + rows_X)

  patch.setattr(loop, "_own_tokens", wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
  "fault",
  [
    _sibling_sees_sibling,
    _path_not_moved,
    _own_token_of_another_row,
    _noise_by_row,
  ],
  ids=lambda fault: fault.__name__,
)
def test_a_fault_of_trees_changes_the_law(fault, monkeypatch):
  fault(monkeypatch)
  tokens_BN, _ = sample("match", "argmax", Warp(0.8), "dynamic")
  assert p_value(tokens_BN, Warp(0.8)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
  "fault,rule",
  [
    (_reused_noise, "block"),
    (_one_role, "leviathan"),
    (_constant_noise, "leviathan"),
    (_unwarped_draft, "leviathan"),
    (_unwarped_draft, "block"),
    (_draft_for_granted, "leviathan"),
  ],
  ids=lambda value: getattr(value, "__name__", value),
)
def test_a_fault_changes_the_law(fault, rule, monkeypatch):
  fault(monkeypatch)
  tokens_BN, _ = sample(rule, "sample", Warp(0.8), 3)
  assert p_value(tokens_BN, Warp(0.8)) < 1e-6
