"""Checks of paths that flags name, before any work; and JSON files as they are found.
"""

import contextlib
import os
import stat
from pathlib import Path
from typing import Any

from mtp_jax import files
from mtp_jax.config import ConfigError


def read_json(path: Path) -> dict[str, Any]:
  """Returns the object in a file, {} where none can be read: a machine may crash."""
  with contextlib.suppress(OSError, ValueError):
    return files.read_json(path)
  return {}


def check_folder(name: str, value: str) -> None:
  """Checks that a flag names a folder, or where one can be made.

  Raises:
    ConfigError: empty, a file, below a file, or no name that the file system can have.
  """
  if not value.strip():
    raise ConfigError(f"--{name} must name a folder, got {value!r}.")
  try:
    is_folder = stat.S_ISDIR(os.stat(value).st_mode)
  except FileNotFoundError:
    return
  except (OSError, ValueError) as error:  # Below a file, too long, a null byte.
    reason = getattr(error, "strerror", None) or str(error)
    raise ConfigError(
      f"--{name} must name a folder, got {value!r:.80}: {reason}."
    ) from error
  if not is_folder:
    raise ConfigError(f"--{name} must name a folder, got {value!r}, which is a file.")


def check_new_folder(name: str, value: str) -> None:
  """Checks that a flag names a folder that is empty, or where one can be made.

  Raises:
    ConfigError: see `check_folder`; or there is something in the folder.
  """
  check_folder(name, value)
  if os.path.isdir(value) and os.listdir(value):
    raise ConfigError(f"--{name} must name a new or empty folder, got {value!r}.")


def check_file(name: str, value: str, suffix: str) -> None:
  """Checks that a flag names a file `*.SUFFIX`, or where one can be made.

  Raises:
    ConfigError: another ending, a folder, below a file, or no name that the file system
      can have.
  """
  path = Path(value)
  if path.suffix != suffix or not path.stem:
    raise ConfigError(f"--{name} must end in {suffix}, got {value!r:.80}.")
  check_folder(name, str(path.parent))
  try:
    is_folder = path.is_dir()
  except (OSError, ValueError) as error:  # Too long, a null byte.
    reason = getattr(error, "strerror", None) or str(error)
    raise ConfigError(
      f"--{name} must name a file, got {value!r:.80}: {reason}."
    ) from error
  if is_folder:
    raise ConfigError(f"--{name} must name a file, got {value!r}, which is a folder.")
