"""Grouped attention: its cache says what training says, with every option; and both
kinds of attention where the cache holds a tree."""

import jax
import numpy as np
import pytest

from mtp_jax.model import attention
from mtp_jax.model.attention import Attention, KVCache
from mtp_jax.model.block import empty_cache
from mtp_jax.model.cache_slots import Places
from mtp_jax.model.latent_attention import LatentAttention
from tests.common import GPT2, LATENT, mostly_slow, random_layer_params, tiny_config

OPTIONS = {"trunk.qkv_bias": True, "trunk.qk_norm": True, "trunk.attention_dim": 32}


@pytest.fixture(params=[1, 4], ids=["whole", "parts"])
def parts(request, monkeypatch):
  """Into how many arrays a cache goes, as a large one does on a CPU."""
  if request.param > 1:
    monkeypatch.setattr(attention, "_PARTS", request.param)
    monkeypatch.setattr(attention, "_LEAST_BYTES", 0)
  return request.param


@pytest.mark.parametrize("overrides", [OPTIONS, GPT2], ids=["llama", "gpt2"])
def test_cached_decoding_equals_training(overrides, parts):
  trunk = tiny_config(overrides=overrides).trunk
  layer = Attention(trunk)
  params = random_layer_params(layer, trunk)
  x_BTD = np.random.default_rng(0).normal(size=(2, 7, 16)).astype(np.float32)
  positions_BT = np.tile(np.arange(7), (2, 1))
  ones_BT = np.ones_like(positions_BT)
  apply = jax.jit(layer.apply)
  expected_BTD, _ = apply({"params": params}, x_BTD, positions_BT, ones_BT)
  assert np.abs(expected_BTD).max() > 0.1
  cache = KVCache.zeros(trunk, 2, 7)
  assert [len(x) for x in cache] == [parts, parts]
  for new in (slice(0, 4), slice(4, 5), slice(5, 7)):
    out_BTD, cache = apply(
      {"params": params}, x_BTD[:, new], positions_BT[:, new], ones_BT[:, new], cache
    )
    np.testing.assert_allclose(out_BTD, expected_BTD[:, new], rtol=1e-4, atol=1e-5)


# Two tokens that all share, then nodes by the line from the first node to each; their
# slots are in another order.
LINES = ((0,), (1,), (0, 2), (0, 3), (1, 4), (0, 3, 5))
SLOTS = (2, 5, 3, 7, 4, 6)


# A latent cache is never in parts.
@pytest.mark.parametrize(
  "kind, overrides, parts",
  mostly_slow(
    [
      (Attention, OPTIONS, 1),
      (Attention, GPT2, 4),
      (LatentAttention, LATENT, 1),
    ],
    (Attention, OPTIONS, 1),
  ),
  ids=["llama", "gpt2-parts", "latent"],
  indirect=["parts"],
)
def test_a_node_says_what_its_line_says_and_can_be_moved(kind, overrides, parts):
  trunk = tiny_config(overrides=overrides).trunk
  layer = kind(trunk)
  params = random_layer_params(layer, trunk)
  x_BTD = np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)
  apply = jax.jit(layer.apply)

  def run(rows, places, *cache):
    segments_BT = np.ones((2, len(rows)), int)
    return apply({"params": params}, x_BTD[:, rows], places, segments_BT, *cache)

  in_a_line = lambda *positions: np.tile(positions, (2, 1))  # noqa: E731
  _, before = run([0, 1], in_a_line(0, 1), empty_cache(trunk, 2, 9))
  visible_BTS = np.zeros((2, 6, 9), bool)
  visible_BTS[:, :, :2] = True
  for row, line in enumerate(LINES):
    visible_BTS[:, row, [SLOTS[node] for node in line]] = True
  position_BT = in_a_line(*(1 + len(line) for line in LINES))
  places = Places(position_BT, in_a_line(*SLOTS), visible_BTS)
  found_BTD, cache = run(list(range(2, 8)), places, before)

  for line in LINES:
    rows = [0, 1, *(2 + node for node in line)]
    alone_BTD, _ = run(rows, in_a_line(*range(len(rows))))
    np.testing.assert_allclose(
      found_BTD[:, line[-1]], alone_BTD[:, -1], rtol=1e-4, atol=1e-5
    )

  # The last line, moved behind the first tokens; a slot that is not there takes none.
  line_BT = in_a_line(*(SLOTS[node] for node in (*LINES[-1], 1)))
  moved = cache.move(line_BT, in_a_line(2, 3, 4, 9))
  _, expected = run([2, 5, 7], in_a_line(2, 3, 4), before)
  for leaf, reference in zip(*map(jax.tree.leaves, (moved, expected)), strict=True):
    axis = leaf.shape.index(9)
    np.testing.assert_allclose(
      np.take(leaf, range(5), axis), np.take(reference, range(5), axis), rtol=1e-5,
      atol=1e-6,
    )
