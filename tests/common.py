"""Tiny configs, parameters and packed batches that the tests share."""

import functools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base
from mtp_jax import accounting
from mtp_jax import config as config_lib
from mtp_jax.batch import Batch
from mtp_jax.config import Config, TrunkConfig
from mtp_jax.sharding import unbox
from mtp_jax.train_step import loss_and_grads

VOCAB = 40
TINY = {
  "trunk.num_layers": 3,
  "trunk.embed_dim": 16,
  "trunk.mlp_dim": 24,
  "trunk.num_heads": 4,
  "trunk.num_kv_heads": 2,
  "tokenizer.vocab_size": VOCAB,
  "data.seq_len": 16,
  "data.batch_size": 8,
  "loss.block_tokens": 40,
  "mesh.data": 1,
}
GPT2 = {
  "trunk.kind": "gpt2",
  "trunk.num_kv_heads": 4,
  "trunk.tie_embeddings": True,
}
LATENT = {
  "trunk.attention_kind": "latent",
  "trunk.num_kv_heads": 4,
  "trunk.latent.query_rank": 10,
  "trunk.latent.kv_rank": 6,
  "trunk.latent.nope_dim": 5,
  "trunk.latent.rope_dim": 4,
  "trunk.latent.value_dim": 3,
}
EXPERTS = {
  "trunk.moe.num_experts": 8,
  "trunk.moe.experts_per_token": 3,
  "trunk.moe.expert_dim": 8,
  "trunk.moe.dense_layers": 1,
  "trunk.moe.num_groups": 4,
  "trunk.moe.groups_per_token": 2,
  "trunk.moe.route_scale": 2.5,
}
TRUNKS = {"llama": {}, "gpt2": GPT2}
# A model whose products XLA counts as we do: unrolled, none of them small.
COUNTABLE = {
  "trunk.embed_dim": 128,
  "trunk.mlp_dim": 352,
  "trunk.attention": "xla",
  "trunk.remat": "none",
  "trunk.scan_layers": False,
  "tokenizer.vocab_size": 512,
  "data.seq_len": 64,
  "data.batch_size": 4,
  "loss.block_tokens": 256,
}
KINDS = (
  ("none", 0), ("parallel", 3), ("sequential", 3), ("linear", 3), ("medusa", 3),
  ("eagle", 3), ("eagle3", 3), ("peagle", 3), ("dflash", 3),
)
SHARED = {"mtp.share_modules": True}
# What sequential modules may start from and end in besides what is published.
INPUTS = {
  "trunk": {"mtp.hidden": "trunk"},
  "shifted": {"mtp.hidden": "trunk_shifted"},
  "before": {"mtp.hidden_norm": "before"},
  "trunk-before": {"mtp.hidden": "trunk", "mtp.hidden_norm": "before"},
  "none": {"mtp.fed": "none"},
  "own": {"mtp.fed": "own"},
  "bare": {"mtp.out_norm": "none"},
}
# The modules of the minimal code: no norm at their end, RMSNorm on any trunk.
MINIMAL = INPUTS["bare"] | {"mtp.norm": "rms"}


def mostly_slow(cases: Iterable[Any], *quick: Any) -> list[Any]:
  """Returns the cases of a test, of which `make test` runs the quick ones alone."""
  return [
    case if case in quick else pytest.param(
      *(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow
    )
    for case in cases
  ]


def tiny_config(
  kind: str = "none", depth: int = 0, overrides: dict[str, Any] | None = None
) -> Config:
  """Returns a config for programs only; its vocabulary is too small for bytes."""
  values = TINY | {"mtp.kind": kind, "mtp.depth": depth} | (overrides or {})
  default = config_lib.from_config_dict(base.get_config())
  return config_lib.with_overrides(default, values)


def random_params(config: Config, seed: int = 0) -> Any:
  """Returns parameters of which none is 0 and no norm scale is 1."""
  return _drawn(unbox(accounting.abstract_params(config)), seed)


def random_layer_params(layer: nn.Module, trunk: TrunkConfig) -> Any:
  """Returns the same of one block or attention, in float64 where that is enabled."""
  x_BTD, ids_BT = jnp.zeros((1, 2, trunk.embed_dim)), jnp.zeros((1, 2), int)
  init = lambda: layer.init(jax.random.key(0), x_BTD, ids_BT, ids_BT)  # noqa: E731
  return _drawn(unbox(jax.eval_shape(init)["params"]), seed=0)


def _drawn(shapes: Any, seed: int) -> Any:
  rng = np.random.default_rng(seed)

  def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    centre = 1.0 if path[-1].key == "scale" else 0.0
    return (centre + 0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def gradient_program(config: Config) -> Any:
  """Returns the jitted `loss_and_grads`, one for all tests that use this config."""
  return jax.jit(functools.partial(loss_and_grads, config))


def flops_counted_by_xla(config: Config) -> float:
  """Returns XLA's count for loss and gradients, per token; of a loop, its body once."""
  compiled = jax.jit(functools.partial(loss_and_grads, config)).lower(
    unbox(accounting.abstract_params(config)),
    microbatches(packed_batch(config)),
    np.ones(1 + config.mtp.depth, np.float32),
  ).compile()
  tokens = config.data.batch_size * config.data.seq_len
  return compiled.cost_analysis()["flops"] / tokens


def packed_batch(config: Config, seed: int = 0, padding: bool = False) -> Batch:
  """Returns rows [B, ...] of random documents of 1 to 9 tokens, cut anywhere."""
  rng = np.random.default_rng(seed)
  rows, length = config.data.batch_size, config.data.seq_len
  total = length + 1 + config.mtp.depth
  tokens = rng.integers(0, config.tokenizer.vocab_size, (rows, total))
  segments = np.zeros((rows, total), int)
  for row in segments:
    ends = np.cumsum(rng.integers(1, 10, total))
    row[:] = 1 + np.searchsorted(ends, np.arange(total), side="right")
    if padding:
      row[rng.integers(1, total) :] = 0
  return batch_of(tokens, segments, length)


def batch_of(
  tokens: Any, segments: Any, length: int, scored: Any = None
) -> Batch:
  """Returns the Batch of whole rows [B, T + M]; positions follow from the segments."""
  tokens, segments = np.asarray(tokens, np.int32), np.asarray(segments, np.int32)
  positions = np.zeros_like(segments)
  for i in range(1, segments.shape[1]):
    same = segments[:, i] == segments[:, i - 1]
    positions[:, i] = np.where(same, positions[:, i - 1] + 1, 0)
  return Batch(
    tokens[:, :length],
    segments[:, :length],
    positions[:, :length],
    tokens[:, length:],
    segments[:, length:],
    *(() if scored is None else np.split(np.asarray(scored, bool), [length], axis=1)),
  )


def microbatches(batch: Batch, count: int = 1) -> Batch:
  """Returns [B, ...] as [A, B / A, ...]."""
  return jax.tree.map(lambda x: x.reshape(count, -1, x.shape[-1]), batch)


def assert_trees_close(actual: Any, expected: Any, rtol: float, atol: float) -> None:
  """Fails with the path of the first leaf that differs, or if the trees do."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
  )
  for (path, a), b in pairs:
    np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), rtol, atol, err_msg=jax.tree_util.keystr(path)
    )
