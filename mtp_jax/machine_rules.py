"""Rules of the machine: its memory holds the sizes, its platform has the kernels."""

import importlib.metadata
import importlib.util
from collections.abc import Callable

from mtp_jax.config import (
  Config,
  flatten,
  keys_of,
  to_dict,
)
from mtp_jax.effects import conditions, has_effect
from mtp_jax.environment import machine_memory
from mtp_jax.kernels.attention import LARGEST_HEAD, padded_head, takes_documents
from mtp_jax.keys import Role
from mtp_jax.predictors import num_added_layers, num_trunk_layers

# More than any accelerator has.
_ACCELERATOR_BYTES = 2**40

# (holds, key, text): notes that the value of `key` must be `text`, unless it `holds`.
Rule = Callable[[bool, str, str], None]


def check_memory(rule: Rule, config: Config) -> None:
  """Checks that what one machine keeps at a time fits into the memory of this one."""
  memory, values = machine_memory(), flatten(to_dict(config))
  # A token has its number, its document and its position in it; a process has Python.
  row = 12 * config.data.seq_len, f"a row of {config.data.seq_len} tokens"
  for key, (size, what) in {
    "data.batch_size": row,
    "eval.batch_size": row,
    "data.num_workers": (30_000_000, "a process"),
    "eval.task_examples": (100, "an example"),
    "task.num_train": (32, "an example"),
  }.items():
    if memory and has_effect(conditions(key), values):
      rule(
        values[key] * size <= memory, key,
        f"such that it fits into memory: {what} takes at least {size:,} bytes, and "
        f"there are {memory / 1e9:,.1f} GB",
      )


def check_parameters(
  rule: Rule, config: Config, platform: str, num_devices: int
) -> None:
  """Checks that the parameters fit, by the matrices that every model has.

  The process that checks may be another than the one that has the devices.
  """
  trunk, moe, latent = config.trunk, config.trunk.moe, config.trunk.latent
  layers, dim = num_trunk_layers(config), trunk.embed_dim
  memory = machine_memory() if platform == "cpu" else _ACCELERATOR_BYTES
  routed = layers - trunk.dense_prefix if moe.num_experts else 0
  attention = 2 * dim * (trunk.attention_dim or dim)
  if trunk.attention_kind == "latent":
    attention = dim * (latent.query_rank + latent.kv_rank + latent.rope_dim)
    attention += latent.kv_rank * trunk.num_heads * (latent.nope_dim + latent.value_dim)
  size = config.tokenizer.vocab_size * dim
  size += (layers + num_added_layers(config.mtp)) * attention
  size += 2 * (layers - routed) * dim * trunk.mlp_dim
  size += 3 * routed * dim * (moe.num_experts + moe.num_shared) * moe.expert_dim
  needed = 4 * size  # In float32.
  values = flatten(to_dict(config))
  sizes = [x for x in sorted(keys_of(Role.ARCHITECTURE)) if type(values[x]) is int]
  rule(
    not memory or needed <= memory * num_devices, max(sizes, key=lambda x: values[x]),
    f"such that the parameters fit into memory: they take at least {needed / 1e9:,.0f} "
    f"GB, and {num_devices} device(s) have at most {(memory or 0) / 1e9:,.0f} GB each",
  )


def check_kernels(
  rule: Rule, config: Config, platform: str, num_devices: int | None
) -> None:
  """Checks that the kernels that are named run here; see `kernels.attention`."""
  trunk, key = config.trunk, "trunk.attention"
  is_gpu, of_experts = platform in ("gpu", "cuda"), "trunk.moe.grouped_matmul"
  rule(
    not is_gpu or trunk.moe.grouped_matmul != "ragged", of_experts,
    "'auto', 'tokamax' or 'blocked' on a GPU, where XLA makes one product per expert "
    "of 'ragged'",
  )
  if trunk.moe.grouped_matmul == "tokamax":
    is_there = importlib.util.find_spec("tokamax") is not None
    rule(
      is_gpu and is_there, of_experts,
      f"another on platform {platform!r}: it is for GPUs, with the package tokamax",
    )
  if trunk.attention == "tokamax":
    rule(
      importlib.util.find_spec("tokamax") is not None, key,
      f"'auto', 'xla' or 'blocked' on platform {platform!r} where the package tokamax "
      "is not installed",
    )
    rule(num_devices in (None, 1), key, f"another on {num_devices} devices")
  if not trunk.attention.startswith("cudnn"):
    return
  rule(
    is_gpu, key,
    f"'auto', 'xla' or 'blocked' on platform {platform!r}: cuDNN is of NVIDIA GPUs",
  )
  rule(
    trunk.attention == "cudnn" or takes_documents(), key,
    "another before Hopper, and before JAX 0.12, which places the keys of documents "
    f"right (this is JAX {importlib.metadata.version('jax')})",
  )
  sizes, size = trunk.latent, padded_head(trunk.head_dim, trunk.head_dim)
  if trunk.attention_kind == "latent":
    size = padded_head(sizes.nope_dim + sizes.rope_dim, sizes.value_dim)
  for holds, why in (
    (trunk.compute_dtype in ("auto", "bfloat16"), "is not in 16-bit floats"),
    (size <= LARGEST_HEAD, f"has heads of {size}, above {LARGEST_HEAD}"),
    (config.data.seq_len % 2 == 0, "has rows of odd length (data.seq_len)"),
    (config.mesh.context == 1, "splits the sequence (mesh.context)"),
  ):
    rule(holds, key, f"another where attention {why}")
