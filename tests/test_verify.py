"""The acceptance rules against the target's law, by exact enumeration.

Legend: N instances, V vocab, K drafts, R = K + 1 rows, P = V^K draft paths,
S = V^R sequences of the next R tokens, C = 2^K cells of the uniforms, B = N P C.

An instance is a tree of distributions, p at every prefix of up to K tokens and q at
every prefix of fewer. For every path of drafts the uniforms are integrated exactly: the
outcome can change at the thresholds only, so one uniform just below each and one at it
stand for the two sides. What a round leaves open of R tokens is completed from p.
"""

import functools
import itertools
import types
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from mtp_jax.decode import verify
from mtp_jax.decode.warp import Warp, warp

V = 3
SAMPLED = ("leviathan", "block")


class Tree(NamedTuple):
  """p[j] and q[j] are [N, V^j, V]: the law of the token after every prefix of j."""

  p: list[np.ndarray]
  q: list[np.ndarray]


class Outcome(NamedTuple):
  """The law of the next R tokens [N, S], and the mean number of kept drafts [N]."""

  law: np.ndarray
  accepted: np.ndarray


def random_tree(num_drafts, count=40, seed=0, one_hot=False):
  """Returns nodes with zeros in p and q, and with q equal to p or one-hot."""
  rng = np.random.default_rng(seed)

  def draw(prefixes):
    rows = rng.gamma(0.7, size=(count, prefixes, V)) + 1e-3
    zero = rng.random(rows.shape) < 0.25
    np.put_along_axis(zero, rng.integers(V, size=(count, prefixes, 1)), False, -1)
    rows = np.where(zero, 0, rows)
    return rows / rows.sum(-1, keepdims=True)

  p = [draw(V**j) for j in range(num_drafts + 1)]
  q = []
  for j in range(num_drafts):
    kind = rng.integers(1 if one_hot else 6, size=(count, V**j, 1))
    hot = np.eye(V)[rng.integers(V, size=(count, V**j))]
    q.append(np.select([kind == 0, kind == 1], [hot, p[j]], draw(V**j)))
  return Tree(p, q)


def strings(length):
  """Returns all [V^length, length] token strings, in the order of the tree's nodes."""
  return enumerated(V, length)


def cells(length):
  """Returns [2^length, length]: 0 below a threshold, 1 at or above it."""
  return enumerated(2, length)


def enumerated(base, length):
  every = list(itertools.product(range(base), repeat=length))
  return np.array(every, int).reshape(base**length, length)


def node(tokens, length):
  """Returns the number of the node at the first `length` of tokens [..., T]."""
  return tokens[..., :length] @ V ** np.arange(length)[::-1]


def rows_along(nodes, paths_PK):
  """Returns the distributions [N, P, rows, V] that stand along every path."""
  if not nodes:  # q without drafts.
    return np.zeros((1, 1, 0, V))
  return np.stack([x[:, node(paths_PK, j)] for j, x in enumerate(nodes)], axis=2)


def probabilities(nodes, tokens, start=0):
  """Returns the probability [N, ...] of tokens [..., T] from place `start` on."""
  result = np.ones((1, *tokens.shape[:-1]))
  for j in range(start, len(nodes)):
    result = result * nodes[j][:, node(tokens, j), tokens[..., j]]
  return result


def target_law(tree):
  return probabilities(tree.p, strings(len(tree.p)))


def outcome(tree, drafts, weight, accepted, following):
  """Returns the Outcome of rounds with given results.

  Args:
    drafts: [P, K].
    weight: [N, P, X], the probability of each round; X are cases of any kind.
    accepted: [N, P, X].
    following: [N, P, X, V], the law of the token after the accepted ones.
  """
  sequences = strings(len(tree.p))
  law = np.zeros((len(weight), len(sequences)))
  for a in range(len(tree.p)):
    agrees_PS = (sequences[None, :, :a] == drafts[:, None, :a]).all(-1)
    following_NPV = np.einsum("npx,npxv->npv", weight * (accepted == a), following)
    next_NPS = following_NPV[:, :, sequences[:, a]]
    round_NS = np.einsum("ps,nps->ns", agrees_PS, next_NPS)
    law += round_NS * probabilities(tree.p, sequences, start=a + 1)
  return Outcome(law, (weight * accepted).sum((1, 2)))


@functools.cache
def compiled(function, *static):
  return jax.jit(functools.partial(function, *static))


def sampled_outcome(
  tree, rule, module=verify, program=compiled, with_q=True, dtype=np.float64
):
  """Returns the Outcome of `verify_sampled` over all drafts and all uniforms."""
  drafts, sides = strings(len(tree.q)), cells(len(tree.q))
  shape_NPC = (len(tree.p[0]), len(drafts), len(sides))

  def batch(x):  # [N, P, ...] -> [B, ...], every row once per cell.
    x = np.broadcast_to(x[:, :, None], (*shape_NPC, *x.shape[2:]))
    return x.reshape(np.prod(shape_NPC), *x.shape[3:])

  def log(nodes):
    with np.errstate(divide="ignore"):
      return np.log(batch(rows_along(nodes, drafts))).astype(dtype)

  with jax.enable_x64(dtype == np.float64):
    log_p, log_q = log(tree.p), log(tree.q) if with_q else None
    drafts_BK = batch(np.tile(drafts, (shape_NPC[0], 1, 1))).astype(np.int32)
    thresholds, _ = program(module.acceptance_thresholds, rule)(log_p, log_q, drafts_BK)
    thresholds = np.clip(thresholds, 0, 1)  # Mutants may leave the range.
    is_above = np.tile(sides, (shape_NPC[0] * shape_NPC[1], 1)) == 1
    below = np.maximum(np.nextafter(thresholds, dtype(-1)), 0)
    accepted, log_weights = map(
      np.asarray,
      program(module.verify_sampled, rule)(
        log_p, log_q, drafts_BK, np.where(is_above, thresholds, below)
      ),
    )
  assert log_weights.dtype == dtype and accepted.dtype == np.int32
  log_weights, thresholds = np.float64(log_weights), np.float64(thresholds)
  following = np.exp(log_weights - log_weights.max(-1, keepdims=True))
  following /= following.sum(-1, keepdims=True)
  weight = np.where(is_above, 1 - thresholds, thresholds).prod(-1).reshape(shape_NPC)
  return outcome(
    tree,
    drafts,
    weight * probabilities(tree.q, drafts)[:, :, None],
    accepted.reshape(shape_NPC),
    following.reshape(*shape_NPC, V),
  )


def matched_outcome(tree, module=verify, program=compiled):
  """Returns the Outcome of `match_tokens` over all drafts and all samples of p."""
  drafts, targets = strings(len(tree.q)), strings(len(tree.p))
  pairs = (len(drafts), len(targets))
  accepted, following = program(module.match_tokens)(
    np.tile(targets, (pairs[0], 1)), np.repeat(drafts, pairs[1], axis=0)
  )
  rows = rows_along(tree.p, drafts)  # The samples of a path are independent.
  places = np.arange(targets.shape[1])
  sampled_NPX = rows[:, :, places, targets].prod(-1)
  weight = probabilities(tree.q, drafts)[:, :, None] * sampled_NPX
  accepted = np.asarray(accepted).reshape(pairs)
  following = np.eye(V)[np.asarray(following).reshape(pairs)]
  return outcome(
    tree,
    drafts,
    weight,
    np.broadcast_to(accepted, weight.shape),
    np.broadcast_to(following, (*weight.shape, V)),
  )


def error(found, tree):
  """Returns the largest error of a probability; inf if one is not a number."""
  worst = np.abs(found.law - target_law(tree)).max()
  return np.inf if np.isnan(worst) else worst


def test_the_trees_hold_what_they_are_for():
  tree = random_tree(2)
  drafts = strings(2)
  p, q = (rows_along(nodes, drafts)[:, :, :2] for nodes in tree)
  assert (p == 0).any() and ((q == 0) & (p > 0)).any() and ((p == 0) & (q > 0)).any()
  assert (p == q).all(-1).any() and (q == 1).any() and (p == 1).any()
  np.testing.assert_allclose(target_law(tree).sum(-1), 1)


@pytest.mark.parametrize("num_drafts", [0, 1, 2, 3])
@pytest.mark.parametrize("rule", SAMPLED)
def test_sampled_rules_have_the_law_of_the_target(rule, num_drafts):
  tree = random_tree(num_drafts, count=8 if num_drafts == 3 else 40)
  assert error(sampled_outcome(tree, rule), tree) < 1e-12


@pytest.mark.parametrize("num_drafts", [1, 2, 3])
def test_chosen_drafts_need_no_q(num_drafts):
  tree = random_tree(num_drafts, count=8, one_hot=True)
  found = sampled_outcome(tree, "leviathan", with_q=False)
  assert error(found, tree) < 1e-12
  with_q = [sampled_outcome(tree, rule) for rule in SAMPLED]
  for other in with_q:
    assert error(other, tree) < 1e-12
    # With chosen drafts the rule block has nothing to gain.
    np.testing.assert_allclose(other.accepted, found.accepted, 1e-12)


@pytest.mark.parametrize("rule", SAMPLED)
def test_float32_has_the_law_to_its_own_precision(rule):
  tree = random_tree(2)
  assert error(sampled_outcome(tree, rule, dtype=np.float32), tree) < 1e-6


@pytest.mark.parametrize("num_drafts", [0, 1, 2, 3])
def test_match_has_the_law_of_the_target_whatever_q_is(num_drafts):
  tree = random_tree(num_drafts)
  assert error(matched_outcome(tree), tree) < 1e-12


def test_greedy_is_greedy_whatever_the_drafts_are():
  tree, drafts = random_tree(3), strings(3)
  count = len(tree.p[0])
  best = [x.argmax(-1) for x in tree.p]
  target = np.stack([x[:, node(drafts, j)] for j, x in enumerate(best)], axis=-1)
  greedy = np.zeros((count, 4), int)
  for j, x in enumerate(best):
    greedy[:, j] = x[np.arange(count), node(greedy, j)]
  accepted, following = compiled(verify.match_tokens)(
    target.reshape(-1, 4), np.tile(drafts, (count, 1))
  )
  assert accepted.dtype == following.dtype == np.int32
  accepted, following = (
    np.asarray(x).reshape(count, -1) for x in (accepted, following)
  )
  for n, (path, draft) in itertools.product(range(count), enumerate(drafts)):
    equal = draft == greedy[n, :3]
    a = accepted[n, path]
    assert a == (3 if equal.all() else equal.argmin())
    assert following[n, path] == greedy[n, a]


def test_expected_numbers_of_kept_drafts():
  tree = random_tree(2)
  leviathan, block = (sampled_outcome(tree, rule).accepted for rule in SAMPLED)
  # First draft: sum of min(p, q). No rule can keep more than the last line allows.
  first = sampled_outcome(Tree(tree.p[:2], tree.q[:1]), "leviathan").accepted
  np.testing.assert_allclose(first, np.minimum(tree.p[0], tree.q[0]).sum((1, 2)))
  assert (leviathan <= block + 1e-12).all() and (block > leviathan + 0.01).any()
  bound = sum(
    np.minimum(probabilities(tree.p[:i], strings(i)),
               probabilities(tree.q[:i], strings(i))).sum(-1)
    for i in (1, 2)
  )
  assert (block <= bound + 1e-12).all()
  matched = matched_outcome(tree).accepted
  assert (matched <= leviathan + 1e-12).all()


def test_the_example_of_the_block_verification_paper():
  # Two tokens, whatever came before: token by token 10/9 are kept, as a block 11/9.
  p, q = np.array([1, 2, 0]) / 3, np.array([2, 1, 0]) / 3
  tree = Tree(
    [np.tile(p, (1, V**j, 1)) for j in range(3)],
    [np.tile(q, (1, V**j, 1)) for j in range(2)],
  )
  found = [sampled_outcome(tree, rule).accepted[0] for rule in SAMPLED]
  np.testing.assert_allclose(found, [10 / 9, 11 / 9])


class Mutant(NamedTuple):
  """`old` stands exactly once in verify.py; `new` is the fault."""

  rules: tuple[str, ...]
  old: str
  new: str


LOG_P_BK = "_pick(log_p_BRV[:, :-1], drafts_BK)"
LOG_Q_BK = "_pick(log_q_BKV, drafts_BK)"
PAD = "log_q_BRV = jnp.pad(log_q_BKV, ((0, 0), (0, 1), (0, 0)), "
REST = "log_a_BRV + jnp.log(-jnp.expm1(gap_BRV))"
MUTANTS = {
  "block stops at the first failure": Mutant(
    ("block",),
    '_last(passed_BK) if rule == "block" else _num_leading(passed_BK)',
    "_num_leading(passed_BK)",
  ),
  "leviathan takes the last that passes": Mutant(
    ("leviathan",),
    '_last(passed_BK) if rule == "block" else _num_leading(passed_BK)',
    "_last(passed_BK)",
  ),
  "after a rejection the token is drawn from p": Mutant(
    SAMPLED, "jnp.where(empty_BR1, log_p_BRV, log_weights_BRV)", "log_p_BRV"
  ),
  "draft compared with the p of the next row": Mutant(
    SAMPLED, LOG_P_BK, "_pick(log_p_BRV[:, 1:], drafts_BK)"
  ),
  "token drawn from the row before": Mutant(
    SAMPLED,
    "accepted_B[:, None, None], axis=1",
    "jnp.maximum(accepted_B - 1, 0)[:, None, None], axis=1",
  ),
  "bonus token drawn from the p of the last draft": Mutant(
    SAMPLED,
    PAD,
    "log_p_BRV = log_p_BRV[:, [*range(log_p_BRV.shape[1] - 1), -2]]\n  " + PAD,
  ),
  "bonus token drawn from a residual": Mutant(
    SAMPLED, PAD + "constant_values=-jnp.inf)", PAD + 'mode="edge")'
  ),
  "draft compared with the q of the row before": Mutant(
    SAMPLED, LOG_Q_BK, "_pick(jnp.roll(log_q_BKV, 1, axis=1), drafts_BK)"
  ),
  "q of the row before in the residual": Mutant(
    SAMPLED, PAD, PAD.replace("log_q_BKV", "jnp.roll(log_q_BKV, 1, axis=1)")
  ),
  "accepted at the threshold, so at 0 too": Mutant(
    SAMPLED, "uniform_BK < thresholds_BK", "uniform_BK <= thresholds_BK"
  ),
  "residual is |p - q|": Mutant(
    SAMPLED, REST, "jnp.log(jnp.abs(jnp.exp(log_a_BRV) - jnp.exp(log_b_BRV)))"
  ),
  "residual is p - q": Mutant(
    SAMPLED, REST, "jnp.log(jnp.exp(log_a_BRV) - jnp.exp(log_b_BRV))"
  ),
  "accepted with q / p": Mutant(
    SAMPLED,
    "jnp.minimum(log_ratio_BK, jnp.finfo",
    "jnp.minimum(-log_ratio_BK, jnp.finfo",
  ),
  "residual of a block without r": Mutant(
    ("block",), "log_r_BR[:, :, None] + log_p_BRV", "log_p_BRV"
  ),
  "r above 1": Mutant(
    ("block",),
    "jnp.minimum(log_r[-1] + log_ratio_BK[:, k], 0.0)",
    "jnp.minimum(log_r[-1] + log_ratio_BK[:, k], 1.0)",
  ),
  "thresholds of a block one row early": Mutant(
    ("block",), "ratio_BR[:, 1:]", "ratio_BR[:, :-1]"
  ),
  "matched with the token of the next row": Mutant(
    ("match",), "target_BR[:, :-1]", "target_BR[:, 1:]"
  ),
  "matched, and the token of the next row follows": Mutant(
    ("match",),
    "jnp.take_along_axis(target_BR, accepted_B[:, None], axis=1)",
    "jnp.take_along_axis(jnp.roll(target_BR, -1, 1), accepted_B[:, None], axis=1)",
  ),
}


def error_in_numpy(old, new, rule):
  """Returns the error of verify.py with `old` replaced, run in NumPy: none compiles."""
  source = Path(verify.__file__).read_text()
  for fragment in (old, "import jax.numpy as jnp\n"):
    assert source.count(fragment) == 1, f"the place in verify.py of {fragment!r}"
  source = source.replace("import jax.numpy as jnp\n", "import numpy as jnp\n")
  module = types.ModuleType("mutant")
  exec(source.replace(old, new), module.__dict__)
  function = matched_outcome if rule == "match" else sampled_outcome
  static = () if rule == "match" else (rule,)
  tree = random_tree(2)
  with np.errstate(all="ignore"):
    return error(function(tree, *static, module, functools.partial), tree)


@pytest.mark.parametrize("rule", ["match", *SAMPLED])
def test_the_source_is_right_in_numpy_too(rule):
  assert error_in_numpy("RULES", "RULES", rule) < 1e-12


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_have_another_law(name):
  mutant = MUTANTS[name]
  for rule in mutant.rules:
    assert error_in_numpy(mutant.old, mutant.new, rule) > 1e-3, rule


@pytest.mark.parametrize("rule", SAMPLED)
def test_uniforms_are_compared_with_the_thresholds_and_with_nothing_else(rule):
  rng = np.random.default_rng(0)
  tree, drafts = random_tree(2), strings(2)
  paths = rng.integers(len(drafts), size=len(tree.p[0]))
  rows = np.arange(len(paths))
  with np.errstate(divide="ignore"):
    log_p, log_q = (
      np.log(rows_along(nodes, drafts)[rows, paths]).astype(np.float32)
      for nodes in tree
    )
  args = log_p, log_q, drafts[paths].astype(np.int32)
  thresholds, log_weights = map(
    np.asarray, compiled(verify.acceptance_thresholds, rule)(*args)
  )
  assert (thresholds >= 0).all() and (thresholds <= 1).all()
  assert (thresholds == 0).any() and (thresholds == 1).any()
  # Both ends of [0, threshold) and of [threshold, 1), and what is in the middle.
  zero, largest = np.float32(0), np.float32(1 - 2**-24)
  below = np.nextafter(thresholds, np.float32(-1))
  for low, high in (
    (zero, largest), (below, thresholds), (thresholds / 2, (1 + thresholds) / 2)
  ):
    for cell in cells(2):
      uniform = np.clip(np.where(cell, high, low), zero, largest)
      # Where one side is empty the uniform lies on the other.
      passed = np.where(cell, thresholds == 1, thresholds > 0)
      accepted, following = compiled(verify.verify_sampled, rule)(*args, uniform)
      if rule == "block":
        expected = np.where(passed[:, 1], 2, passed[:, 0])
      else:
        expected = np.where(passed[:, 0], 1 + passed[:, 1], 0)
      np.testing.assert_array_equal(accepted, expected)
      np.testing.assert_array_equal(following, log_weights[rows, expected])


@pytest.mark.parametrize("rule", SAMPLED)
def test_equal_laws_rejected_by_rounding_give_p_itself(rule):
  log_p = np.log(np.float32([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]]))
  drafts = np.int32([[2, 0]])
  one = np.ones((1, 2), np.float32)  # No uniform is 1: nothing else could reject.
  accepted, log_weights = compiled(verify.verify_sampled, rule)(
    log_p, log_p[:, :-1], drafts, one
  )
  assert accepted == 0
  np.testing.assert_array_equal(log_weights, log_p[:, 0])


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 1e3])
def test_extreme_logits_in_float32(temperature):
  rng = np.random.default_rng(0)
  size, vocab = 300, 5
  choices = np.float32([1e9, -1e9, 0, 1, -np.inf])
  logits = rng.choice(choices, size=(2, size, 4, vocab))
  logits[..., 0] = np.where(np.isneginf(logits).all(-1), 0, logits[..., 0])
  settings = Warp(np.float32(temperature))
  log_p, log_q = (np.asarray(compiled(warp)(x, settings)) for x in logits)
  log_q = log_q[:, :-1]
  gumbel = rng.gumbel(size=log_q.shape).astype(np.float32)
  sampled = np.asarray(compiled(verify.sample_tokens)(log_q, gumbel))
  anything = rng.integers(vocab, size=sampled.shape, dtype=np.int32)
  zeros = np.zeros(sampled.shape, np.float32)
  for (rule, q), drafts in itertools.product(
    (("leviathan", log_q), ("leviathan", None), ("block", log_q)), (sampled, anything)
  ):
    args = log_p, q, drafts
    thresholds, weights = map(
      np.asarray, compiled(verify.acceptance_thresholds, rule)(*args)
    )
    assert ((thresholds >= 0) & (thresholds <= 1)).all()
    assert not np.isnan(weights).any() and (weights.max(-1) > -np.inf).all()
    assert (weights[np.isneginf(log_p)] == -np.inf).all()
    accepted, _ = compiled(verify.verify_sampled, rule)(*args, zeros)
    is_kept = np.arange(drafts.shape[1]) < np.asarray(accepted)[:, None]
    p_of_drafts = np.take_along_axis(log_p[:, :-1], drafts[..., None], -1)[..., 0]
    assert is_kept.any() and (p_of_drafts[is_kept] > -np.inf).all()


def test_samples_have_the_law_of_the_weights():
  probs = np.array([0.5, 0.0, 0.2, 0.3])
  gumbel = np.random.default_rng(0).gumbel(size=(100_000, 4)).astype(np.float32)
  with np.errstate(divide="ignore"):
    log_weights = np.log(probs).astype(np.float32) + 3
  tokens = np.asarray(compiled(verify.sample_tokens)(log_weights, gumbel))
  assert tokens.dtype == np.int32
  found = np.bincount(tokens, minlength=4) / tokens.size
  assert (np.abs(found - probs) <= 5 * np.sqrt(probs * (1 - probs) / tokens.size)).all()


@pytest.mark.parametrize("rule", ["greedy", "match", "typical"])
def test_rules_without_probabilities_are_refused(rule):
  args = np.zeros((1, 2, V)), np.zeros((1, 1, V)), np.zeros((1, 1), int)
  with pytest.raises(ValueError, match=f"'leviathan' or 'block', got '{rule}'"):
    verify.acceptance_thresholds(rule, *args)


def test_block_refuses_chosen_drafts():
  args = np.zeros((1, 2, V)), None, np.zeros((1, 1), int)
  with pytest.raises(ValueError, match=r"'block' needs .* got log_q_BKV None"):
    verify.acceptance_thresholds("block", *args)
