"""Orbax checkpoints: state, data iterator, config, tokenizer and the MTP contract.

A checkpoint is one composite item per step, written in the background and made visible
by a rename, so a killed save leaves nothing that looks finished. Beside the arrays is a
fingerprint of every leaf, taken on the device before the save: after a restore it is
computed again, on whatever mesh, so silent damage is found too. `restore` walks from
the newest checkpoint back until one is whole.
"""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mtp_jax.config import Config, ConfigError, difference, from_config_dict, to_dict

# Keys that may change between a checkpoint and the run that continues it: they do not
# change what is computed, or only where it is computed and how often it is looked at.
RESUMABLE = (
  "name", "mesh.", "checkpoint.", "eval.", "data.num_workers", "train.log_every",
  "train.eval_every", "train.diagnostics_every", "train.max_nonfinite_steps",
  "trunk.remat", "trunk.scan_layers", "trunk.attention", "loss.block_tokens",
)

# Keys that change the parameter tree or what its numbers mean.
ARCHITECTURE = (
  "trunk.kind", "trunk.num_layers", "trunk.embed_dim", "trunk.mlp_dim",
  "trunk.num_heads", "trunk.num_kv_heads", "trunk.tie_embeddings", "trunk.rope_theta",
  "trunk.norm_eps", "mtp.kind", "mtp.depth", "mtp.share_modules", "mtp.arm",
  "tokenizer.kind", "tokenizer.vocab_size", "optimizer.kind",
)


class Restored(NamedTuple):
  """What `Checkpointer.restore` found: state, iterator state, and run progress."""

  state: Any
  data: dict[str, Any]
  progress: dict[str, Any]


def contract(config: Config) -> dict[str, Any]:
  """Returns what a reader of the parameters must know about the extra predictors."""
  kind = config.mtp.kind
  return {
    "kind": kind,
    "depth": config.mtp.depth,
    "share_modules": config.mtp.share_modules,
    "depth_m_predicts": "token i + 1 + m at position i; m = 0 is the next token",
    "hidden_source": {
      "none": None,
      "linear": "trunk output after its final norm",
      "parallel": "trunk residual stream before the final norm",
      "sequential": "depth 1: trunk output after its final norm; depth k: the normed "
      "output of module k - 1",
    }[kind],
    "output_norm": "own norm per module" if kind == "sequential" else "final norm",
    "concat_order": ["hidden", "embedding"] if kind == "sequential" else None,
    "next_token_head": "first parallel head" if kind == "parallel" else "trunk",
    "embedding_shared": True,
    "unembedding_shared": True,
    "tied_embeddings": config.trunk.tie_embeddings,
  }


def check_resumable(saved: Config, config: Config) -> None:
  """Refuses to continue a run under a config that would make it another run.

  Raises:
    ConfigError: names every differing key with both values; architecture first.
  """
  differing = {
    key: values
    for key, values in difference(saved, config).items()
    if not any(key == k or (k.endswith(".") and key.startswith(k)) for k in RESUMABLE)
  }
  if not differing:
    return
  ordered = sorted(differing, key=lambda key: key not in ARCHITECTURE)
  changed = "architecture" if ordered[0] in ARCHITECTURE else "training"
  raise ConfigError(
    f"the run folder holds a run with another {changed}; use a new folder, or the "
    "values it was started with:\n"
    + "\n".join(
      f"  {key}: {differing[key][0]!r} there, {differing[key][1]!r} now"
      for key in ordered
    )
  )


@jax.jit
def fingerprint(state: Any) -> list[jax.Array]:
  """Returns one uint32 per leaf, the same on every mesh, changed by any changed bit."""

  def leaf(x: jax.Array) -> jax.Array:
    x = jnp.ravel(x)
    if x.dtype == jnp.bool_:
      x = x.astype(jnp.uint8)
    width = jnp.dtype(x.dtype).itemsize
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width]
    bits = jax.lax.bitcast_convert_type(x, word).ravel().astype(jnp.uint32)
    odd = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1  # So that order counts.
    return jnp.sum(bits * odd, dtype=jnp.uint32)

  return [leaf(x) for x in jax.tree.leaves(state)]


class Checkpointer:
  """Saves and restores the checkpoints of one run folder."""

  def __init__(self, workdir: Path, keep: int = 2, read_only: bool = False):
    self.directory = (workdir / "checkpoints").resolve()
    self._damaged: set[int] = set()
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep,
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
        enable_async_checkpointing=not read_only,
      ),
    )

  def save(
    self,
    state: Any,
    config: Config,
    tokenizer: str,
    data: dict[str, Any],
    progress: dict[str, Any],
  ) -> None:
    """Starts saving; returns once the device arrays are copied.

    Args:
      state: the TrainState; its `step` names the checkpoint.
      config: the resolved config.
      tokenizer: the tokenizer as JSON text.
      data: state of the data iterator.
      progress: host-side counters, JSON-able (training seconds so far, say).
    """
    step = int(state.step)
    if step in self._damaged:
      self._manager.delete(step)
      self._damaged.remove(step)
    if step in self._manager.all_steps():
      return
    # A copy of our own: training donates the original while the save is under way.
    state = jax.tree.map(jnp.copy, state)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        meta=ocp.args.JsonSave(
          {
            "config": to_dict(config),
            "contract": contract(config),
            "tokenizer": tokenizer,
            "data": data,
            "progress": progress,
            "fingerprint": [int(x) for x in fingerprint(state)],
          }
        ),
      ),
      force=True,
    )

  def steps(self) -> list[int]:
    """Returns the steps with a finished checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def meta(self, step: int) -> dict[str, Any]:
    """Returns config, contract, tokenizer, data, progress and fingerprint of a step."""
    restored = self._manager.restore(
      step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
    )
    return restored["meta"]

  def restore(self, abstract_state: Any, config: Config) -> Restored | None:
    """Returns the newest whole checkpoint laid out as `abstract_state`, or None.

    A damaged one is reported and the one before it is used.

    Raises:
      ConfigError: the checkpoint belongs to another architecture or training.
      RuntimeError: there are checkpoints, and none is whole.
    """
    steps = self.steps()
    for step in reversed(steps):
      try:
        return self._restore(step, abstract_state, config)
      except ConfigError:
        raise
      # Orbax reports damage as errors of many libraries: JSON, zarr, the file system.
      except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        warnings.warn(
          f"checkpoint {self.directory / str(step)} is damaged "
          f"({type(error).__name__}: {reason}); trying the one before it.",
          stacklevel=2,
        )
        self._damaged.add(step)
    if steps:
      raise RuntimeError(
        f"no whole checkpoint in {self.directory} (tried steps {steps[::-1]}); "
        "move the folder away to start again."
      )
    return None

  def _restore(self, step: int, abstract_state: Any, config: Config) -> Restored:
    meta = self.meta(step)
    check_resumable(from_config_dict(meta["config"]), config)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state)),
    )
    state = restored["state"]
    found = [int(x) for x in fingerprint(state)]
    if found != meta["fingerprint"]:
      wrong = np.flatnonzero(np.array(found) != np.array(meta["fingerprint"]))
      raise ValueError(f"fingerprint mismatch in {len(wrong)} of {len(found)} arrays")
    return Restored(state, meta["data"], meta["progress"])

  def wait(self) -> None:
    """Returns when the save in the background is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Finishes the save under way and frees the manager."""
    self._manager.wait_until_finished()
    self._manager.close()
