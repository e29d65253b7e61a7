"""Models in checkpoints of other runs: to load, or to start a new run from."""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mtp_jax import accounting, checkpoint, run_folder
from mtp_jax.checkpoint import CheckpointError
from mtp_jax.config import Config, ConfigError, difference, from_saved
from mtp_jax.lm import deployed, deployed_config
from mtp_jax.sharding import logical_axes, replicated, tree_shardings, unbox

# Keys of `train` that name a run to start from, of which one may be set: the first
# takes the trunk of that run, the second all parameters.
SOURCES = ("trunk_from", "start_from")


class SavedModel(NamedTuple):
  """A model without its optimizer state.

  config: as trained, with kernels for any platform.
  tokenizer: as JSON text.
  model_folder: files of an imported model besides its weights, by name.
  """

  config: Config
  params: Any
  tokenizer: str
  step: int
  model_folder: dict[str, Any] | None


def restore(folder: Path, mesh: jax.sharding.Mesh) -> SavedModel:
  """Returns the model of one checkpoint, its parameters laid out on `mesh`.

  Raises:
    CheckpointError: the checkpoint is missing or damaged.
    ConfigError: a version with other config keys wrote it.
  """

  def layout(config: Config) -> tuple[Any, Any]:
    boxed = accounting.abstract_params(portable(config))
    params = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      unbox(boxed),
      tree_shardings(mesh, logical_axes(boxed)),
    )
    return jax.ShapeDtypeStruct((), np.int32, sharding=replicated(mesh)), params

  step, params, meta = checkpoint.restore_params(folder, layout)
  config = portable(from_saved(meta["config"]))
  return SavedModel(
    config, params, meta["tokenizer"], int(step), meta.get("model_folder")
  )


def restore_newest(
  folders: Sequence[Path], mesh: jax.sharding.Mesh
) -> tuple[Path, SavedModel]:
  """Returns the first undamaged checkpoint, and its model.

  Reports damaged checkpoints. With several processes only the first checkpoint is
  tried, because a single process may find it damaged, and all must use the same.

  Raises:
    CheckpointError: no checkpoint is undamaged; with several processes, the first is
      damaged.
  """
  *candidates, last = folders if jax.process_count() == 1 else folders[:1]
  for folder in candidates:
    try:
      return folder, restore(folder, mesh)
    except CheckpointError as error:
      warnings.warn(f"{error} Trying the one before it.", stacklevel=3)
  return last, restore(last, mesh)


def check_source(config: Config, workdir: Path) -> None:
  """Checks that a new run can start from the run that one of `SOURCES` names.

  Loads no parameters. Skipped if the new run has a checkpoint: it resumes from that.

  Args:
    config: of the new run.
    workdir: folder of the new run, which may not exist yet.

  Raises:
    ConfigError: the other run is missing, has no checkpoint, or differs in a key that
      the copied parameters depend on.
  """
  name, source = _source(config)
  if source is None or run_folder.finished_steps(workdir):
    return
  rule = f"train.{name} must be a run folder with a finished checkpoint"
  if not run_folder.is_run(source):
    raise ConfigError(
      f"{rule}, got {str(source)!r}: there is no {source / run_folder.CONFIG}."
    )
  if not run_folder.finished_steps(source):
    raise ConfigError(f"{rule}, got {str(source)!r}: it has none yet.")
  try:
    saved = run_folder.read_config(source)
  except ConfigError as error:
    raise ConfigError(
      f"{rule} of this version, got {str(source)!r}: {error}"
    ) from error
  # The other run may be of any kind: only keys of the copied parameters must agree.
  saved, config = accounting.resolve(saved), accounting.resolve(config)
  keys, has = _trunk_keys(config), "whose deployed model has the trunk and the"
  if name == "trunk_from":
    saved = deployed_config(saved)
  else:
    keys |= {key for key in checkpoint.ARCHITECTURE if key.startswith("mtp.")}
    has = "with the trunk, the extra predictors and the"
  differing = {key: x for key, x in difference(saved, config).items() if key in keys}
  theirs, ours = differing.get("data.seq_len", (0, 0))
  if theirs > ours:  # The first learned positions are copied.
    del differing["data.seq_len"]
  if differing:
    lines = [f"  {k}: {a!r} there, {b!r} here" for k, (a, b) in differing.items()]
    if any(key.startswith("mtp.") for key in differing):
      lines.append("train.trunk_from takes over a trunk without its extra predictors.")
    raise ConfigError(
      f"train.{name} must be a run {has} vocabulary of this config, got "
      f"{str(source)!r}:\n" + "\n".join(lines)
    )


def load_source(
  config: Config, tokenizer: str, shardings: dict[str, Any], mesh: jax.sharding.Mesh
) -> tuple[dict[str, Any], dict[str, dict[str, Any] | None], dict[str, Any] | None]:
  """Returns the parameters that a new run starts from, and their origin.

  Args:
    config: of the new run.
    tokenizer: of the new run, as JSON text.
    shardings: of all parameters of the new run.
    mesh: of the new run.

  Returns:
    `(params, origin, model_folder)`. `params`, laid out by `shardings`, are from the
    newest undamaged checkpoint: the deployed model's with `train.trunk_from`, all with
    `train.start_from`, {} with neither. `origin` has, for each of `SOURCES`, None or
    the `path` in the config, the `step`, and the `commit` of the code that trained it
    ("" if unknown). `model_folder`: see `SavedModel`.

  Raises:
    CheckpointError: the other run has no undamaged checkpoint; see `restore_newest`.
    ConfigError: the other run has another tokenizer.
  """
  origin = dict.fromkeys(SOURCES)
  name, source = _source(config)
  if source is None:
    return {}, origin, None
  steps = map(str, reversed(run_folder.finished_steps(source)))
  _, saved = restore_newest(
    [source / run_folder.CHECKPOINTS / step for step in steps], mesh
  )
  # With another tokenizer, the same id would stand for other text.
  if json.loads(saved.tokenizer) != json.loads(tokenizer):
    raise ConfigError(
      f"train.{name} must be a run with the tokenizer of this one, got "
      f"{str(source)!r}, which has another; set tokenizer.kind 'file' and "
      f"tokenizer.path {str(source / run_folder.TOKENIZER)!r} to take it over."
    )
  if name == "trunk_from":
    shardings = {key: tree for key, tree in shardings.items() if key != "mtp"}

  def take(params: dict[str, Any]) -> dict[str, Any]:
    taken = deployed(params, saved.config)[0] if name == "trunk_from" else params
    if config.trunk.kind == "gpt2":
      position_PD = taken["position_embed"]["embedding"][: config.data.seq_len]
      taken = taken | {"position_embed": {"embedding": position_PD}}
    return taken

  try:
    commit = run_folder.read(source, run_folder.RUN)["commit"]
  except (ConfigError, KeyError, TypeError):
    commit = ""
  origin[name] = {
    "path": getattr(config.train, name), "step": saved.step, "commit": commit
  }
  params = jax.jit(take, out_shardings=shardings)(saved.params)
  return params, origin, saved.model_folder


def _source(config: Config) -> tuple[str, Path | None]:
  """Returns the one of `SOURCES` that is set, and its folder; `("", None)` if none."""
  named = [name for name in SOURCES if getattr(config.train, name)]
  return (named[0], Path(getattr(config.train, named[0]))) if named else ("", None)


def _trunk_keys(config: Config) -> set[str]:
  """Returns the keys that parameters outside `mtp` depend on."""
  keys = {key for key in checkpoint.ARCHITECTURE if key.startswith("trunk.")}
  keys.add("tokenizer.vocab_size")
  if config.trunk.kind == "gpt2":  # One learned position per token of a row.
    keys.add("data.seq_len")
  return keys


def portable(config: Config) -> Config:
  """Returns the config with kernels that run on any platform."""
  moe = dataclasses.replace(config.trunk.moe, grouped_matmul="auto")
  trunk = dataclasses.replace(config.trunk, attention="auto", moe=moe)
  return dataclasses.replace(config, trunk=trunk)
