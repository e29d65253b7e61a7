"""What every depth sees, by the gradient of each loss to each embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.model.lm import MtpLm, unembed_matrix
from mtp_jax.targets import future_targets
from tests.common import (
  KINDS,
  SHARED,
  TRUNKS,
  batch_of,
  quick_jit,
  random_params,
  tiny_config,
)

LENGTH, DEPTH = 12, 3
# The third document goes on after the row; every position has its own token.
SEGMENTS = np.repeat([1, 2, 3], [5, 4, 7])
TOKENS = np.random.default_rng(0).permutation(len(SEGMENTS))
CASES = [(kind, {}) for kind, _ in KINDS] + [("sequential", SHARED)]


def influence(config, batch):
  """Returns |d loss[m, i] / d embedding[u]| as [M, T, T + M], and the mask."""
  params = random_params(config)
  unembed_DV = unembed_matrix(params, config)
  targets_MBT, mask_MBT = future_targets(batch, config.mtp.depth)

  def losses(table_VD):
    hidden_MBTD = MtpLm(config).apply(
      {"params": params | {"embed": {"embedding": table_VD}}}, batch
    )
    log_probs = jax.nn.log_softmax(hidden_MBTD @ unembed_DV)
    nll_MBT = -jnp.take_along_axis(log_probs, targets_MBT[..., None], -1)[..., 0]
    return jnp.where(mask_MBT, nll_MBT, 0.0)[:, 0]

  jacobian_MTVD = quick_jit(jax.jacrev(losses))(params["embed"]["embedding"])
  norms_MTV = np.abs(jacobian_MTVD).max(-1)
  in_batch = np.isin(np.arange(norms_MTV.shape[-1]), TOKENS)
  assert not norms_MTV[..., ~in_batch].any()
  return norms_MTV[..., TOKENS], np.asarray(mask_MBT[:, 0])


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("kind, options", CASES)
def test_a_loss_sees_its_document_up_to_its_place_and_nothing_else(
  kind, options, trunk
):
  depth = 0 if kind == "none" else DEPTH
  overrides = TRUNKS[trunk] | options | {"data.seq_len": LENGTH}
  config = tiny_config(kind, depth, overrides)
  batch = batch_of([TOKENS], [SEGMENTS], LENGTH)
  found_MTU, mask_MT = influence(config, batch)
  for m in range(1 + depth):
    # Depth m of the chain is given the m tokens before the one it predicts.
    ahead = m if kind == "sequential" else 0
    for i in range(LENGTH):
      same_document = SEGMENTS == SEGMENTS[i]
      may_see = same_document & (np.arange(len(SEGMENTS)) <= i + ahead) & mask_MT[m, i]
      np.testing.assert_array_equal(found_MTU[m, i] > 0, may_see, f"depth {m} at {i}")
