"""The text of a command's `--help`: usage, flags, the config keys that matter most."""

import re
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence

from absl import flags

from launch.words import COMMANDS
from mtp_jax.config import keys, type_name

_COMMON = (
  "mtp.kind", "mtp.depth", "mtp.weight", "trunk.num_layers", "trunk.embed_dim",
  "data.source", "data.path", "data.seq_len", "data.batch_size",
  "optimizer.learning_rate", "train.num_steps", "seed",
)


def text(
  argv: Sequence[str],
  first: str | None,
  required: Collection[str],
  owners: Mapping[str, str],
) -> str:
  """Returns the help of the command in `__main__`.

  Args:
    argv: the command line; `--on=ENGINE` in it shows the flags of that engine.
    first: the flag that the first word sets.
    required: names of flags; they are listed first.
    owners: the engine of each flag that belongs to one.
  """
  # Usage has what the command requires; a flag of another engine is not shown.
  has_config = "config" in flags.FLAGS
  words = [{"config": "EXPERIMENT"}.get(first, str(first).upper())] if first else []
  usage = [
    _command(), *words, "[KEY=VALUE ...]" * has_config, "[--FLAG=VALUE ...]"
  ]
  on = next((x.partition("=")[2] for x in argv if x.startswith("--on=")), "local")
  own = [
    flag
    for flag in flags.FLAGS.get_key_flags_for_module(argv[0])
    if owners.get(flag.name, on) == on
  ]
  own.sort(key=lambda flag: (flag.name not in required, flag.name != first))
  main = [x for x in own if x.name in {*required, first, "workdir"}]
  parts = [
    f"usage: {' '.join(filter(None, usage))}",
    (sys.modules["__main__"].__doc__ or "").strip(),
    "\n".join(_flag(flag, flag.name in required) for flag in main),
  ]
  if has_config:
    lines = "\n".join(f"  {_key(name)}" for name in _COMMON)
    parts.append(
      f"Common keys (KEY=VALUE, or --config.KEY=VALUE); all: mtp-jax config\n{lines}"
    )
  if rest := [_flag(flag, False) for flag in own if flag not in main]:
    parts.append("Other flags:\n" + "\n".join(rest))
  if others := sorted(set(owners.values()) - {on}):
    parts.append(f"Flags of {', '.join(others)}: --on=ENGINE --help.")
  return "\n\n".join(parts)


def _key(name: str) -> str:
  """Returns type, default and meaning of a config key in a line."""
  key = keys()[name]
  return f"{name} ({type_name(name)}, {key.default!r}): {key.meaning}"


def _command() -> str:
  """Returns what the command is called."""
  spec = sys.modules["__main__"].__spec__
  names = {f"launch.{module}": f"mtp-jax {name}" for name, module in COMMANDS.items()}
  return names.get(spec.name if spec else "", sys.argv[0])


def _flag(flag: flags.Flag, is_required: bool) -> str:
  name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
  meaning = flag.help
  if is_required:
    meaning += " (required)"
  elif flag.default not in (None, False, [], ""):
    meaning += f" (default {flag.default_as_str.strip(chr(39))})"
  meaning = re.sub(r"\s+", " ", meaning)
  return textwrap.fill(f"{name}: {meaning}", 88, initial_indent="  ",
                       subsequent_indent="      ")
