"""Rotary positions: the rotation, and its frequencies against published ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_jax.model.rotary import frequencies, rotate, rotation_scale, softmax_gain
from tests.common import tiny_config


def trunk_of(kind="none", theta=10_000.0, **scaling):
  options = {f"trunk.rope_scaling.{key}": value for key, value in scaling.items()}
  return tiny_config(
    overrides={"trunk.rope_scaling.kind": kind, "trunk.rope_theta": theta} | options
  ).trunk


def test_each_pair_turns_by_its_angle():
  trunk = trunk_of("yarn", factor=8.0, mscale=0.7)
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x_BTNH = rng.normal(size=(2, 3, 4, 6))
    positions_BT = np.array([[0, 1, 2], [9, 5, 0]])
    rotated_BTNH = rotate(jnp.asarray(x_BTNH), jnp.asarray(positions_BT), trunk)
    assert rotated_BTNH.dtype == jnp.float64
  angles = positions_BT[:, :, None, None] * frequencies(trunk, 6)
  pairs = (x_BTNH[..., :3] + 1j * x_BTNH[..., 3:]) * np.exp(1j * angles)
  pairs *= 0.1 * 0.7 * np.log(8.0) + 1
  expected = np.concatenate([pairs.real, pairs.imag], axis=-1)
  np.testing.assert_allclose(rotated_BTNH, expected, rtol=1e-12, atol=1e-12)


def test_a_fraction_turns_as_a_smaller_head_does_and_the_rest_stays():
  trunk = trunk_of("yarn", factor=8.0, mscale=0.7)
  half = dataclasses.replace(trunk, rope_fraction=0.5)
  x_BTNH = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 12)))
  positions_BT = jnp.array([[0, 1, 2], [9, 5, 0]])
  found = rotate(x_BTNH, positions_BT, half)
  np.testing.assert_array_equal(
    found[..., :6], rotate(x_BTNH[..., :6], positions_BT, trunk)
  )
  np.testing.assert_array_equal(found[..., 6:], x_BTNH[..., 6:])


def test_low_precision_is_rounded_once():
  x_BTNH = np.random.default_rng(0).normal(size=(1, 2, 1, 8)).astype(jnp.bfloat16)
  positions_BT = jnp.array([[1000, 1001]])
  found = rotate(jnp.asarray(x_BTNH), positions_BT, trunk_of())
  wide = rotate(jnp.asarray(x_BTNH, jnp.float32), positions_BT, trunk_of())
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))


def test_frequencies_of_the_released_models():
  plain = 10_000.0 ** (-np.arange(32) / 32)
  np.testing.assert_allclose(frequencies(trunk_of(), 64), plain)
  linear = trunk_of("linear", factor=4.0)
  np.testing.assert_allclose(frequencies(linear, 64), plain / 4)

  # DeepSeek-V3: 4096 tokens hold 32 turns at index 10.5, and 1 turn at index 22.5.
  deepseek = trunk_of(
    "yarn", factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0
  )
  found = frequencies(deepseek, 64) / plain
  np.testing.assert_allclose(found[:11], 1)
  np.testing.assert_allclose(found[23:], 1 / 40)
  np.testing.assert_allclose(found[11:23], 1 - np.arange(1, 13) / 13 * (1 - 1 / 40))
  assert rotation_scale(deepseek) == 1
  assert softmax_gain(deepseek) == pytest.approx(1.368888, abs=1e-6)

  # Llama 3.1: 8192 tokens hold 4 turns of wave length 2048 and 1 of 8192.
  llama = trunk_of("llama3", 500_000.0, factor=8.0, original_length=8192)
  plain = 500_000.0 ** (-np.arange(64) / 64)
  found, length = frequencies(llama, 128) / plain, 2 * np.pi / plain
  np.testing.assert_allclose(found[length < 2048], 1)
  np.testing.assert_allclose(found[length > 8192], 1 / 8)
  between = (length > 2048) & (length < 8192)
  kept = (8192 / length[between] - 1) / 3
  assert kept.size > 3
  np.testing.assert_allclose(found[between], kept + (1 - kept) / 8)
  assert rotation_scale(llama) == softmax_gain(llama) == 1


@st.composite
def scalings(draw):
  """Draws `(theta, width, rope_scaling)`."""
  kind = draw(st.sampled_from(("none", "linear", "llama3", "yarn")))
  theta = draw(st.floats(50.0, 1e6))
  width = 2 * draw(st.integers(1, 48))
  if kind == "none":
    return theta, width, {"kind": kind}
  scaling = {"kind": kind, "factor": draw(st.floats(1.0, 64.0))}
  if kind != "linear":
    scaling["original_length"] = draw(st.integers(4, 32_768))
  if kind == "llama3":
    low = draw(st.floats(0.25, 8.0))
    scaling["low_freq_factor"] = low
    scaling["high_freq_factor"] = low + draw(st.floats(0.5, 8.0))
  if kind == "yarn":
    slow = draw(st.floats(0.25, 4.0))
    scaling["beta_slow"] = slow
    scaling["beta_fast"] = slow + draw(st.floats(0.25, 64.0))
    # Transformers wants both, or takes 1 and 0.
    both = st.tuples(st.floats(0.1, 2.0), st.floats(0.1, 2.0))
    pair = draw(st.one_of(st.just((1.0, 0.0)), both))
    scaling["mscale"], scaling["mscale_all_dim"] = pair
  return theta, width, scaling


@settings(max_examples=150, deadline=None)
@given(scalings())
def test_frequencies_and_factors_equal_transformers(drawn):
  pytest.importorskip("transformers", reason="the parity test needs transformers")
  from transformers import LlamaConfig
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
  from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

  theta, width, scaling = drawn
  trunk = trunk_of(theta=theta, **scaling)
  names = {"kind": "rope_type", "original_length": "original_max_position_embeddings"}
  peer = {names.get(key, key): value for key, value in scaling.items()}
  peer["rope_theta"] = theta
  if peer.get("mscale_all_dim") == 0:
    del peer["mscale_all_dim"]
  if scaling["kind"] == "none":
    peer["rope_type"] = "default"
  config = LlamaConfig(head_dim=width, rope_parameters=peer)
  if scaling["kind"] == "none":
    compute = deepseek.DeepseekV3RotaryEmbedding.compute_default_rope_parameters
  else:
    compute = ROPE_INIT_FUNCTIONS[peer["rope_type"]]
  expected, factor = compute(config)
  # Theirs are in float32, and llama3 amplifies the rounding of the number of turns.
  np.testing.assert_allclose(frequencies(trunk, width), expected.numpy(), rtol=2e-5)
  assert rotation_scale(trunk) == pytest.approx(factor, rel=1e-12)
  gain = deepseek.yarn_apply_mscale(peer, 1.0)
  assert softmax_gain(trunk) ** 2 == pytest.approx(gain, rel=1e-12)
