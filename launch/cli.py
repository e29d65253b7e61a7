"""What the commands share: flags, messages, exit codes, the compilation cache.

A command is a module whose docstring is its `--help`, whose flags stand at the top, and
whose last line is `cli.run(main)`. Bad flags, configs and data end in one message and
exit code 2, before any work.
"""

import ast
import contextlib
import dataclasses
import difflib
import errno
import glob
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from tabulate import tabulate

import mtp_jax
from launch import exits, hub, paths, usage, words
from mtp_jax import files, run_folder
from mtp_jax.config import (
  TASKS,
  Config,
  ConfigError,
  DataConfig,
  TokenizerConfig,
  from_config_dict,
  type_name,
)
from mtp_jax.data import distilled_text, mixture, prepared, sources, tokenizers

if TYPE_CHECKING:  # Its import takes long, and most commands do not need it.
  from mtp_jax.trained_model import TrainedModel

# Flags that are defined here belong to the command that asked for them, in its --help.
# Several commands may be imported into one process: they share what has one name.
flags.disclaim_key_flags()

BAD_INPUT = 2
_FULL = (errno.ENOSPC, errno.EDQUOT)
_HELP = {"--help", "-help", "-h", "--helpshort"}
# Required flags of this process's command; they come first in its --help.
_REQUIRED: set[str] = set()
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)(=|$)")


def define_config(required: bool = True) -> None:
  """Defines `--config=EXPERIMENT[:PRESET]` and `--config.KEY=VALUE`."""
  config_flags.DEFINE_config_file(
    "config",
    None,
    "experiment: its name, with a preset perhaps (smoke, gains_with_scale:cpu), or a "
    "Python file with get_config. KEY=VALUE or --config.KEY=VALUE overrides one value "
    "(mtp.depth=2); mtp-jax config lists every key.",
  )
  if required:
    require("config")


def require(name: str) -> None:
  """Makes a flag required."""
  flags.mark_flag_as_required(name)
  _REQUIRED.add(name)


def define_workdir(text: str, required: bool = True) -> flags.FlagHolder[str | None]:
  """Defines `--workdir`; `text` is its help."""
  holder = flags.DEFINE_string("workdir", None, text, allow_override=True)
  if required:
    require("workdir")
  return holder


def workdir() -> Path:
  """Returns --workdir, by default runs/NAME or runs/NAME_PRESET of the experiment."""
  if flags.FLAGS.workdir is not None:
    return Path(flags.FLAGS.workdir)
  file, preset = config_file()
  return Path("runs", f"{file.stem}_{preset}" if preset else file.stem)


def define_compilation_cache() -> flags.FlagHolder[str]:
  """Defines `--compilation_cache`; see `default_compilation_cache`."""
  return flags.DEFINE_string(
    "compilation_cache",
    default_compilation_cache(),
    "folder in which compiled programs are kept for the next run; empty for none. The "
    "default follows JAX_COMPILATION_CACHE_DIR and XDG_CACHE_HOME.",
    allow_override=True,
  )


def default_compilation_cache() -> str:
  """Returns JAX's own setting, or a folder in the user's cache."""
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
  default = os.path.expanduser(os.path.join(cache, "mtp_jax", "xla"))
  return os.environ.get("JAX_COMPILATION_CACHE_DIR", default)


def use_compilation_cache(folder: str) -> None:
  """Makes JAX keep compiled programs in `folder`, if one is named."""
  if folder:
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def define_track() -> flags.FlagHolder[str | None]:
  """Defines `--track`, the trackers of a run; see `trackers`."""
  return flags.DEFINE_string(
    "track", None,
    "where records go besides metrics.jsonl and TensorBoard, now and when the run is "
    "continued: some of wandb, mlflow and trackio, separated by commas",
    allow_override=True,
  )


def define_step() -> flags.FlagHolder[int | None]:
  """Defines `--step`, a checkpoint of the run folder."""
  return flags.DEFINE_integer(
    "step", None, "which checkpoint; by default the newest whole one", lower_bound=0,
    allow_override=True,
  )


def load_model(workdir: str, step: int | None) -> "TrainedModel":
  """Returns the model of a run folder.

  Raises:
    ConfigError: there is no checkpoint that can be restored.
  """
  from mtp_jax.checkpoint import CheckpointError  # Here, because it imports Orbax.

  with as_bad_input(CheckpointError):
    return mtp_jax.load(workdir, step=step)


@contextlib.contextmanager
def as_bad_input(error: type[Exception] = ValueError) -> Iterator[None]:
  """Makes an error of the package bad input: settings that do not fit a model."""
  try:
    yield
  except error as problem:
    raise ConfigError(str(problem)) from problem


def load_config() -> Config:
  """Returns the typed config of `--config` with its overrides.

  Raises:
    ConfigError: see `from_config_dict`.
  """
  return from_config_dict(flags.FLAGS.config)


def load_run_config(workdir: Path) -> Config:
  """Returns the config with which a run folder was started.

  Raises:
    ConfigError: it is no run folder.
  """
  if not run_folder.is_run(workdir):
    path = workdir / run_folder.CONFIG
    raise ConfigError(
      f"--workdir must be a run folder, got {str(workdir)!r}: there is no {path}."
    )
  return of_run(run_folder.read_config(workdir), workdir)


def of_run(config: Config, workdir: Path) -> Config:
  """Returns the config with the tokenizer that the run folder has, if it has one.

  Raises:
    ConfigError: it names another one.
  """
  return dataclasses.replace(
    config, tokenizer=tokenizers.in_run(config.tokenizer, workdir)
  )


def config_overrides() -> dict[str, object]:
  """Returns the `--config.KEY=VALUE` of the command line by dotted key."""
  return dict(flags.FLAGS["config"].override_values)


def config_file() -> tuple[Path, str | None]:
  """Returns the experiment file and the preset, None where none is named."""
  file, _, preset = flags.FLAGS["config"].config_filename.partition(":")
  return Path(file), preset or None


def check_files(data: DataConfig, tokenizer: TokenizerConfig) -> None:
  """Checks that the files a config names are there; reads no text.

  Raises:
    DataError: names the place that was searched.
  """
  if data.source in TASKS:
    return
  is_file = tokenizer.kind == "file"
  given = tokenizers.load_tokenizer(tokenizer.path) if is_file else None
  for _, part in mixture.parts(data):
    if part.source == "array_record":
      prepared.open_folder(part.path)
    else:
      sources.DocumentReader(part.source, part.path, part.text_field, given)
  if data.train_on:
    distilled_text.check_file(data.train_on)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  """Returns aligned columns: the first to the left, the others to the right."""
  lines = tabulate(
    rows, header, "plain", disable_numparse=True,
    colalign=["left", *["right"] * (len(header) - 1)] if rows else None,
  ).splitlines()
  return "\n".join(line.rstrip() for line in lines)


def run(
  main: Callable[[], int | None],
  first: str | None = None,
  config: str | None = None,
  owners: Mapping[str, str] | None = None,
) -> None:
  """Parses the flags, runs a command and exits with what it returns.

  Args:
    main: the command.
    first: the flag that the first word of the command line sets; by default --config,
      or --workdir, whichever the command has.
    config: the experiment where the command line has none.
    owners: the engine of each flag that belongs to one; `--help` shows the flags of
      the engine that --on names.

  ConfigError and DataError end in their message and exit code 2, Ctrl-C in 130, a full
  disk in its message and 1, without a traceback. Any other error ends in a traceback,
  its message and exit code 1.
  """

  def guarded(_: list[str]) -> int | None:
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.ERROR)  # Else absl shows what libraries log.
    try:
      if "workdir" in flags.FLAGS and flags.FLAGS.workdir is not None:
        paths.check_folder("workdir", flags.FLAGS.workdir)
      return main()
    except (ConfigError, sources.DataError) as error:
      return fail(str(error), BAD_INPUT)
    except hub.HubError as error:
      return fail(str(error), exits.FAILED)
    except KeyboardInterrupt:
      return fail("interrupted; the same command continues.", 128 + signal.SIGINT)
    except Exception as error:
      if is_disk_full(error):
        return fail(str(error), exits.FAILED)
      if files.is_bad_path(error):
        return fail(exits.describe(error), BAD_INPUT)
      traceback.print_exception(error)
      return fail(exits.describe(error), exits.FAILED)

  # The words of a command line need the flags, which are all defined by now.
  first = first or next((x for x in ("config", "workdir") if x in flags.FLAGS), None)

  def parse(argv: list[str]) -> list[str]:
    if _HELP.intersection(argv[1:]):
      print(usage.text(argv, first, _REQUIRED, owners or {}))
      sys.exit(0)
    argv[1:] = words.expand(argv[1:], first)
    if config and _config_value(argv) is None:
      argv.insert(1, f"--config={words.experiment_file(config)}")
    return _parse(argv)

  app.run(guarded, flags_parser=parse)


def is_disk_full(error: BaseException) -> bool:
  """Returns whether an error means that a disk, or a quota, is full."""
  return isinstance(error, OSError) and error.errno in _FULL


def fail(message: str, code: int) -> int:
  """Prints why a command ends early and returns its exit code."""
  print(f"error: {message}", file=sys.stderr, flush=True)
  return code


def _parse(argv: list[str]) -> list[str]:
  try:
    _check_arguments(argv)
    rest = flags.FLAGS(argv)
    _check_values()
    if len(rest) > 1:
      raise ConfigError(f"{rest[1]!r}: arguments must be flags (--name=value).")
    return rest
  except (ConfigError, flags.Error) as error:
    text = _returns_nothing(error, argv) or f"{_explain(error)}\nSee --help."
    sys.exit(fail(text, BAD_INPUT))
  except Exception as error:  # The experiment file was run.
    text = f"--config={_config_value(argv)}: {exits.describe(error)}"
    text = _returns_nothing(error, argv) or text
    sys.exit(fail(text, BAD_INPUT))


def _check_values() -> None:
  """Refuses what passes every bound or what no counter holds: nan, inf, 2^63, ''."""
  for name in flags.FLAGS:
    flag = flags.FLAGS[name]
    if flag.present and flag.value == []:
      raise ConfigError(f"--{name} must have at least one value, got ''.")
    values = flag.value if isinstance(flag.value, list) else [flag.value]
    for value in values if flag.present else ():
      if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"--{name} must be finite, got {value}.")
      if isinstance(value, int) and value >= 2**63:
        raise ConfigError(f"--{name} must be less than 2^63, got {value}.")


def _check_arguments(argv: list[str]) -> None:
  """Refuses what config_flags would answer with a traceback."""
  if "config" not in flags.FLAGS:
    return
  _check_keys(argv)
  if (value := _config_value(argv)) is not None:
    _check_experiment(value.partition(":")[0])


def _check_keys(argv: list[str]) -> None:
  """Refuses keys that no config has, and sections."""
  for argument in argv[1:]:
    if override := _OVERRIDE.match(argument):
      if type_name(override[1]) == "section":
        raise ConfigError(
          f"{override[1]} is a section; set one of its keys (--config.mtp.depth=2)."
        )


def _config_value(argv: list[str]) -> str | None:
  """Returns what --config is set to: after `=`, or the next argument."""
  for argument, following in zip(argv, [*argv[1:], ""], strict=True):
    if re.match(r"--?config(=|$)", argument):
      return argument.partition("=")[2] if "=" in argument else following
  return None


def _returns_nothing(error: Exception, argv: list[str]) -> str:
  """Returns what to tell of a `get_config` without `return`, else nothing.

  To absl its flag has no value then; an override finds no key in None.
  """
  file = _config_value(argv)
  found = re.search(r"Flag --config must have a value|'NoneType'>\.", str(error))
  if not found or not file:
    return ""
  return f"--config={file}: get_config() must return a config, got None."


def _check_experiment(file: str) -> None:
  """Refuses a file that is no Python, or has no `get_config`; runs nothing of it."""
  if not os.path.isfile(file):
    raise ConfigError(
      f"--config must name an experiment file, got {file!r}{_nearest_file(file)}"
    )
  try:
    tree = ast.parse(Path(file).read_bytes())
  except (SyntaxError, ValueError) as error:
    raise ConfigError(
      f"--config must name an experiment file (Python), got {file!r}: {error}."
    ) from error
  if not any(getattr(node, "name", "") == "get_config" for node in ast.walk(tree)):
    raise ConfigError(
      f"--config must name a file with a function get_config, got {file!r}."
    )


def _explain(error: Exception) -> str:
  """Puts the errors of absl and config_flags in our words: key, rule, value."""
  text = str(error)
  if wrong := re.match(r"flag --config\.([^=]+)=(.*?): ", text, re.DOTALL):
    return f"{wrong[1]} must be of type {type_name(wrong[1])}, got {wrong[2]!r}."
  if failed := re.match(r"flag --config=(.*?): Error whilst parsing", text):
    reason = text.strip().splitlines()[-1]
    if "get_config() takes 0 positional arguments" in reason:
      file, _, preset = failed[1].partition(":")
      return f"--config: {file} has no presets, got {preset!r}."
    # A ValueError is the experiment's own message; all else is a fault in its code.
    return f"--config={failed[1]}: {reason.removeprefix('ValueError: ')}"
  if required := re.search(r"Flag (--\w+) must have a value", text):
    return f"{required[1]} is required."
  return text


def _nearest_file(file: str) -> str:
  folder = os.path.dirname(file)
  known = glob.glob(f"{folder}/*.py") if folder else words.experiments()
  matches = difflib.get_close_matches(file, known, n=1)
  return f"; did you mean {matches[0]!r}?" if matches else ": there is no such file."
