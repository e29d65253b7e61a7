r"""Writes a trained model as safetensors in a layout that other programs load.

  mtp-jax export runs/seq1
  mtp-jax export runs/v3 --layout=deepseek_v3 --output=exported/v3 --push=ORG/NAME
  mtp-jax export runs/seq2 --layout=llama --trunk_only --output=exported/trunk
  mtp-jax export runs/medusa --layout=medusa --output=exported/heads \
      --base_model=exported/trunk

--verify opens the written folder with transformers or vLLM, decodes prompts and
compares text and accepted drafts with this project's own; exit status 1: they differ.
vLLM may have a Python of its own (--engine_python).

Without --layout it lists the layouts of this model, and the reason against each other
layout. The folder gets config.json, generation_config.json, model.safetensors (shards
with an index if it is large), tokenizer.json, tokenizer_config.json, README.md (a model
card) and mtp_contract.json, which has what config.json cannot hold: the order of
concatenation, the hidden state that the predictors read, norms, positions. Files that
came with an imported model go out as they came in. Drafters with a published layout of
their own (medusa, eagle, eagle3, peagle, dflash) are written without the trunk, which
is another folder (--trunk_only).

--stitch=ORIGINAL copies the folder that the run was imported from, and writes the tuned
MTP layers over the layers of the copy: all other bytes stay. The trunk must have stayed
too (train.freeze_trunk=True).

--push uploads the folder to the Hugging Face Hub (pip install "mtp_jax[hub]", and a
token: HF_TOKEN or `hf auth login`). A new repository is private.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from absl import flags

from launch import cli, hub, paths
from mtp_jax import files, interop, run_folder
from mtp_jax.config import Config, ConfigError
from mtp_jax.interop import serving
from mtp_jax.interop.model_card import model_card
from mtp_jax.lm import deployed_config
from mtp_jax.trained_model import TrainedModel

_WORKDIR = cli.define_workdir("run folder")
_STEP = cli.define_step()
_LAYOUT = flags.DEFINE_string("layout", None, "what the other program calls the model")
_OUTPUT = flags.DEFINE_string("output", None, "folder to write, new or empty")
_TRUNK_ONLY = flags.DEFINE_bool(
  "trunk_only", False, "leave the extra predictors out: plain next-token prediction"
)
_BASE_MODEL = flags.DEFINE_string(
  "base_model", None, "folder or name of the trunk, for the config.json of a drafter"
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "type of the written weights"
)
_STITCH = flags.DEFINE_string(
  "stitch", None, "folder whose MTP layers are replaced in a copy; takes no --layout"
)
_VERIFY = flags.DEFINE_enum(
  "verify", "none", ["none", *serving.ENGINES], "engine that decodes with the folder"
)
_ENGINE_PYTHON = flags.DEFINE_string(
  "engine_python", None, "interpreter that has the engine of --verify, if not this one"
)
_PUSH = flags.DEFINE_string(
  "push", None, "ORG/NAME of the Hugging Face Hub, to which the folder is uploaded"
)


def main() -> int:
  # What is wrong with the command is reported before a model is loaded.
  if shutil.which(python := _engine_python()) is None:
    raise ConfigError(f"--engine_python must be an interpreter, got {python!r}.")
  if _LAYOUT.value is not None:
    if _OUTPUT.value is None:
      raise ConfigError("--output is required with --layout.")
    paths.check_new_folder("output", _OUTPUT.value)
    if _LAYOUT.value in interop.DRAFTERS and not _BASE_MODEL.value:
      raise ConfigError(f"--base_model is required with --layout={_LAYOUT.value}.")
  for name, is_given in (("push", _PUSH.value), ("verify", _VERIFY.value != "none")):
    if is_given and _LAYOUT.value is None:
      raise ConfigError(f"--layout is required with --{name}.")
  if _PUSH.value is not None:
    hub.check_push(_PUSH.value)
  if _STITCH.value is not None:
    return _stitch()
  model = cli.load_model(_WORKDIR.value, _STEP.value)
  if _LAYOUT.value is None:
    print(_list_layouts(model.config, _TRUNK_ONLY.value))
    return 0
  output, layout = Path(_OUTPUT.value), _LAYOUT.value
  config = deployed_config(model.config) if _TRUNK_ONLY.value else model.config
  # Also before anything is written: what the engine cannot decode.
  if _VERIFY.value != "none" and (
    reason := serving.engine_obstacle(config, layout, _VERIFY.value)
  ):
    raise ConfigError(f"--verify={_VERIFY.value} cannot be: {reason}.")
  if not interop.layouts_for(model.config, _TRUNK_ONLY.value).get(layout, "no"):
    output.parent.mkdir(parents=True, exist_ok=True)  # Nothing for what is refused.
    if _PUSH.value is not None:
      hub.create_repository(_PUSH.value)
  with cli.as_bad_input(interop.InteropError):
    interop.export_params(
      model.params,
      model.config,
      output,
      layout,
      dtype=_DTYPE.value,
      trunk_only=_TRUNK_ONLY.value,
      base_model=_BASE_MODEL.value or "",
      tokenizer=model.tokenizer,
      model_folder=model.model_folder,
      card=model_card(
        config, layout, model.step, *map(_facts, (run_folder.RUN, run_folder.EVAL)),
        base_model=_BASE_MODEL.value or "",
      ),
    )
  print(f"{output}: step {model.step:,} as {layout}", file=sys.stderr)
  # A folder that differs is not uploaded.
  if _VERIFY.value != "none" and (code := _verify(model, output)):
    return code
  if _PUSH.value is not None:
    print(hub.upload(output, _PUSH.value))
  return 0


def _engine_python() -> str:
  return _ENGINE_PYTHON.value or sys.executable


def _stitch() -> int:
  if _LAYOUT.value is not None or _OUTPUT.value is None:
    raise ConfigError("--stitch takes --output and no --layout.")
  paths.check_new_folder("output", _OUTPUT.value)
  model, output = cli.load_model(_WORKDIR.value, _STEP.value), Path(_OUTPUT.value)
  with cli.as_bad_input(interop.InteropError):
    output.parent.mkdir(parents=True, exist_ok=True)
    names = interop.stitch(model.params, model.config, Path(_STITCH.value), output)
  print(f"{output}: {len(names)} tensors of MTP layers are new", file=sys.stderr)
  return 0


def _facts(name: str) -> dict[str, Any]:
  """Returns the content of a file of the run folder; {}: it is not there."""
  file = Path(_WORKDIR.value) / name
  return files.read_json(file) if file.is_file() else {}


def _verify(model: TrainedModel, folder: Path) -> int:
  from launch.verify import verify  # Here, because few exports need it.

  try:
    found = verify(
      model, folder, _LAYOUT.value, _VERIFY.value, _engine_python(),
      base_model=_BASE_MODEL.value or "", dtype=_DTYPE.value,
      trunk_only=_TRUNK_ONLY.value,
    )
  except RuntimeError as error:
    return cli.fail(str(error), 1)
  print(found)
  if not found.is_equal:
    return cli.fail(f"{found.engine} does not decode {folder} as mtp_jax does.", 1)
  return 0


def _list_layouts(config: Config, trunk_only: bool) -> str:
  """Returns a line per layout: whether it has a place for the model."""
  obstacles = interop.layouts_for(config, trunk_only)
  return "\n".join(
    f"{layout:12} {'no: ' + reason if reason else 'yes'}"
    for layout, reason in obstacles.items()
  )


if __name__ == "__main__":
  cli.run(main)
