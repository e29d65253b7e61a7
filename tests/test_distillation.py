"""Extra depths that learn from the trunk, and output matrices of their own.

The losses of a step against sums over positions in numpy, one at a time.
"""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from mtp_jax.lm import MtpLm, on_trunk, unembed_matrix
from mtp_jax.sharding import unbox
from tests.common import (
  assert_trees_close,
  gradient_program,
  microbatches,
  mostly_slow,
  packed_batch,
  random_params,
  tiny_config,
)

DEPTH = 3
WEIGHTS_M = np.array([1, 0.5, 0.3, 0.2], np.float32)
OWN = {"mtp.unembed": "own"}
FROZEN = {"train.freeze_trunk": True}
EAGLE_LIKE = {"mtp.objective": "kl", "mtp.feature_weight": 10.0}


def losses_by_position(config, params, batch):
  """Returns the objective's mean of every depth, and how many positions it has."""
  hidden_MBTD = np.float64(jax.jit(MtpLm(config).apply)({"params": params}, batch))
  rows, length = batch.tokens.shape
  tokens = np.concatenate([batch.tokens, batch.next_tokens], axis=1)
  segments = np.concatenate([batch.segment_ids, batch.next_segment_ids], axis=1)
  matrices = [unembed_matrix(params, config, m) for m in range(1 + DEPTH)]
  matrices = [np.float64(matrix) for matrix in matrices]
  from_trunk = config.mtp.objective != "cross_entropy" or config.mtp.feature_weight > 0
  sums, counts = np.zeros(1 + DEPTH), np.zeros(1 + DEPTH)
  for m in range(1 + DEPTH):
    for b in range(rows):
      for i in range(length):
        if segments[b, i] == 0 or segments[b, i] != segments[b, i + 1 + m]:
          continue
        if from_trunk and i + m >= length:
          continue
        counts[m] += 1
        state = hidden_MBTD[m, b, i]
        log_q = log_softmax(state @ matrices[m])
        if m == 0 or config.mtp.objective == "cross_entropy":
          sums[m] -= log_q[tokens[b, i + 1 + m]]
        if m == 0:
          continue
        of_trunk = hidden_MBTD[0, b, i + m] if i + m < length else None
        if config.mtp.objective == "kl":
          log_p = log_softmax(of_trunk @ matrices[0])
          sums[m] += np.exp(log_p) @ (log_p - log_q)
        if config.mtp.feature_weight:
          gap = np.abs(state - of_trunk)
          smooth = np.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean()
          sums[m] += config.mtp.feature_weight * smooth
  return sums / counts, counts


@pytest.mark.parametrize(
  "kind, options",
  mostly_slow(
    [
      ("medusa", OWN),
      ("medusa", OWN | FROZEN),
      ("sequential", {"mtp.objective": "kl"}),
      ("medusa", OWN | {"mtp.objective": "kl"}),
      ("sequential", EAGLE_LIKE | FROZEN),
      ("sequential", {"mtp.feature_weight": 2.0}),
      ("eagle", EAGLE_LIKE | FROZEN),
      ("eagle3", OWN | FROZEN | {"mtp.objective": "kl"}),
    ],
    ("medusa", OWN), ("sequential", {"mtp.objective": "kl"}),
  ),
)
def test_losses_equal_sums_over_positions(kind, options):
  config = tiny_config(kind, DEPTH, options)
  params, batch = random_params(config), packed_batch(config, padding=True)
  sums, counts_M, grads = gradient_program(config)(
    params, microbatches(batch, 2), WEIGHTS_M
  )
  expected_M, expected_counts_M = losses_by_position(config, params, batch)
  np.testing.assert_array_equal(counts_M, expected_counts_M)
  np.testing.assert_allclose(sums.weighted_M, WEIGHTS_M * expected_M, rtol=2e-5)
  np.testing.assert_allclose(sums.total, WEIGHTS_M @ expected_M, rtol=2e-5)
  assert grads.keys() == ({"mtp"} if options.keys() & FROZEN.keys() else params.keys())
  if options.get("mtp.unembed") == "own":
    assert np.any(grads["mtp"]["unembed"], axis=(-2, -1)).all()


def test_the_trunk_learns_nothing_as_a_teacher():
  # Only the extra depths count, and they see the trunk without gradient: then what
  # is left of the trunk's gradient is what passes through their inputs.
  config = tiny_config("medusa", DEPTH, OWN | EAGLE_LIKE)
  params, batch = random_params(config), microbatches(packed_batch(config))
  zero = jax.tree.map(np.zeros_like, params["mtp"]["kernels"])
  params["mtp"] |= {"kernels": zero, "biases": zero[:, 0] - 1e4}  # h_k = h, exactly.
  extra_M = WEIGHTS_M * np.array([0, 1, 1, 1], np.float32)
  _, _, grads = gradient_program(config)(params, batch, extra_M)
  # The trunk's own output matrix is used by the main loss and the teacher alone.
  assert not np.any(grads["unembed"]["kernel"])
  assert np.any(grads["trunk"]["blocks"]["mlp"]["down"])


@pytest.mark.slow
def test_a_frozen_trunk_changes_no_gradient_of_the_predictors():
  for kind, options in (("medusa", OWN), ("sequential", {"mtp.objective": "tv"})):
    whole, frozen = (tiny_config(kind, DEPTH, options | x) for x in ({}, FROZEN))
    params, batch = random_params(whole), microbatches(packed_batch(whole))
    found = gradient_program(frozen)(params, batch, WEIGHTS_M)
    expected = gradient_program(whole)(params, batch, WEIGHTS_M)
    assert_trees_close(found[2]["mtp"], expected[2]["mtp"], rtol=1e-4, atol=1e-6)
    assert_trees_close(found[0], expected[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied, kind", mostly_slow(
  [(True, "medusa"), (False, "eagle3")], (True, "medusa")
))
def test_own_matrices_begin_as_copies_of_the_trunks(tied, kind):
  config = tiny_config(kind, 2, OWN | {"trunk.tie_embeddings": tied})
  batch = packed_batch(config)
  init = lambda: MtpLm(config).init(jax.random.key(3), batch)["params"]  # noqa: E731
  params = unbox(jax.jit(init)())
  own = params["mtp"]["unembed"]
  shared = unembed_matrix(params, config)
  expected = np.stack([shared, shared]) if kind == "medusa" else shared
  assert np.any(shared)
  np.testing.assert_array_equal(own, expected)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  found = on_trunk(params, config, jax.tree.map(lambda x: one, params))
  np.testing.assert_array_equal(found["mtp"]["unembed"], own)
