"""Small models of every layout, and folders in which they are written."""

import jax
import numpy as np

from mtp_jax import interop
from mtp_jax.sharding import make_mesh
from tests import common

# With four rotated dims, pairs to halves would be its own inverse.
LATENT = common.LATENT | {"trunk.latent.rope_dim": 6}
DEEPSEEK = LATENT | common.EXPERTS
LLAMA3 = {
  "trunk.rope_scaling.kind": "llama3",
  "trunk.rope_scaling.factor": 8.0,
  "trunk.rope_scaling.original_length": 6,
}
LINEAR = {"trunk.rope_scaling.kind": "linear", "trunk.rope_scaling.factor": 2.0}
YARN = LLAMA3 | {
  "trunk.rope_scaling.kind": "yarn",
  "trunk.rope_scaling.mscale": 0.7,
  "trunk.rope_scaling.mscale_all_dim": 1.2,
}
TIED = {"trunk.tie_embeddings": True}
DIRECT = {"trunk.latent.query_rank": 0, "trunk.moe.dense_layers": 0}
# Name -> layout, and kind, depth and overrides of a config that can be written in it.
CASES = {
  "gpt2": ("gpt2", "none", 0, common.GPT2),
  "llama": ("llama", "none", 0, LLAMA3 | TIED | {"trunk.attention_dim": 24}),
  "qwen2": ("qwen2", "none", 0, LINEAR | {"trunk.qkv_bias": True}),
  "qwen3": ("qwen3", "none", 0, YARN | {"trunk.qk_norm": True}),
  "deepseek-trunk": ("deepseek_v3", "none", 0, DEEPSEEK | YARN | DIRECT),
  "deepseek": ("deepseek_v3", "sequential", 2, DEEPSEEK),
  "deepseek-dense-tied": ("deepseek_v3", "sequential", 2, LATENT | TIED),
  "mimo": ("mimo", "sequential", 1, {"trunk.qkv_bias": True, "trunk.num_kv_heads": 1}),
  "mimo-no-biases-tied": ("mimo", "sequential", 1, TIED),
}


def one_device() -> jax.sharding.Mesh:
  return make_mesh(common.tiny_config().mesh, jax.devices()[:1])


def config_of(case, overrides=None):
  """Returns the config of a case."""
  _, kind, depth, values = CASES[case]
  return common.tiny_config(kind, depth, values | (overrides or {}))


def write(case, folder, **options):
  """Writes random parameters in the layout of a case; returns them."""
  config = config_of(case)
  params = common.random_params(config)
  interop.export_params(params, config, folder, CASES[case][0], **options)
  return params


def assert_same_bits(actual, expected):
  """Fails with the path of the first leaf that differs."""
  common.assert_trees_close(actual, expected, rtol=0, atol=0)
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
