"""The run folder: the names of its files, who owns it, and what can be read from it.

  config.json          the config of the run, written when the run is claimed
  run.json             sizes, versions, hardware, data: facts about the run
  tokenizer.json       the run's own tokenizer
  model_folder.json    what an imported model had besides weights
  startup.json         seconds from the command to the first step
  metrics.jsonl        one record a line; tensorboard/ has the same numbers
  trackers.json        which other trackers have, and the run's id in them
  checkpoints/STEP/    see `checkpoint`; damaged ones lie in damaged_checkpoints/
  eval.json, DONE      the final evaluation, and that it is complete

docs/reference describes every field. Every function takes the folder's path, and
reads or writes without asking which process this is.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mtp_jax import files
from mtp_jax.config import Config, ConfigError, from_saved, to_dict

CONFIG, RUN, STARTUP = "config.json", "run.json", "startup.json"
METRICS, EVAL, DONE = "metrics.jsonl", "eval.json", "DONE"
TOKENIZER, MODEL_FOLDER = "tokenizer.json", "model_folder.json"
CHECKPOINTS, DAMAGED = "checkpoints", "damaged_checkpoints"
TENSORBOARD, PROFILE = "tensorboard", "profile"
TRACKERS, WANDB = "trackers.json", "wandb"
# What `launch` adds: who holds the folder, how far the run is, why it failed, what it
# prints; the job that the run was given to and how its attempts ended; measured drafts.
LOCK, STATUS, ERROR, LOG = ".lock", "status.json", "error.txt", "log.txt"
JOB, ATTEMPTS, TREE = "job.json", "attempts.jsonl", "tree.json"

# Mount options of NFS and Lustre.
_LOCAL_LOCKS = {"nolock", "local_lock=flock", "local_lock=all", "localflock"}
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# What stands for a key in the name of a trial's folder, and keys whose values are words
# that need no key. A change here gives trials other folders.
_LETTERS = {
  "embed_dim": "e", "width": "w", "depth": "d", "seed": "s", "passes": "p",
  "learning_rate": "lr", "trial": "t",
}
_WORDS = ("kind", "arm")

_FILES = (CONFIG, RUN, TOKENIZER, STARTUP, METRICS, EVAL, DONE)
_FOLDERS = (CHECKPOINTS, TENSORBOARD)


def is_run(workdir: Path) -> bool:
  """Returns whether a folder has the config of a run."""
  return (workdir / CONFIG).is_file()


def is_done(workdir: Path) -> bool:
  """Returns whether a run is trained and evaluated."""
  return (workdir / DONE).is_file()


def is_begun(workdir: Path) -> bool:
  """Returns whether a run folder holds work, so that its config must stay.

  Engines write the config before a job starts. A run that is refused then, or fails
  before its first checkpoint, may be corrected.
  """
  return (workdir / DONE).exists() or bool(finished_steps(workdir))


def finished_steps(workdir: Path) -> list[int]:
  """Returns the steps of a run that have a finished checkpoint, oldest first."""
  return steps_in(workdir / CHECKPOINTS)


def steps_in(checkpoints: Path) -> list[int]:
  """Returns the same of a folder of checkpoints, which may lie anywhere."""
  found = checkpoints.iterdir() if checkpoints.is_dir() else ()
  return sorted(int(x.name) for x in found if x.name.isdecimal() and x.is_dir())


def logs(workdir: Path) -> list[Path]:
  """Returns the logs of the processes of a run, process 0 first."""
  name = Path(LOG)
  others = workdir.glob(f"{name.stem}.*{name.suffix}")
  return [*filter(Path.exists, [workdir / LOG]), *sorted(others)]


def folders_below(root: Path) -> list[Path]:
  """Returns the run folders directly below a folder, by name."""
  return sorted(path.parent for path in root.glob(f"*/{CONFIG}"))


def folder_name(trial: str) -> str:
  """Returns the name of a trial's folder, which depends on the trial's name alone.

  No shell needs quotes for `e64-sequential-d3-added-s0`, which is the folder of
  `embed_dim=64,kind=sequential,depth=3,arm=added,seed=0`.
  """
  return "-".join(map(_short, trial.split(",")))


def _short(part: str) -> str:
  key, equals, value = part.partition("=")
  if not equals:
    return part
  value = value.replace("=", "_")
  if key in _WORDS and value[:1].isalpha():
    return value
  key = _LETTERS.get(key, key)
  is_number = value[:1].isdigit() and not key[-1:].isdigit()
  return key + value if is_number else f"{key}_{value}"


def of_trial(root: Path, trial: str) -> Path:
  """Returns the run folder of a trial below a sweep folder.

  Older sweeps gave a folder the trial's whole name, and go on in that folder.
  """
  whole = root / trial
  return whole if whole.is_dir() else root / folder_name(trial)


def trial_of(workdir: Path, name: str) -> str:
  """Returns the trial's name, for a run of that name in the trial's folder.

  Else the folder has a name of its own, which is returned.
  """
  return name if workdir.name == folder_name(name) else workdir.name


def check_kinds(workdir: Path) -> None:
  """Checks that no folder has the name of a file of a run, and the other way round.

  Raises:
    ConfigError: names the first one.
  """
  for name in _FILES:
    if (workdir / name).is_dir():
      raise ConfigError(
        f"{workdir / name} must be a file that training writes, and is a folder."
      )
  for name in _FOLDERS:
    if (workdir / name).is_file():
      raise ConfigError(
        f"{workdir / name} must be a folder that training fills, and is a file."
      )


def own_config(config: Config) -> Config:
  """Returns the config as a run folder has it: with the run's own tokenizer."""
  if config.tokenizer.kind != "file":
    return config
  tokenizer = dataclasses.replace(config.tokenizer, path=TOKENIZER)
  return dataclasses.replace(config, tokenizer=tokenizer)


def write_config(workdir: Path, config: Config) -> None:
  """Makes the folder, and claims it for the run of a config."""
  workdir.mkdir(parents=True, exist_ok=True)
  write(workdir, CONFIG, to_dict(own_config(config)))


def read_config(workdir: Path) -> Config:
  """Returns the config with which a run was started.

  Raises:
    ConfigError: config.json cannot be read, or this version has no such config.
  """
  path = workdir / CONFIG
  try:
    return from_saved(json.loads(path.read_text()))
  # ConfigError is a ValueError, and so are bad JSON and bytes that are no text.
  except (OSError, ValueError, RecursionError) as error:
    raise ConfigError(
      f"{path} must be the config of a run, as training wrote it: {error}"
    ) from error


def write(workdir: Path, name: str, value: Any) -> None:
  """Writes one of the JSON files in one piece; arrays become lists, NaN null."""
  files.write_json(workdir / name, value)


def read(workdir: Path, name: str) -> Any:
  """Returns the content of one of the JSON files; None if there is no such file.

  Raises:
    ConfigError: the file cannot be read.
  """
  path = workdir / name
  if not path.is_file():
    return None
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError, RecursionError) as error:
    raise ConfigError(
      f"{path} must be what training wrote ({type(error).__name__}: {error})."
    ) from error


def finish(workdir: Path, result: dict[str, Any]) -> None:
  """Writes the final evaluation, and that the run is done."""
  write(workdir, EVAL, result)
  (workdir / DONE).write_text("")


def finished(workdir: Path, config: Config) -> dict[str, Any] | None:
  """Returns eval.json of a run that is done under this very config, else None.

  Raises:
    ConfigError: config.json or eval.json of a run that is done cannot be read.
  """
  if not is_done(workdir) or read_config(workdir) != own_config(config):
    return None
  path = workdir / EVAL
  try:
    result = json.loads(path.read_text())
    result["main_loss"]["mean"], result["step"]  # What every reader needs.
    return result
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise ConfigError(
      f"{path} must be what training wrote ({type(error).__name__}: {error}); remove "
      f"{workdir / DONE} to evaluate again."
    ) from error


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[None]:
  """Holds the run folder: two processes in one would overwrite each other's files.

  The lock also holds against processes of other hosts, where the file system shares
  its locks: NFS does, Lustre if it is mounted so. Without locks a warning is printed.

  Raises:
    ConfigError: another process holds it.
  """
  with contextlib.ExitStack() as stack:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      lock = stack.enter_context((workdir / LOCK).open("w"))
    except OSError as error:
      if not files.is_bad_path(error):
        raise
      raise ConfigError(
        f"{workdir} must be a folder that can be written: {error.strerror} "
        f"({error.filename})."
      ) from error
    try:
      _lock(lock)
    except BlockingIOError as error:
      raise ConfigError(f"{workdir} is in use by another process.") from error
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      text = f"warning: nothing keeps a second process out of {workdir}: {error}."
      print(text, file=sys.stderr, flush=True)
    yield


def _lock(lock: IO[str]) -> None:
  """Takes the lock. `is_in_use` holds it for an instant, so a few tries are made."""
  for seconds in (0.05, 0.1, 0.2):
    with contextlib.suppress(BlockingIOError):
      return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    time.sleep(seconds)
  return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_in_use(workdir: Path) -> bool | None:
  """Returns whether a process holds the run folder; see `exclusive`.

  None: no process of this host does, and locks of other hosts do not show here.
  """
  try:
    with (workdir / LOCK).open() as lock:
      fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
    return False
  except BlockingIOError:
    return True
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
    return None
  return None if _has_own_locks(workdir) else False


def _has_own_locks(folder: Path) -> bool:
  """Returns whether each host sees its own locks alone on this file system."""
  try:
    lines = Path("/proc/self/mounts").read_text().splitlines()
  except OSError:
    return False
  path, mounts = f"{folder.resolve()}/", [line.split() for line in lines]
  above = [mount for mount in mounts if path.startswith(mount[1].rstrip("/") + "/")]
  options = max(above, key=lambda mount: len(mount[1]))[3].split(",") if above else []
  return not _LOCAL_LOCKS.isdisjoint(options)
