"""Orbax checkpoints: state, data iterator, config, tokenizer and the MTP contract.

A checkpoint is one composite item per step, written in the background and made visible
by a rename, so a killed save leaves nothing that looks finished. Beside the arrays is a
fingerprint of every leaf, taken on the device before the save: after a restore it is
computed again, on whatever mesh, so silent damage is found too. `restore` walks from
the newest checkpoint back until one is whole.

  checkpoints/STEP/state   the TrainState
  checkpoints/STEP/meta    config, contract, tokenizer, data iterator, progress (JSON)
  damaged_checkpoints/     what was found damaged, out of the way of later saves
"""

import contextlib
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mtp_jax import orbax_noise, run_folder
from mtp_jax.config import (
  Config,
  ConfigError,
  difference,
  from_saved,
  keys_of,
  to_dict,
)
from mtp_jax.effects import essential
from mtp_jax.keys import Role
from mtp_jax.predictors import contract

# Keys that may change between a checkpoint and the run that continues it: they do not
# change what is computed, or only where it is computed and how often it is looked at.
# Paths may: the state of the data iterator shows whether they hold the same text, and
# the run that this one began with is needed no more.
RESUMABLE = keys_of(Role.RESUMES)

# Keys that change the parameter tree or what its numbers mean.
ARCHITECTURE = keys_of(Role.ARCHITECTURE)

# In the name of what Orbax is still writing, after the step.
_UNFINISHED = ".orbax-checkpoint-tmp"

# Errors of Orbax in a process while another process is gone or waits elsewhere.
_PEER_ERRORS = (jax.errors.JaxRuntimeError, AssertionError, TimeoutError)


class CheckpointError(RuntimeError):
  """A checkpoint could not be written, or there are some and none is whole."""


class Restored(NamedTuple):
  """What `Checkpointer.restore` found: state, iterator state, and run progress."""

  state: Any
  data: dict[str, Any]
  progress: dict[str, Any]


def check_resumable(saved: Config, config: Config) -> None:
  """Refuses to continue a run under a config that would make it another run.

  Raises:
    ConfigError: names every differing key with both values; architecture first.
  """
  differing = {
    key: values
    for key, values in difference(essential(saved), essential(config)).items()
    if key not in RESUMABLE
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
def fingerprint(state: Any) -> jax.Array:
  """Returns one uint32 per leaf, the same on every mesh, changed by any changed bit."""

  def leaf(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
      x = x.astype(jnp.uint8)
    width = jnp.dtype(x.dtype).itemsize
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[width]
    bits = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    # Odd factors, so that no bit is lost; all different, so that order counts. They
    # are formed axis by axis, because flattening would move sharded arrays about.
    factor, stride = jnp.uint32(1), 2
    for axis in reversed(range(bits.ndim)):
      index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
      factor += index * jnp.uint32(stride % 2**32)
      stride *= bits.shape[axis]
    return jnp.sum(bits * factor, dtype=jnp.uint32)

  return jnp.stack([leaf(x) for x in jax.tree.leaves(state)])


class Checkpointer:
  """Saves and restores the checkpoints of one run folder."""

  def __init__(self, workdir: Path, keep: int = 2, read_only: bool = False):
    self.directory = (workdir / run_folder.CHECKPOINTS).resolve()
    self._read_only = read_only
    orbax_noise.silence()
    # Seen before the manager removes them. Other names are the user's.
    self._unfinished = sorted(
      path.name.partition(_UNFINISHED)[0]
      for path in self.directory.glob(f"*{_UNFINISHED}*")
    )
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep,
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
        enable_async_checkpointing=not read_only,
      ),
      item_handlers={"state": _state_handler(), "meta": ocp.JsonCheckpointHandler()},
    )

  def save(
    self,
    state: Any,
    config: Config,
    tokenizer: str,
    data: dict[str, Any],
    progress: dict[str, Any],
    model_folder: dict[str, Any] | None = None,
    replaces: bool = False,
  ) -> None:
    """Starts saving; returns once the arrays may be donated.

    Does nothing where the step is already saved, unless the new checkpoint `replaces`
    the saved one.

    Args:
      state: the TrainState; its `step` names the checkpoint.
      config: the resolved config.
      tokenizer: the tokenizer as JSON text.
      data: state of the data iterator.
      progress: host-side counters, JSON-able (training seconds so far, say).
      model_folder: what an imported model had besides weights (JSON values).

    Raises:
      CheckpointError: this or an earlier save could not be written.
    """
    step = int(state.step)
    meta = {
      "config": to_dict(config),
      "contract": contract(config),
      "tokenizer": tokenizer,
      "data": data,
      "progress": progress,
      "fingerprint": fingerprint(state).tolist(),
    } | ({"model_folder": model_folder} if model_folder else {})
    with self._write_errors():
      if step in self._manager.all_steps():
        if not replaces:
          return
        self._manager.delete(step)
      # No copy is needed: Orbax holds host copies of arrays on an accelerator, and
      # references to those on a CPU, which keep their memory from being donated.
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(state),
          meta=ocp.args.JsonSave(meta | {"sha256": _sha256(meta)}),
        ),
        force=True,
      )

  def steps(self) -> list[int]:
    """Returns the steps with a finished checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def meta(self, step: int) -> dict[str, Any]:
    """Returns config, contract, tokenizer, data, progress and fingerprint of a step.

    Raises:
      ValueError: it is not what was saved.
    """
    restored = self._manager.restore(
      step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
    )
    return _checked(restored["meta"])

  def restore(
    self, abstract_state: Any, config: Config, step: int | None = None
  ) -> Restored | None:
    """Returns the newest whole checkpoint laid out as `abstract_state`, or None.

    A damaged or unfinished one is reported and the one before it is used. Unless this
    is read-only, damaged ones are then moved to `damaged_checkpoints`. With `step`,
    that checkpoint alone will do.

    Of several processes a single one may find the damage, while the others wait for it.
    That process does not try an older checkpoint: it moves the damaged one aside, if
    there is another, and raises. The next start then uses the older one.

    Raises:
      ConfigError: the checkpoint belongs to another architecture or training.
      CheckpointError: there are checkpoints, and none is whole; none of `step`; one of
        several processes found damage.
    """
    steps = self.steps()
    if step is not None:
      if step not in steps:
        raise CheckpointError(
          f"no checkpoint of step {step} in {self.directory}; there are {steps}."
        )
      steps = [step]
    for name in self._unfinished:  # A kill leaves them; nothing is wrong with the run.
      print(
        f"checkpoint {self.directory / name} was not finished; using the one before "
        "it, if any",
        file=sys.stderr, flush=True,
      )
    damaged = []
    for step in reversed(steps):
      try:
        restored = self._restore(step, abstract_state, config)
      except ConfigError:
        raise
      # Orbax reports damage as errors of many libraries: JSON, zarr, the file system.
      except Exception as error:
        if jax.process_count() > 1:
          if isinstance(error, _PEER_ERRORS):
            raise
          raise self._given_up(step, is_last=step == steps[0], error=error) from error
        warnings.warn(
          f"checkpoint {self.directory / str(step)} is damaged "
          f"({type(error).__name__}: {_first_line(error)}); trying the one before it.",
          stacklevel=2,
        )
        damaged.append(step)
      else:
        self._move_aside(damaged)
        return restored
    if steps:
      raise CheckpointError(
        f"no whole checkpoint in {self.directory} (tried steps {steps[::-1]}); "
        "move the folder away to start again."
      )
    return None

  def _restore(self, step: int, abstract_state: Any, config: Config) -> Restored:
    meta = self.meta(step)
    check_resumable(from_saved(meta["config"]), config)
    _check_contract(self.directory / str(step), meta, config)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
          abstract_state, ocp.checkpoint_utils.construct_restore_args(abstract_state)
        )
      ),
    )
    state = restored["state"]
    _check_fingerprint(state, meta["fingerprint"])
    return Restored(state, meta["data"], meta["progress"])

  def _given_up(self, step: int, is_last: bool, error: Exception) -> CheckpointError:
    """Returns what to raise where one process of several cannot read a checkpoint."""
    advice = "move it away to start again"
    if not (is_last or self._read_only):
      with contextlib.suppress(FileNotFoundError):  # Another process was faster.
        self._rename(step)
      advice = "it was moved aside; start again to continue from the one before it"
    return CheckpointError(
      f"checkpoint {self.directory / str(step)} is damaged "
      f"({type(error).__name__}: {_first_line(error)}); {advice}."
    )

  def _move_aside(self, damaged: list[int]) -> None:
    """Keeps damaged checkpoints from counting among the `keep` newest."""
    if not damaged or self._read_only:
      return
    for step in damaged:
      self._rename(step)
    self._manager.reload()

  def _rename(self, step: int) -> None:
    aside = self.directory.parent / run_folder.DAMAGED
    aside.mkdir(exist_ok=True)
    # The time keeps a second one of the same step from colliding with the first.
    (self.directory / str(step)).rename(aside / f"{step}.{time.time_ns()}")

  def wait(self) -> None:
    """Returns when the save in the background is on disk.

    Raises:
      CheckpointError: it could not be written.
    """
    with self._write_errors():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Finishes the save under way and frees the manager."""
    try:
      self.wait()
    finally:
      self._manager.close()

  @contextlib.contextmanager
  def _write_errors(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Of the file system, or of TensorStore.
      self._manager.reload()
      raise CheckpointError(
        f"could not write a checkpoint to {self.directory} ({type(error).__name__}: "
        f"{_first_line(error, 300)}). Finished there: steps {self.steps()}."
      ) from error


def restore_params(
  folder: Path, layout: Callable[[Config], tuple[Any, Any]]
) -> tuple[jax.Array, Any, dict[str, Any]]:
  """Returns `(step, params, meta)` of one checkpoint, without the optimizer state.

  Args:
    folder: checkpoints/STEP, or a copy of it anywhere.
    layout: config -> step and parameters as ShapeDtypeStructs with shardings.

  Raises:
    ConfigError: the code has no such config any more, or another contract.
    CheckpointError: damaged, or no checkpoint.
  """
  folder = folder.resolve()
  orbax_noise.silence()
  try:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
      meta = _checked(reader.restore(folder / "meta", args=ocp.args.JsonRestore()))
    config = from_saved(meta["config"])
    _check_contract(folder, meta, config)
    step, params = layout(config)
    wanted = {"step": step, "params": params}
    with ocp.Checkpointer(_state_handler()) as reader:
      args = ocp.args.PyTreeRestore(
        wanted,
        ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
      )
      restored = reader.restore(folder / "state", args=args)
    # A TrainState begins with these two.
    first = (restored["step"], restored["params"])
    _check_fingerprint(first, meta["fingerprint"][: len(jax.tree.leaves(first))])
  except ConfigError:
    raise
  # As in `Checkpointer.restore`: damage is reported as errors of many libraries.
  except Exception as error:
    raise CheckpointError(
      f"checkpoint {folder} is damaged ({type(error).__name__}: {_first_line(error)})."
    ) from error
  return *first, meta


def save_params(
  folder: Path, step: int, params: Any, config: Config, tokenizer: str
) -> None:
  """Writes a checkpoint of the parameters alone, rounded to bfloat16.

  `restore_params` reads it, as float32. Token ids among the parameters
  (`mtp.draft_vocab`) would not survive the rounding.
  """
  stored = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
  step = jnp.int32(step)
  restored = step, jax.tree.map(lambda x: x.astype(jnp.float32), stored)
  meta = {
    "config": to_dict(config),
    "contract": contract(config),
    "tokenizer": tokenizer,
    "fingerprint": fingerprint(restored).tolist(),
  }
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
    signed = meta | {"sha256": _sha256(meta)}
    writer.save(folder / "meta", args=ocp.args.JsonSave(signed), force=True)
  with ocp.Checkpointer(_state_handler()) as writer:
    state = {"step": step, "params": stored}
    writer.save(folder / "state", args=ocp.args.PyTreeSave(state), force=True)


def _checked(meta: Any) -> dict[str, Any]:
  """Returns a restored meta without its checksum; ValueError if that is not right."""
  meta = dict(meta)
  if meta.pop("sha256", None) != _sha256(meta):
    raise ValueError("checksum mismatch in meta")
  return meta


def _check_contract(folder: Path, meta: dict[str, Any], config: Config) -> None:
  if meta["contract"] != contract(config):
    raise ConfigError(
      f"checkpoint {folder} was written by code with another contract: "
      f"{meta['contract']} there, {contract(config)} now."
    )


def _check_fingerprint(tree: Any, expected: list[int]) -> None:
  found = fingerprint(tree).tolist()
  if found != expected:
    wrong = np.flatnonzero(np.array(found) != np.array(expected))
    raise ValueError(f"fingerprint mismatch in {len(wrong)} of {len(found)} arrays")


def _first_line(error: Exception, limit: int = 200) -> str:
  return str(error).splitlines()[0][:limit] if str(error) else ""


def _state_handler() -> ocp.PyTreeCheckpointHandler:
  """Returns Orbax's handler of arrays, which shares out the copies of large ones only.

  By default every device writes its part of every replicated array, and one program is
  compiled to cut out each part: seconds of work to save the norms of a small model.
  """
  handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 20)
  registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
  return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _sha256(meta: dict[str, Any]) -> str:
  text = json.dumps(meta, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()
