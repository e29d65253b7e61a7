"""Sizes that no memory holds: refused with the bytes that they take at the least."""

from collections.abc import Callable

from mtp_jax.config import (
  Config,
  flatten,
  has_effect,
  keys,
  keys_of,
  num_added_layers,
  num_trunk_layers,
  to_dict,
)
from mtp_jax.environment import device_memory, machine_memory
from mtp_jax.keys import Role

# Notes that the value of a key must be as the text says, unless it is.
Rule = Callable[[bool, str, str], None]


def check_host(rule: Rule, config: Config) -> None:
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
    if memory and has_effect(keys()[key].when, values):
      rule(
        values[key] * size <= memory, key,
        f"such that it fits into memory: {what} takes at least {size:,} bytes, and "
        f"there are {memory / 1e9:,.1f} GB",
      )


def check_devices(rule: Rule, config: Config, num_devices: int) -> None:
  """Checks that the parameters fit, by the matrices that every model has."""
  trunk, moe, latent = config.trunk, config.trunk.moe, config.trunk.latent
  layers, dim, memory = num_trunk_layers(config), trunk.embed_dim, device_memory()
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
    f"GB, and {num_devices} device(s) have {(memory or 0) / 1e9:,.1f} GB each",
  )
