"""Times the loss and its gradient against all logits at once, PyTorch and tokamax.

  mtp-jax bench loss --vocabs=264 --depths=3 --block_tokens=4096

A step is the value and the gradient of the training loss alone, with respect to the
hidden states of every depth and the output matrix, from given hidden states; every
position counts. Contestants: `mtp_jax.losses.loss_sums` as training calls it; optax's
cross-entropy of `h @ w`, depth by depth; `F.linear` and `F.cross_entropy` of PyTorch;
tokamax's fused loss, by the implementation that it picks (on a CPU all logits at once).
States and matrix are in the compute dtype of the device (float32 on a CPU, else
bfloat16); softmax and sums are float32.

The floor is the time of the products that no implementation can leave out, three of
2 N d V operations per depth, at the rate of products of large matrices. V is the
vocabulary, d the width of the states, D the number of extra depths. Peak memory is that
of one warm step: on a CPU the growth of the resident set since before the inputs, on a
GPU the allocator's peak. Least: states, matrix and their gradients. Temporaries: those
of the compiled JAX programs, by XLA's analysis.
"""

import functools
import itertools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from launch.benchmarks import harness, limits, pages, torch_steps
from launch.benchmarks.harness import FLOOR, OURS, TORCH
from mtp_jax.config import Config, ConfigError, with_overrides
from mtp_jax.config_rules import validate
from mtp_jax.kernels.attention import import_tokamax
from mtp_jax.losses import loss_sums
from mtp_jax.model.layers import compute_dtype

PLAIN, TOKAMAX = "plain JAX", "tokamax"
NAMES = (OURS, PLAIN, *TORCH, TOKAMAX)
PRESETS = {
  "cpu": {
    "vocabs": [264, 50304], "depths": [0, 1, 3], "embed_dims": [256], "seq_len": 256,
    "batch_size": 16, "rounds": 5, "steps_per_round": 2, "block_tokens": 0,
    "contestants": list(NAMES),
  },
  "gpu": {
    "vocabs": [264, 50304], "depths": [0, 1, 3], "embed_dims": [1024, 2048],
    "seq_len": 2048, "batch_size": 8, "rounds": 7, "steps_per_round": 10,
    "block_tokens": 0, "contestants": list(NAMES),
  },
  "quick": {
    "vocabs": [264], "depths": [0, 1], "embed_dims": [64], "seq_len": 64,
    "batch_size": 4, "rounds": 2, "steps_per_round": 2, "block_tokens": 0,
    "contestants": [OURS, PLAIN, "torch eager", TOKAMAX],
  },
}
harness.define_settings(
  PRESETS,
  {"contestants": NAMES},
  embed_dims="widths of the hidden states",
  block_tokens="positions per block of logits in our loss; 0 suits the device",
  contestants=f"of {', '.join(NAMES)}",
)


class Inputs(NamedTuple):
  """What a loss is computed from, in numpy; float32 where not integers.

  hidden_MBTD: hidden states of M depths.
  coefficients_M: what each depth's sum over tokens counts.
  """

  hidden_MBTD: np.ndarray
  unembed_DV: np.ndarray
  targets_MBT: np.ndarray
  coefficients_M: np.ndarray


def main() -> None:
  """Measures, and writes the page.

  Raises:
    ConfigError: our loss is left out, or sizes that no model has.
  """
  settings = harness.read_settings(PRESETS)
  if OURS not in settings.contestants:
    raise ConfigError(
      f"--contestants must have {OURS}, got {','.join(settings.contestants)}."
    )
  cases = itertools.product(settings.embed_dims, settings.vocabs, settings.depths)
  configs = [_config(settings, *case) for case in cases]
  for config in configs:
    validate(config, 1)
  rows = harness.measure_all(configs, lambda config: [_measure(settings, config)])
  pages.write_page(
    "loss", settings, rows, __doc__, [pages.compare(rows)], ("jax", "torch", TOKAMAX)
  )


def _config(settings: SimpleNamespace, dim: int, vocab: int, depth: int) -> Config:
  """Returns a small model with such states; only its loss is computed."""
  config = harness.make_config(
    "tiny", "llama", vocab, "sequential", depth, settings.seq_len, settings.batch_size
  )
  return with_overrides(config, {
    "trunk.embed_dim": dim,
    "trunk.num_heads": 1,
    "trunk.num_kv_heads": 1,
    "loss.block_tokens": settings.block_tokens,
  })


def _measure(settings: SimpleNamespace, config: Config) -> dict[str, Any]:
  """Returns the row of one config: its contestants and its floor in turns."""
  sizes = {
    "V": config.tokenizer.vocab_size, "d": config.trunk.embed_dim, "D": config.mtp.depth
  }
  builds = {FLOOR: functools.partial(limits.build_products, config)} | {
    name: functools.partial(build_step, config, name) for name in settings.contestants
  }
  label = " ".join(f"{key}={size}" for key, size in sizes.items())
  found = harness.measure({f"{label} {n}": b for n, b in builds.items()}, settings)
  return sizes | {
    "flops": needed_flops(config),
    "contestants": dict(zip(builds, found.values(), strict=True)),
  }


def needed_flops(config: Config) -> float:
  """Returns the FLOPs of the products that no implementation can leave out.

  Three products per depth, each of 2 N d V with N = B T: the logits, their gradient
  times the output matrix, and their gradient times the states.
  """
  tokens = config.data.batch_size * config.data.seq_len
  product = 2.0 * tokens * config.trunk.embed_dim * config.tokenizer.vocab_size
  return 3 * product * (1 + config.mtp.depth)


def make_inputs(config: Config, seed: int = 0) -> Inputs:
  """Returns random inputs; the logits have a variance of 1, as before training."""
  rng = np.random.default_rng(seed)
  width, vocab = config.trunk.embed_dim, config.tokenizer.vocab_size
  tokens = (1 + config.mtp.depth, config.data.batch_size, config.data.seq_len)
  # By numpy: in a PyTorch contestant, JAX does not start.
  weights_M = np.full(tokens[0], config.mtp.weight / max(config.mtp.depth, 1))
  weights_M[0] = 1
  return Inputs(
    rng.standard_normal((*tokens, width), np.float32),
    rng.standard_normal((width, vocab), np.float32) * np.float32(width**-0.5),
    rng.integers(0, vocab, tokens, np.int32),
    np.float32(weights_M / (tokens[1] * tokens[2])),
  )


def build_step(config: Config, name: str) -> harness.Built:
  """Builds the step of one of `NAMES`.

  A step returns `(total, (d_hidden, d_unembed_DV))`; `d_hidden` is a list by depth
  where the depths are computed one after the other.
  """
  if name in TORCH:
    return torch_steps.build_loss(functools.partial(make_inputs, config), name)
  before = limits.resident_with_jax()
  dtype = compute_dtype(config.trunk)
  inputs = make_inputs(config)
  unembed_DV = jnp.asarray(inputs.unembed_DV, dtype)
  if name == OURS:
    loss = functools.partial(_our_loss, config.loss.block_tokens)
    hidden = jnp.asarray(inputs.hidden_MBTD, dtype)
    mask = np.ones(inputs.targets_MBT.shape, bool)
    targets = jnp.asarray(inputs.targets_MBT), jnp.asarray(mask)
  else:
    loss = {PLAIN: plain_loss, TOKAMAX: tokamax_loss}[name]
    # A model that never stacks its depths has them one by one.
    hidden = [jnp.asarray(h_BTD, dtype) for h_BTD in inputs.hidden_MBTD]
    targets = [jnp.asarray(t_BT) for t_BT in inputs.targets_MBT]
  arguments = (hidden, unembed_DV, targets, jnp.asarray(inputs.coefficients_M))
  del inputs
  program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()

  def step() -> Any:
    return jax.block_until_ready(program(*arguments))

  step()
  return step, {
    "hardware": jax.devices()[0].device_kind,
    "least_memory": 2 * sum(x.nbytes for x in jax.tree.leaves(arguments[:2])),
    "peak_memory": limits.peak_memory(step, before),
    "temporaries": program.memory_analysis().temp_size_in_bytes,
  }


def _our_loss(block_tokens, hidden_MBTD, unembed_DV, targets, coefficients_M):
  targets_MBT, mask_MBT = targets
  return loss_sums(
    hidden_MBTD, unembed_DV, targets_MBT, mask_MBT, coefficients_M, block_tokens
  ).total


def plain_loss(
  hidden: list[jax.Array],
  unembed_DV: jax.Array,
  targets: list[jax.Array],
  coefficients_M: jax.Array,
) -> jax.Array:
  """Returns the total, depth by depth from states [B, T, D] and ids [B, T]."""
  total = jnp.float32(0)
  for h_BTD, t_BT, coefficient in zip(hidden, targets, coefficients_M, strict=True):
    logits_BTV = (h_BTD @ unembed_DV).astype(jnp.float32)
    nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, t_BT)
    total += coefficient * jnp.sum(nll_BT)
  return total


def tokamax_loss(
  hidden: list[jax.Array],
  unembed_DV: jax.Array,
  targets: list[jax.Array],
  coefficients_M: jax.Array,
) -> jax.Array:
  """Returns the total by tokamax's fused product and cross-entropy."""
  tokamax, total = import_tokamax(), jnp.float32(0)
  for h_BTD, t_BT, coefficient in zip(hidden, targets, coefficients_M, strict=True):
    total += coefficient * tokamax.linear_softmax_cross_entropy_loss(
      h_BTD.reshape(-1, h_BTD.shape[-1]), t_BT.reshape(-1), unembed_DV, reduction="sum"
    )
  return total
