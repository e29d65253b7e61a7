"""Latent attention against its equations, in training, in decoding and on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import accounting
from mtp_jax.model.block import empty_cache
from mtp_jax.model.latent_attention import LatentAttention, LatentCache
from mtp_jax.sharding import logical_axes, make_mesh, put_batch, tree_shardings
from tests.common import (
  LATENT,
  assert_trees_close,
  gradient_program,
  microbatches,
  packed_batch,
  random_layer_params,
  random_params,
  tiny_config,
)

FLOAT64 = {"trunk.compute_dtype": "float64"}
DIRECT = {"trunk.latent.query_rank": 0}
YARN = {
  "trunk.rope_scaling.kind": "yarn",
  "trunk.rope_scaling.factor": 6.0,
  "trunk.rope_scaling.original_length": 16,
  "trunk.rope_scaling.mscale_all_dim": 0.9,
}


def trunk_with(*overrides):
  values = LATENT | {"trunk.attention": "xla"}
  for more in overrides:
    values = values | more
  return tiny_config(overrides=values).trunk


def cached_step(trunk, slots):
  """Returns a jitted call with a cache, and an empty cache of three rows."""

  @jax.jit
  def step(params, x_BTD, positions_BT, cache):
    return LatentAttention(trunk).apply(
      {"params": params}, x_BTD, positions_BT, jnp.zeros_like(positions_BT), cache
    )

  return step, LatentCache.zeros(trunk, 3, slots)


@pytest.mark.parametrize("options", [{}, DIRECT, YARN], ids=["low", "direct", "yarn"])
def test_absorbed_decoding_equals_the_naive_form(options):
  """Rows at different places, several tokens a call, one at a time, and none."""
  trunk, slots = trunk_with(FLOAT64, options), 9
  rng = np.random.default_rng(2)
  x_BSD = rng.normal(size=(3, slots, trunk.embed_dim))
  with jax.enable_x64(True):
    params = random_layer_params(LatentAttention(trunk), trunk)
    everywhere_BS = np.tile(np.arange(slots), (3, 1))
    expected_BSD, _ = jax.jit(LatentAttention(trunk).apply)(
      {"params": params}, x_BSD, everywhere_BS, np.ones_like(everywhere_BS)
    )
    step, cache = cached_step(trunk, slots)
    length_B, seen = np.zeros(3, int), 0
    # How many of a call's tokens each row has; the others have no slot.
    for counts_B, T in (
      ([3, 1, 0], 4), ([1, 0, 1], 1), ([4, 2, 4], 4), ([0, 1, 1], 1), ([1, 4, 3], 4)
    ):
      place_BT = length_B[:, None] + np.arange(T)
      there_BT = np.arange(T) < np.array(counts_B)[:, None]
      positions_BT = np.where(there_BT, place_BT, slots)
      x_BTD = np.take_along_axis(
        x_BSD, np.minimum(place_BT, slots - 1)[..., None], axis=1
      )
      # What a rejected draft leaves behind is never seen, and overwritten.
      stale_BT = np.minimum(place_BT, slots)
      _, cache = step(params, 7 + x_BTD, stale_BT, cache)
      out_BTD, cache = step(params, x_BTD, positions_BT, cache)
      assert np.isfinite(out_BTD).all()
      rows, columns = np.nonzero(there_BT)
      np.testing.assert_allclose(
        out_BTD[rows, columns], expected_BSD[rows, place_BT[rows, columns]],
        rtol=1e-10, atol=1e-10,
      )
      length_B += counts_B
      seen += there_BT.sum()
    assert seen == length_B.sum() > 20

    # A single row, one token at a time.
    cache = jax.tree.map(lambda x: 0 * x[:1], cache)
    for t in range(slots):
      out_BTD, cache = step(params, x_BSD[:1, t : t + 1], np.array([[t]]), cache)
      np.testing.assert_allclose(
        out_BTD[0, 0], expected_BSD[0, t], rtol=1e-10, atol=1e-10
      )


def cache_bytes_per_token(trunk):
  cache = jax.eval_shape(lambda: empty_cache(trunk, rows=1, slots=1))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def test_the_cache_holds_the_latent_and_one_rotated_key():
  trunk = trunk_with()
  cache = LatentCache.zeros(trunk, 3, 5)
  assert sum(leaf.size for leaf in cache) == 3 * 5 * (6 + 4)
  assert cache_bytes_per_token(trunk) == 4 * (6 + 4)
  half = dataclasses.replace(trunk, compute_dtype="bfloat16")
  assert cache_bytes_per_token(half) == 2 * (6 + 4)
  grouped = tiny_config().trunk  # Two kv heads of four.
  assert cache_bytes_per_token(grouped) == 4 * 2 * 2 * 4


def test_decoding_never_makes_keys_or_values_of_past_tokens():
  trunk, rows, slots = trunk_with(), 3, 1000
  step, _ = cached_step(trunk, slots)
  cache = empty_cache(trunk, rows, slots)
  params = random_layer_params(LatentAttention(trunk), trunk)
  jaxpr = jax.make_jaxpr(step.__wrapped__)(
    params, jnp.zeros((rows, 1, 16)), jnp.zeros((rows, 1), int), cache
  )
  largest = max(
    leaf.aval.size for equation in jaxpr.eqns for leaf in equation.outvars
  )
  assert largest == cache.latent_BSZ.size  # Keys would be 6, values 2 times as much.


def test_a_token_sees_its_document_up_to_its_place_and_nothing_else():
  trunk = trunk_with()
  segments = np.repeat([1, 2, 0], [4, 3, 2])
  positions = np.concatenate([np.arange(n) for n in (4, 3, 2)])
  x_TD = np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32)
  params = random_layer_params(LatentAttention(trunk), trunk)

  def out_T(x_TD):
    out_BTD, _ = LatentAttention(trunk).apply(
      {"params": params}, x_TD[None], positions[None], segments[None]
    )
    return out_BTD[0].sum(-1)

  found_TU = np.abs(jax.jit(jax.jacrev(out_T))(x_TD)).max(-1) > 0
  same = segments[:, None] == segments
  np.testing.assert_array_equal(found_TU, same & np.tri(9, dtype=bool))


@pytest.mark.slow
def test_eight_devices_give_the_loss_and_gradients_of_one():
  weights_M = np.float32([1, 0.5])

  def run_on(axes):
    config = tiny_config(
      "sequential", 1,
      LATENT | {"trunk.num_layers": 1, "trunk.remat": "none"}
      | {f"mesh.{axis}": size for axis, size in axes.items()},
    )
    mesh = make_mesh(config.mesh, jax.devices()[: np.prod([*axes.values(), 1])])
    layout = tree_shardings(mesh, logical_axes(accounting.abstract_params(config)))
    with jax.set_mesh(mesh):
      params = jax.device_put(random_params(config), layout)
      batch = put_batch(mesh, microbatches(packed_batch(config)), ("microbatch",))
      return jax.device_get(gradient_program(config)(params, batch, weights_M))

  found = run_on({"fsdp": 2, "tensor": 2, "context": 2})
  assert_trees_close(found, run_on({}), rtol=1e-4, atol=1e-5)
