"""What one run takes from the checkpoint of another: a whole model, or its trunk."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mtp_jax import accounting, checkpoint
from mtp_jax.config import Config, ConfigError, difference, from_config_dict
from mtp_jax.model.lm import deployed, deployed_config
from mtp_jax.sharding import logical_axes, replicated, tree_shardings, unbox


class SavedModel(NamedTuple):
  """A model without its optimizer state.

  config: as trained, with the kernels that suit any platform.
  tokenizer: the tokenizer as JSON text.
  model_folder: what an imported model had besides weights; see `interop.model_files`.
  """

  config: Config
  params: Any
  tokenizer: str
  step: int
  model_folder: dict[str, Any] | None


def restore(folder: Path, mesh: jax.sharding.Mesh) -> SavedModel:
  """Returns the model of one checkpoint, its parameters laid out on `mesh`.

  Raises:
    CheckpointError: damaged, or no checkpoint.
    ConfigError: written by code with other settings.
  """

  def layout(config: Config) -> tuple[Any, Any]:
    boxed = accounting.abstract_params(_portable(config))
    params = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      unbox(boxed),
      tree_shardings(mesh, logical_axes(boxed)),
    )
    return jax.ShapeDtypeStruct((), np.int32, sharding=replicated(mesh)), params

  step, params, meta = checkpoint.restore_params(folder, layout)
  config = _portable(from_config_dict(meta["config"]))
  return SavedModel(
    config, params, meta["tokenizer"], int(step), meta.get("model_folder")
  )


def check_trunk(config: Config, workdir: Path) -> None:
  """Checks that `train.trunk_from` names a run that this one can begin with.

  Loads no parameters. A run that has a checkpoint of its own goes on from that, and
  needs no other.

  Args:
    config: of the run.
    workdir: its folder, which may not be there yet.

  Raises:
    ConfigError: no run, no checkpoint, or another trunk or size of vocabulary.
  """
  if not config.train.trunk_from or _finished_steps(workdir):
    return
  source = Path(config.train.trunk_from)
  rule = "train.trunk_from must be a run folder with a finished checkpoint"
  if not (source / "config.json").is_file():
    raise ConfigError(
      f"{rule}, got {str(source)!r}: there is no {source / 'config.json'}."
    )
  if not _finished_steps(source):
    raise ConfigError(f"{rule}, got {str(source)!r}: it has none yet.")
  try:
    saved = from_config_dict(json.loads((source / "config.json").read_text()))
  except ConfigError as error:
    raise ConfigError(
      f"{rule} of this version, got {str(source)!r}: {error}"
    ) from error
  found = difference(deployed_config(accounting.resolve(saved)), config)
  differing = {key: found[key] for key in found if key in _trunk_keys(config)}
  if differing:
    raise ConfigError(
      "train.trunk_from must be a run whose deployed model has the trunk and the "
      f"vocabulary of this config, got {str(source)!r}:\n"
      + "\n".join(f"  {k}: {a!r} there, {b!r} here" for k, (a, b) in differing.items())
    )


def load_trunk(
  config: Config, tokenizer: str, shardings: dict[str, Any], mesh: jax.sharding.Mesh
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
  """Returns the deployed model that `train.trunk_from` names, and a record of it.

  Args:
    config: of the new run.
    tokenizer: of the new run, as JSON text.
    shardings: of all parameters of the new run.
    mesh: that they are on.

  Returns:
    All parameters but `mtp`, laid out by `shardings`, of the newest checkpoint; its
    `path` as given, `step`, and the `commit` of the code that trained it, "" if its
    folder does not say; and `SavedModel.model_folder`.

  Raises:
    CheckpointError: that checkpoint is damaged.
    ConfigError: another tokenizer.
  """
  source = Path(config.train.trunk_from)
  folder = source / "checkpoints" / str(_finished_steps(source)[-1])
  saved = restore(folder, mesh)
  if json.loads(saved.tokenizer) != json.loads(tokenizer):
    raise ConfigError(
      "train.trunk_from must be a run with the tokenizer of this one, got "
      f"{str(source)!r}, which has another; set tokenizer.kind 'file' and "
      f"tokenizer.path {str(source / 'tokenizer.json')!r} to take it over."
    )
  kept = {name: tree for name, tree in shardings.items() if name != "mtp"}
  take = jax.jit(lambda params: deployed(params, saved.config)[0], out_shardings=kept)
  run_json = source / "run.json"
  run = json.loads(run_json.read_text()) if run_json.is_file() else {}
  record = {
    "path": config.train.trunk_from, "step": saved.step, "commit": run.get("commit", "")
  }
  return take(saved.params), record, saved.model_folder


def _trunk_keys(config: Config) -> set[str]:
  """The keys that parameters outside `mtp` depend on."""
  keys = {key for key in checkpoint.ARCHITECTURE if key.startswith("trunk.")}
  keys.add("tokenizer.vocab_size")
  if config.trunk.kind == "gpt2":  # It has so many learned positions.
    keys.add("data.seq_len")
  return keys


def _finished_steps(workdir: Path) -> list[int]:
  directory = workdir / "checkpoints"
  return checkpoint.finished_steps(directory) if directory.is_dir() else []


def _portable(config: Config) -> Config:
  """Returns the config without choices that only the training's platform may have."""
  moe = dataclasses.replace(config.trunk.moe, grouped_matmul="auto")
  trunk = dataclasses.replace(config.trunk, attention="auto", moe=moe)
  return dataclasses.replace(config, trunk=trunk)
