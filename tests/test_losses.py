"""The blockwise loss against all logits at once: values, gradients, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base
from mtp_jax.losses import (
  OBJECTIVES,
  Teacher,
  loss_coefficients,
  loss_sums,
  token_stats,
)
from mtp_jax.sharding import tokens_per_block
from tests.common import assert_trees_close

M, B, T, D, V = 4, 2, 9, 6, 11


def plain_loss(hidden_MBTD, unembed_DV, targets_MBT, mask_MBT, coefficients_M):
  """Returns `(total, (nll_M, correct_M))` straight from the definition."""
  logits = (hidden_MBTD @ unembed_DV).astype(jnp.promote_types(hidden_MBTD.dtype, "f4"))
  picked = jnp.take_along_axis(logits, targets_MBT[..., None], -1)[..., 0]
  nll = jax.nn.logsumexp(logits, -1) - picked
  nll_M = jnp.where(mask_MBT, nll, 0).sum((1, 2))
  correct_M = (mask_MBT & (logits.argmax(-1) == targets_MBT)).sum((1, 2))
  return coefficients_M @ nll_M, (nll_M, correct_M)


def blockwise_loss(block_tokens, *args):
  sums = loss_sums(*args, block_tokens)
  return sums.total, (sums.nll_M, sums.correct_M)


def inputs(seed=0, dtype=np.float64, empty_depth=False, valid=0.7):
  rng = np.random.default_rng(seed)
  hidden = rng.standard_normal((M, B, T, D)).astype(dtype)
  unembed = rng.standard_normal((D, V)).astype(dtype)
  targets = rng.integers(0, V, (M, B, T))
  mask = rng.random((M, B, T)) < valid
  if empty_depth:
    mask[2] = False
  weights = np.array([1, 0.3, 0.2, 0.5], np.promote_types(dtype, np.float32))
  return hidden, unembed, targets, mask, loss_coefficients(weights, mask)


def value_and_gradients(function, args):
  differentiated = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
  return jax.jit(differentiated)(*args)


@pytest.mark.parametrize(
  "block_tokens",
  [1, 5, 7, 9, 18, 1000],  # 18 tokens a depth: 5 and 7 do not divide them.
)
def test_equals_all_logits_at_once_in_float64(block_tokens):
  with jax.enable_x64(True):
    args = inputs(empty_depth=block_tokens == 7)
    found = value_and_gradients(functools.partial(blockwise_loss, block_tokens), args)
    expected = value_and_gradients(plain_loss, args)
    assert found[1][0].dtype == np.float64
    assert_trees_close(found, expected, rtol=1e-12, atol=1e-14)
    value_only = jax.jit(functools.partial(blockwise_loss, block_tokens))(*args)
    assert_trees_close(value_only, expected[0], rtol=1e-12, atol=1e-14)


def distance(objective, p, q):
  if objective == "kl":
    return jnp.sum(p * (jnp.log(p) - jnp.log(q)), -1)
  distance = 0.5 * jnp.sum(jnp.abs(p - q), -1)
  return distance if objective == "tv" else -jnp.log(1 - distance)


@pytest.mark.parametrize("objective", ["kl", "tv", "log_acceptance"])
def test_distances_to_a_teacher_equal_their_definitions(objective):
  with jax.enable_x64(True):
    hidden, unembed, targets, mask, coefficients = inputs()
    teacher = Teacher(*inputs(seed=1)[:2])

    def plain(hidden_MBTD, unembed_DV):
      p = jax.nn.softmax(teacher.hidden_MBTD @ teacher.unembed_DV)
      values = distance(objective, p, jax.nn.softmax(hidden_MBTD @ unembed_DV))
      return coefficients @ jnp.where(mask, values, 0).sum((1, 2))

    def blockwise(hidden_MBTD, unembed_DV):
      sums = loss_sums(
        hidden_MBTD, unembed_DV, targets, mask, coefficients, 5, objective, teacher
      )
      return sums.total, (sums.weighted_M, sums.nll_M, sums.correct_M)

    expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(hidden, unembed)
    found = value_and_gradients(blockwise, (hidden, unembed))
    (total, (weighted_M, *reports)), gradients = found
    assert_trees_close((total, gradients), expected, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(weighted_M.sum(), total, rtol=1e-12)
    # What is reported is of the data, whatever is learnt.
    _, of_data = plain_loss(hidden, unembed, targets, mask, coefficients)
    assert_trees_close(tuple(reports), of_data, rtol=1e-12, atol=1e-14)
    value_only = jax.jit(blockwise)(hidden, unembed)[0]
    np.testing.assert_allclose(value_only, total, rtol=1e-12)


def test_distributions_without_overlap_still_have_a_gradient():
  far = 500.0 * np.eye(V, dtype=np.float32)
  for objective in OBJECTIVES:
    value, gradient = jax.jit(jax.value_and_grad(
      lambda x, objective=objective: OBJECTIVES[objective](x, far[1:2]).sum()
    ))(far[:1])
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert objective == "tv" or np.any(gradient)


def test_a_student_of_its_own_distribution_has_nothing_to_learn():
  with jax.enable_x64(True):
    args = inputs()
    teacher = Teacher(*args[:2])
    for objective in OBJECTIVES:
      total, gradient = jax.jit(jax.value_and_grad(
        lambda h, objective=objective: loss_sums(
          h, *args[1:], 5, objective, teacher
        ).total
      ))(args[0])
      np.testing.assert_allclose(total, 0, atol=1e-12)
      np.testing.assert_allclose(gradient, 0, atol=1e-12)


def test_gradient_of_a_multiple_is_the_multiple_of_the_gradient():
  args = inputs(dtype=np.float32)

  def scaled(hidden, unembed):
    return -2.5 * loss_sums(hidden, unembed, *args[2:], 4).total + 3.0

  found = jax.jit(jax.grad(scaled, argnums=(0, 1)))(*args[:2])
  _, expected = value_and_gradients(plain_loss, args)
  expected = jax.tree.map(lambda g: -2.5 * g, expected)
  assert_trees_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_depth_without_valid_tokens_adds_nothing():
  args = inputs(dtype=np.float32, empty_depth=True)
  (_, (nll_M, correct_M)), (d_hidden, _) = value_and_gradients(
    functools.partial(blockwise_loss, 5), args
  )
  assert nll_M[2] == correct_M[2] == 0 and not d_hidden[2].any()
  assert all(d_hidden[m].any() for m in (0, 1, 3))


def test_nothing_valid_gives_0_and_no_nan():
  args = inputs(dtype=np.float32, valid=0)
  found = value_and_gradients(functools.partial(blockwise_loss, 5), args)
  assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(found))


def test_masked_positions_may_hold_anything_finite():
  hidden, unembed, targets, mask, coefficients = inputs(dtype=np.float32)
  function = functools.partial(blockwise_loss, 5)
  expected = value_and_gradients(
    function, (hidden, unembed, targets, mask, coefficients)
  )
  hidden = np.where(mask[..., None], hidden, 1e4).astype(np.float32)
  targets = np.where(mask, targets, 0)
  found = value_and_gradients(function, (hidden, unembed, targets, mask, coefficients))
  assert_trees_close(found, expected, rtol=1e-6, atol=1e-7)


def test_coefficients_divide_each_depth_by_its_own_count():
  mask_MBT = np.zeros((3, 2, 4), bool)
  mask_MBT[0, :, :3] = mask_MBT[1, 0, :2] = True
  found = loss_coefficients(jnp.float32([1.0, 0.5, 0.25]), mask_MBT)
  np.testing.assert_allclose(found, [1 / 6, 0.5 / 2, 0.25])


def test_bfloat16_states_give_float32_sums_near_the_float32_loss():
  hidden, unembed, *rest = inputs(dtype=np.float32)
  rounded = jnp.bfloat16(hidden), jnp.bfloat16(unembed)
  found = value_and_gradients(
    functools.partial(blockwise_loss, 5), (*rounded, *rest)
  )
  (total, (nll_M, _)), gradients = found
  assert total.dtype == nll_M.dtype == np.float32
  assert all(g.dtype == jnp.bfloat16 for g in gradients)
  # Same rounded inputs in float32: what is left is the rounding of d logits.
  wide = tuple(x.astype(np.float32) for x in rounded)
  (exact, _), exact_gradients = value_and_gradients(plain_loss, (*wide, *rest))
  np.testing.assert_allclose(total, exact, rtol=1e-5)
  for found_g, exact_g in zip(gradients, exact_gradients, strict=True):
    atol = 0.01 * np.abs(exact_g).max()
    np.testing.assert_allclose(np.float32(found_g), exact_g, rtol=0.02, atol=atol)


@pytest.mark.parametrize("block_tokens", [5, 1000])
def test_token_stats_are_those_of_all_logits(block_tokens):
  hidden, unembed, targets, *_ = inputs(dtype=np.float32)
  rng = np.random.default_rng(1)
  own = rng.standard_normal((D, V)).astype(np.float32)

  @jax.jit
  def stats_of(hidden, unembed, own, targets):
    matrices = [(slice(0, 3), unembed), (slice(3, None), own)]
    return token_stats(hidden, matrices, targets, block_tokens)

  stats = stats_of(hidden, unembed, own, targets)
  logits = np.concatenate([hidden[:3] @ unembed, hidden[3:] @ own])
  log_probs = jax.nn.log_softmax(logits)
  expected = -np.take_along_axis(np.asarray(log_probs), targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(stats.nll_MBT, expected, 1e-5, 1e-6)
  np.testing.assert_array_equal(stats.argmax_MBT, np.argmax(log_probs, -1))


def temporary_bytes(function, depth):
  """Temporary memory of value and gradient at B = 8, T = 512, D = 256, V = 32768."""
  spec = jax.ShapeDtypeStruct
  tokens = (1 + depth, 8, 512)
  program = jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))
  compiled = program.lower(
    spec((*tokens, 256), np.float32),
    spec((256, 32768), np.float32),
    spec(tokens, np.int32),
    spec(tokens, np.bool_),
    spec((1 + depth,), np.float32),
  ).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_follows_the_block_not_the_depth():
  block_tokens = tokens_per_block(base.get_config().loss.block_tokens, 32768)
  blockwise = functools.partial(blockwise_loss, block_tokens)
  at_depth_3 = temporary_bytes(blockwise, 3)
  at_depth_0 = temporary_bytes(blockwise, 0)
  assert at_depth_3 <= 1.3 * at_depth_0
  # The states are read where they are: not even those of one depth are copied.
  assert at_depth_3 - at_depth_0 < 8 * 512 * 256 * 4
  assert 4 * at_depth_3 <= temporary_bytes(plain_loss, 3)
  large_blocks = functools.partial(blockwise_loss, 4 * block_tokens)
  assert 2.5 * at_depth_3 <= temporary_bytes(large_blocks, 3)
