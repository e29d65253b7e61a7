"""Prints the keys of a config: type, default, meaning, range, where they count.

  mtp-jax config              every key
  mtp-jax config mtp.         the keys of a section
  mtp-jax config learning     the keys whose name has this part

All of it stands in the key's line of mtp_jax/sections.py and mtp_jax/model_sections.py.
A key is set by KEY=VALUE after the experiment: mtp-jax train smoke mtp.depth=3
"""

import ast
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any, Literal

import mtp_jax
from mtp_jax.config import Config, keys, type_name
from mtp_jax.keys import Conditions, Range


def main() -> int:
  words = sys.argv[1:]
  if any(word in ("--help", "-help", "-h") for word in words):
    print(__doc__)
    return 0
  if (words and words[0].startswith("-")) or len(words) > 1:
    print(f"error: one pattern at most, got {words}.\nSee --help.", file=sys.stderr)
    return 2
  pattern = words[0] if words else ""
  names = [name for name in keys() if pattern in name]
  if not names:
    print(f"error: no key has {pattern!r} in its name.", file=sys.stderr)
    return 2
  print("\n".join(map(describe, names)))
  return 0


def describe(name: str) -> str:
  """Returns the lines of one key."""
  wrap = textwrap.TextWrapper(84, initial_indent="    ", subsequent_indent="      ")
  key = keys()[name]
  head = f"{name} ({type_name(name)}) = {key.default!r}"
  return "\n".join([head, *map(wrap.fill, [key.meaning, *rules(name)])])


def rules(name: str) -> list[str]:
  """Returns the sentences of one key: which values it may have, and where it counts."""
  key = keys()[name]
  ranges = [r.text for r in key.ranges]
  if choices := _choices(name):
    ranges.append(f"one of {', '.join(map(repr, choices))}")
  if key.most:
    ranges.append(f"at most {key.most}")
  if key.by:
    ranges.append(f"a multiple of {key.by}")
  facts = []
  if ranges:
    facts.append(f"Must be {'; '.join(ranges)}.")
  if conditions := key.when | key.then:
    facts.append(f"Has an effect where {_describe(conditions)}.")
  return facts


def _choices(name: str) -> tuple[Any, ...]:
  if name == "mtp.kind":
    return _kinds()
  kind: Any = Config
  for part in name.split("."):
    kind = typing.get_type_hints(kind)[part]
  return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _kinds() -> tuple[str, ...]:
  """Returns the kinds of predictors, read from the source: an import takes seconds."""
  source = Path(mtp_jax.__file__).with_name("predictors") / "__init__.py"
  (table,) = (
    node.value
    for node in ast.parse(source.read_text()).body
    if isinstance(node, ast.AnnAssign) and node.target.id == "KINDS"
  )
  return tuple(key.value for key in table.keys)


def _describe(conditions: Conditions) -> str:
  """Returns the conditions in words."""
  parts = []
  for names, values in conditions.items():
    name = names if isinstance(names, str) else " or ".join(names)
    if isinstance(values, Range):
      parts.append(f"{name} is {values.text}")
    else:
      parts.append(f"{name} is {' or '.join(map(repr, values))}")
  return " and ".join(parts)


if __name__ == "__main__":
  sys.exit(main())
