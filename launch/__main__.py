"""All commands under one name: `mtp-jax NAME ...`, or `python -m launch NAME ...`.

A command is a module of this package; `python -m launch.MODULE ...` is the same.
"""

import ast
import difflib
import runpy
import sys
from pathlib import Path

import mtp_jax
from launch.words import COMMANDS, experiments

_USAGE = """\
usage: mtp-jax COMMAND [WORD ...] [--FLAG=VALUE ...]

{commands}

  mtp-jax train smoke                          an experiment by its name
  mtp-jax train base mtp.kind=sequential mtp.depth=2    keys set to other values
  mtp-jax generate runs/smoke --prompt="def "
  mtp-jax COMMAND --help

Experiments: {experiments}.
mtp-jax --version prints the version ({version})."""


def main() -> int:
  name, *words = sys.argv[1:] or ["--help"]
  if name in ("--help", "-h", "help"):
    print(_usage())
    return 0
  if name == "--version":
    print(mtp_jax.__version__)
    return 0
  if name not in COMMANDS:
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}."
    print(f"error: {name!r} is no command; {hint}", file=sys.stderr)
    return 2
  sys.argv[1:] = words
  runpy.run_module(f"launch.{COMMANDS[name]}", run_name="__main__", alter_sys=True)
  return 0


def _usage() -> str:
  """Returns the list of commands, each with the first line of its module."""
  width = max(map(len, COMMANDS))
  lines = [f"  {name:{width}}  {_summary(x)}" for name, x in COMMANDS.items()]
  return _USAGE.format(
    commands="\n".join(lines), experiments=", ".join(experiments()),
    version=mtp_jax.__version__,
  )


def _summary(module: str) -> str:
  tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
  return ast.get_docstring(tree).partition("\n")[0]


if __name__ == "__main__":
  sys.exit(main())
