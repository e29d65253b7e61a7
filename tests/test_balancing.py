"""The balancing bias: which way it moves, when, and what else may not move it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.balancing import update_biases, violation
from mtp_jax.model.moe import Moe
from mtp_jax.program import program_config
from mtp_jax.sharding import make_mesh
from mtp_jax.train_state import Hyperparameters
from mtp_jax.train_step import programs
from tests.common import (
  microbatches,
  packed_batch,
  random_params,
  tiny_config,
)

MOE = {
  "trunk.num_layers": 1,
  "trunk.num_kv_heads": 4,
  "trunk.remat": "none",
  "trunk.moe.num_experts": 4,
  "trunk.moe.expert_dim": 8,
  "trunk.moe.dense_layers": 0,
  "trunk.moe.bias_rate": 0.01,
  "trunk.moe.bias_until": 0.5,
  "trunk.moe.balance_weight": 0.1,
}
GAMMA = tiny_config(overrides=MOE).trunk.moe


def params_with(bias, other=0.0):
  return {"blocks": {"moe": {"bias": jnp.float32(bias), "router": jnp.float32(other)}}}


def bias_of(tree):
  return np.asarray(tree["blocks"]["moe"]["bias"])


def test_too_little_load_lifts_the_bias_and_too_much_lowers_it():
  params = {"trunk": params_with([[0.5, 0, 0, 0], [0, 0, 0, 1.0]]), "embed": 3.0}
  load = {"trunk": jnp.float32([[4, 0, 2, 2], [1, 1, 1, 1]])}  # Means 2 and 1.
  moved = update_biases(GAMMA, params, load, jnp.float32(0.1))
  expected = [[0.49, 0.01, 0, 0], [0, 0, 0, 1.0]]
  np.testing.assert_allclose(bias_of(moved["trunk"]), expected, rtol=1e-6)
  assert moved["trunk"]["blocks"]["moe"]["router"] == 0
  assert moved["embed"] == 3.0


@pytest.mark.parametrize(
  "rate, progress, moves", [(0.01, 0.49, True), (0.01, 0.5, False), (0.0, 0.1, False)]
)
def test_the_bias_moves_until_the_schedule_ends(rate, progress, moves):
  moe = dataclasses.replace(GAMMA, bias_rate=rate)
  params = {"trunk": params_with([[0.0, 0.0]])}
  load = {"trunk": jnp.float32([[3, 1]])}
  found = bias_of(update_biases(moe, params, load, jnp.float32(progress))["trunk"])
  np.testing.assert_allclose(found, [[-0.01, 0.01]] if moves else [[0, 0]], rtol=1e-6)


def test_a_shared_module_balances_the_sum_of_its_depths():
  params = {"mtp": params_with([0.0, 0.0])}
  load = {"mtp": jnp.float32([[3, 1], [3, 1], [0, 9]])}
  found = update_biases(GAMMA, params, load, jnp.float32(0))
  np.testing.assert_allclose(bias_of(found["mtp"]), [0.01, -0.01], rtol=1e-6)


def test_a_part_that_is_not_trained_is_left_out():
  load = {"trunk": jnp.float32([[3, 1]]), "mtp": jnp.float32([[3, 1]])}
  found = update_biases(GAMMA, {"mtp": params_with([[0.0, 0.0]])}, load, jnp.float32(0))
  assert set(found) == {"mtp"}
  np.testing.assert_allclose(bias_of(found["mtp"]), [[-0.01, 0.01]], rtol=1e-6)


def test_violation_is_the_excess_of_the_largest_load():
  found = violation(np.float32([[4, 2, 2, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
  np.testing.assert_array_equal(found, [1, 0, np.nan])


def test_the_bias_evens_out_the_load_of_a_skewed_router():
  trunk = tiny_config(overrides=MOE).trunk
  layer, rng = Moe(trunk), np.random.default_rng(0)
  draw = lambda *shape: jnp.float32(rng.standard_normal(shape))  # noqa: E731
  direction = draw(16)
  params = {
    "router": draw(16, 4) / 4 + direction[:, None] * jnp.float32([0.2, 0, -0.2, 0]),
    "bias": jnp.zeros(4),
    "experts": {
      "gate": draw(4, 16, 8), "up": draw(4, 16, 8), "down": draw(4, 8, 16)
    },
    "shared": {"gate": draw(16, 8), "up": draw(16, 8), "down": draw(8, 16)},
  }

  @jax.jit
  def train(bias):
    def step(bias, key):
      x_BTD = direction + jax.random.normal(key, (4, 64, 16))
      _, routing = layer.apply(
        {"params": params | {"bias": bias}}, x_BTD, jnp.ones((4, 64), int)
      )
      found = {"trunk": params_with(bias[None])}
      load = {"trunk": routing.load_E[None]}
      moved = update_biases(trunk.moe, found, load, jnp.float32(0))
      return moved["trunk"]["blocks"]["moe"]["bias"][0], routing.load_E

    return jax.lax.scan(step, bias, jax.random.split(jax.random.key(0), 300))

  _, load_SE = jax.device_get(train(params["bias"]))
  found = violation(load_SE)
  assert found[0] > 0.5
  assert np.mean(found[-50:]) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_in_a_step_only_the_load_moves_the_bias(kind):
  config = tiny_config(
    "sequential",
    2,
    MOE | {"mtp.share_modules": True, "optimizer.kind": kind, "mtp.weight": 1.0},
  )
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  compiled = programs(program_config(config), mesh)
  hyper = Hyperparameters(*jnp.float32([0.1, 1.0, 10.0]))
  start = random_params(config)
  batch = microbatches(packed_batch(config, padding=True))
  biases = lambda p: {  # noqa: E731
    "trunk": p["trunk"]["blocks"]["moe"]["bias"],
    "mtp": p["mtp"]["modules"]["block"]["moe"]["bias"],
  }

  def step(params, number=0):
    state = compiled.init(jnp.int32(0)).replace(
      params=jax.tree.map(jnp.array, params), step=jnp.int32(number)
    )
    return jax.device_get(compiled.step(state, batch, hyper, jnp.bool_(True)))

  after, report = step(start)
  tokens = np.count_nonzero(batch.segment_ids)
  assert tokens < batch.segment_ids.size
  assert report["load"]["mtp"].shape == (2, 4)
  for part, before in biases(start).items():
    load = report["load"][part]
    np.testing.assert_array_equal(load.sum(axis=1), 2 * tokens)
    load = load.reshape(-1, *before.shape).sum(axis=0)
    error = load.mean(axis=-1, keepdims=True) - load
    moved = biases(after.params)[part] - before
    np.testing.assert_allclose(moved, 0.01 * np.sign(error), atol=1e-7)
    assert np.abs(moved).max() > 0
  router = after.params["trunk"]["blocks"]["moe"]["router"]
  assert np.abs(router - start["trunk"]["blocks"]["moe"]["router"]).min() > 0

  # With gamma at its end nothing moves it, weight decay and momentum included.
  late, _ = step(start, number=5)
  for part, before in biases(start).items():
    np.testing.assert_array_equal(biases(late.params)[part], before)

  broken = jax.tree.map(np.copy, start)
  broken["final_norm"]["scale"][0] = np.nan
  skipped, report = step(broken)
  assert report["nonfinite_total"] == 1
  for part, before in biases(start).items():
    np.testing.assert_array_equal(biases(skipped.params)[part], before)
  assert not any(np.any(load) for load in report["load"].values())
