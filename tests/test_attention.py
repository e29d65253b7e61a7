"""Grouped attention: its cache says what training says, with every option."""

import numpy as np
import pytest

from mtp_jax.model.attention import Attention, KVCache
from tests.common import GPT2, quick_jit, random_layer_params, tiny_config

OPTIONS = {"trunk.qkv_bias": True, "trunk.qk_norm": True, "trunk.attention_dim": 32}


@pytest.mark.parametrize("overrides", [OPTIONS, GPT2], ids=["llama", "gpt2"])
def test_cached_decoding_equals_training(overrides):
  trunk = tiny_config(overrides=overrides).trunk
  layer = Attention(trunk)
  params = random_layer_params(layer, trunk)
  x_BTD = np.random.default_rng(0).normal(size=(2, 7, 16)).astype(np.float32)
  positions_BT = np.tile(np.arange(7), (2, 1))
  ones_BT = np.ones_like(positions_BT)
  apply = quick_jit(layer.apply)
  expected_BTD, _ = apply({"params": params}, x_BTD, positions_BT, ones_BT)
  assert np.abs(expected_BTD).max() > 0.1
  cache = KVCache.zeros(trunk, 2, 7)
  for new in (slice(0, 4), slice(4, 5), slice(5, 7)):
    out_BTD, cache = apply(
      {"params": params}, x_BTD[:, new], positions_BT[:, new], ones_BT[:, new], cache
    )
    np.testing.assert_allclose(out_BTD, expected_BTD[:, new], rtol=1e-4, atol=1e-5)
