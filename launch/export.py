r"""Writes a trained model as safetensors in a layout that other programs load.

  mtp-jax export runs/seq1
  mtp-jax export runs/v3 --layout=deepseek_v3 --output=exported/v3 --push=ORG/NAME
  mtp-jax export runs/seq2 --layout=llama --trunk_only --output=exported/trunk
  mtp-jax export runs/medusa --layout=medusa --output=exported/heads \
      --base_model=exported/trunk

Without --layout it lists the layouts of this model, and the reason against each other
layout. The folder gets config.json, generation_config.json, model.safetensors (shards
with an index if it is large), tokenizer.json, tokenizer_config.json and
mtp_contract.json, which has what config.json cannot hold: the order of concatenation,
the hidden state that the predictors read, norms, positions. Files that came with an
imported model go out as they came in. Drafters with a published layout of their own
(medusa, eagle, eagle3) are written without the trunk, which is another folder
(--trunk_only).

--push uploads the folder to the Hugging Face Hub (pip install "mtp_jax[hub]", and a
token: HF_TOKEN or `hf auth login`). A new repository is private.
"""

import sys
from pathlib import Path

from absl import flags

from launch import cli, hub, paths
from mtp_jax import interop
from mtp_jax.config import Config, ConfigError

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
_PUSH = flags.DEFINE_string(
  "push", None, "ORG/NAME of the Hugging Face Hub, to which the folder is uploaded"
)


def main() -> int:
  if _LAYOUT.value is not None:
    if _OUTPUT.value is None:
      raise ConfigError("--output is required with --layout.")
    paths.check_new_folder("output", _OUTPUT.value)
    if _LAYOUT.value in interop.DRAFTERS and not _BASE_MODEL.value:
      raise ConfigError(f"--base_model is required with --layout={_LAYOUT.value}.")
  if _PUSH.value is not None:
    if _LAYOUT.value is None:
      raise ConfigError("--layout is required with --push.")
    hub.check_push(_PUSH.value)
  model = cli.load_model(_WORKDIR.value, _STEP.value)
  if _LAYOUT.value is None:
    print(_list_layouts(model.config, _TRUNK_ONLY.value))
    return 0
  output = Path(_OUTPUT.value)
  if not interop.layouts_for(model.config, _TRUNK_ONLY.value).get(_LAYOUT.value, "no"):
    output.parent.mkdir(parents=True, exist_ok=True)  # Nothing for what is refused.
    if _PUSH.value is not None:
      hub.create_repository(_PUSH.value)
  with cli.as_bad_input(interop.InteropError):
    interop.export_params(
      model.params,
      model.config,
      output,
      _LAYOUT.value,
      dtype=_DTYPE.value,
      trunk_only=_TRUNK_ONLY.value,
      base_model=_BASE_MODEL.value or "",
      tokenizer=model.tokenizer,
      model_folder=model.model_folder,
    )
  print(f"{output}: step {model.step:,} as {_LAYOUT.value}", file=sys.stderr)
  if _PUSH.value is not None:
    print(hub.upload(output, _PUSH.value))
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
