"""The commands, and short words of their command lines as the flags they stand for.

  mtp-jax train smoke mtp.depth=2     --config=experiments/smoke.py --config.mtp.depth=2
  mtp-jax generate runs/smoke         --workdir=runs/smoke
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags

import experiments as experiments_package
from mtp_jax.config import type_name

# Module of this package of each command of `mtp-jax`.
COMMANDS = {
  "demo": "demo",
  "train": "train",
  "sweep": "sweep",
  "status": "list_states",
  "evaluate": "evaluate",
  "eval": "eval_tasks",
  "generate": "generate",
  "report": "report",
  "config": "config",
  "prepare": "prepare",
  "import": "import_hf",
  "export": "export",
  "tree": "tree",
  "write_corpus": "write_corpus",
  "plan": "plan",
  "bench": "benchmark",
}
_KEY_VALUE = re.compile(r"[a-z]\w*(\.\w+)*=")
_CONFIG = re.compile(r"--?config=")


def expand(words: Sequence[str], first: str | None) -> list[str]:
  """Returns the words with short ones replaced by flags; others stay, to be refused.

  KEY=VALUE sets a key of the config, where the command has one. The first other word is
  the value of flag `first`, unless this flag is given. The name of an experiment stands
  for its file.
  """
  has_config, found, is_value = "config" in flags.FLAGS, [], False
  if any(re.match(rf"--?{first}(=|$)", word) for word in words):
    first = None
  for word in words:
    if is_value or word.startswith("-"):
      found.append(word)
      is_value = not is_value and _takes_next(word)
    elif has_config and _KEY_VALUE.match(word):
      found.append(f"--config.{word}")
    elif first:
      found.append(f"--{first}={word}")
      first = None
    else:
      found.append(word)
  for i, word in enumerate(found):
    if _CONFIG.match(word):
      flag, _, value = word.partition("=")
      found[i] = f"{flag}={experiment_file(value)}"
    elif i and found[i - 1] in ("--config", "-config"):
      found[i] = experiment_file(word)
  return found


def experiment_file(value: str) -> str:
  """Returns FILE[:PRESET] of NAME[:PRESET]; what is no name stays as it is.

  A shipped experiment is found from any folder, by its file too (experiments/base.py).
  """
  file, colon, preset = value.partition(":")
  name = re.fullmatch(r"(?:experiments/)?(\w+)(?:\.py)?", file)
  if os.path.isfile(file) or not name or name[1] not in experiments():
    return value
  path = _folder() / f"{name[1]}.py"
  here = Path.cwd()
  path = path.relative_to(here) if path.is_relative_to(here) else path
  return f"{path}{colon}{preset}"


def experiments() -> list[str]:
  """Returns the names of the shipped experiments."""
  files = sorted(_folder().glob("*.py"))
  return [path.stem for path in files if "\ndef get_config(" in path.read_text()]


def _folder() -> Path:
  return Path(experiments_package.__file__).parent


def _takes_next(word: str) -> bool:
  """Returns whether the value of a flag is the next word."""
  name = word.lstrip("-")
  if "=" in name or (name.startswith("no") and name[2:] in flags.FLAGS):
    return False
  if name.startswith("config."):
    try:
      return type_name(name.removeprefix("config.")) != "bool"
    except ValueError:  # No such key, which is refused later.
      return False
  return name in flags.FLAGS and not flags.FLAGS[name].boolean
