r"""Makes a run folder out of Hugging Face weights, which `mtp-jax train` then trains.

  mtp-jax import --from=models/gpt2 --workdir=runs/gpt2_mtp
  mtp-jax import --from=hf://Qwen/Qwen2.5-0.5B --workdir=runs/qwen \
      mtp.depth=2 train.freeze_trunk=True data.seq_len=1024
  mtp-jax train --workdir=runs/qwen
  mtp-jax import --from=models/vicuna --drafter=models/medusa --workdir=runs/vicuna \
      mtp.kind=medusa mtp.depth=5 mtp.unembed=own

Reads config.json and safetensors (one file, or shards with an index) of GPT-2, Llama,
Qwen2, Qwen3, DeepSeek-V3, GLM-4.5 and MiMo models. The trunk of the config becomes that
of the folder; all else (extra predictors, data, optimizer, mesh) follows --config.
New predictors begin at random, so the next-token logits of the run folder equal the
folder's, until training moves them; with --config.train.freeze_trunk=True they stay.
MTP layers that the folder has are taken over with their depth. --drafter names a folder
with predictors alone, in the layout of --config.mtp.kind (medusa, eagle,
eagle3, peagle, dflash).

Rows may be shorter than the folder's texts: learned positions are then cut to
data.seq_len. --config.trunk.rope_theta and --config.trunk.rope_scaling.* replace what
the folder has, for longer rows. Export writes what the run has.

The tokenizer is the folder's tokenizer.json, unless --config.tokenizer.* names
otherwise. The tokens that begin and end a text are those that the folder names; none is
added. The run folder needs the other folder no more.

hf://ORG/NAME, or hf://ORG/NAME@REVISION, is a model of the Hugging Face Hub: it is
downloaded into the cache of huggingface_hub (pip install "mtp_jax[hub]").

Weights that do not fit are refused by name; nothing is written then.
"""

import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from launch import cli, hub
from mtp_jax import interop
from mtp_jax.checkpoint import CheckpointError
from mtp_jax.config import TASKS, Config, ConfigError, with_overrides
from mtp_jax.config_rules import validate
from mtp_jax.data.tokenizers import Tokenizer, check_vocab_size, load_tokenizer
from mtp_jax.train import start_run

cli.define_config(required=False)
_FROM = flags.DEFINE_string("from", None,
  "folder with config.json and safetensors, or hf://ORG/NAME[@REVISION] of the Hub",
)
cli.require("from")
_DRAFTER = flags.DEFINE_string(
  "drafter", None,
  "folder with the extra predictors alone, or hf://ORG/NAME[@REVISION]",
)
_WORKDIR = cli.define_workdir("the new run folder")
_COMPILATION_CACHE = cli.define_compilation_cache()

# What may differ from the folder: parameters do not depend on it.
_ROTARY = ("trunk.rope_theta", "trunk.rope_scaling.")


def main() -> int:
  workdir, given = Path(_WORKDIR.value), cli.load_config()
  try:
    model = interop.read_model(hub.local_folder("from", _FROM.value))
    drafter = _DRAFTER.value and hub.local_folder("drafter", _DRAFTER.value)
    config = combine(given, cli.config_overrides(), model)
    validate(config)
    cli.check_files(config.data, config.tokenizer)
    tokenizer, model_folder = tokenizer_of(config, model)
    validate(config, jax.device_count(), jax.default_backend())
    cli.use_compilation_cache(_COMPILATION_CACHE.value)
    start_run(
      config, workdir, lambda mesh: _load(model, drafter, config, mesh), tokenizer,
      model_folder,
    )  # fmt: skip
  except interop.InteropError as error:
    return cli.fail(str(error), cli.BAD_INPUT)
  except CheckpointError as error:
    return cli.fail(str(error), 1)
  print(
    f"{workdir}: {model.family} weights at step 0, mtp.kind {config.mtp.kind!r}, depth "
    f"{config.mtp.depth}. Train it by: mtp-jax train --workdir={workdir}",
    file=sys.stderr,
  )
  return 0


def _load(
  model: interop.HfModel,
  drafter: Path | None,
  config: Config,
  mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
  params = interop.load_params(model, config, mesh)
  if drafter is not None:
    params["mtp"] = interop.read_drafter(drafter, config, params, mesh)
  return params


def tokenizer_of(
  config: Config, model: interop.HfModel
) -> tuple[Tokenizer | None, dict[str, Any]]:
  """Returns the tokenizer with the special ids of the folder, and the folder's files.

  With a tokenizer of another kind than a file there is none, and of the files
  config.json alone counts, without its ids.
  """
  if config.tokenizer.kind == "file":
    tokenizer = load_tokenizer(config.tokenizer.path, model.folder)
    check_vocab_size(tokenizer, config.tokenizer.vocab_size)
    return tokenizer, model.files
  values = model.files["config.json"]
  kept = {key: x for key, x in values.items() if key not in interop.ID_KEYS}
  return None, {"config.json": kept}


def combine(
  config: Config, overrides: dict[str, Any], model: interop.HfModel
) -> Config:
  """Returns the config with the trunk, tokenizer and MTP layers of the folder.

  Args:
    config: of --config, overrides included.
    overrides: what was set on the command line, by dotted key.
    model: the folder.

  Raises:
    ConfigError: the command line sets what the folder decides, to another value; or
      there is no tokenizer, or more positions than the folder has. Rows may be shorter,
      and rotary embedding another one, for rows of any length.
  """
  # The folder decides; the command line may repeat what it decides, or replace what
  # parameters do not depend on.
  decided = dict(model.overrides)
  for key, value in overrides.items():
    if key in decided and decided[key] != value:
      if not key.startswith((*_ROTARY, "data.seq_len")):
        raise ConfigError(
          f"{key} must be {decided[key]!r}, as {model.folder} has it, got {value!r}."
        )
      del decided[key]
  # A scaling of the command line stands alone: parts of another one make no sense.
  scaling = "trunk.rope_scaling."
  if f"{scaling}kind" not in decided:
    decided = {k: v for k, v in decided.items() if not k.startswith(scaling)}
    if config.trunk.rope_scaling.kind in ("llama3", "yarn"):
      length = f"{scaling}original_length"
      decided |= {} if length in overrides else {length: model.max_length}
  # Texts are cut as the weights expect, unless the user names a tokenizer.
  if not {"tokenizer.kind", "tokenizer.path"} & overrides.keys():
    if model.tokenizer is None:
      raise ConfigError(
        f"{model.folder} has no tokenizer.json; name one "
        "(--config.tokenizer.kind=file --config.tokenizer.path=FILE), or set "
        "--config.tokenizer.kind=bytes."
      )
    decided |= {"tokenizer.kind": "file", "tokenizer.path": str(model.tokenizer)}
  # Defaults that do not fit the folder give way to what fits.
  if "data.seq_len" not in overrides:
    decided.setdefault("data.seq_len", min(config.data.seq_len, model.max_length))
  if "eval.max_new_tokens" not in overrides and config.data.source not in TASKS:
    # The default is for longer rows, which have to hold a prompt as well.
    limits, length = config.eval, decided.get("data.seq_len", config.data.seq_len)
    prompts = limits.line_prompts, limits.function_prompts, limits.middle_prompts
    if any(prompts) and limits.max_new_tokens >= length:
      decided["eval.max_new_tokens"] = max(1, length // 2)
  if config.optimizer.base_width == config.trunk.embed_dim:
    decided["optimizer.base_width"] = decided["trunk.embed_dim"]
  # Learned positions end with the table; rotary ones where the folder's scaling does.
  combined = with_overrides(config, decided)
  is_rotary = model.family != "gpt2"
  if combined.data.seq_len > model.max_length and not (
    is_rotary and any(key.startswith(_ROTARY) for key in overrides)
  ):
    instead = " (or set trunk.rope_theta or trunk.rope_scaling)" if is_rotary else ""
    raise ConfigError(
      f"data.seq_len must be at most {model.max_length}, the positions of "
      f"{model.folder}{instead}, got {combined.data.seq_len}."
    )
  return combined


if __name__ == "__main__":
  cli.run(main, first="from", config="imported")
