"""Flags of an engine from the fields of a dataclass: `--slurm.partition=...`."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from absl import flags

# Flags that are defined here belong to the command that asked for them, in its --help.
flags.disclaim_key_flags()

Options = TypeVar("Options")


def option(default: Any, text: str) -> Any:
  """Returns a field that is also a flag; `text` is what --help says."""
  return dataclasses.field(default=default, metadata={"text": text})


def define(prefix: str, options: type[Options]) -> Callable[[], Options]:
  """Defines `--PREFIX.FIELD` for every field; returns what reads them all.

  Fields of type `int` are flags of numbers, all others of texts.
  """
  holders = {}
  for field in dataclasses.fields(options):
    kind = flags.DEFINE_integer if field.type is int else flags.DEFINE_string
    name = f"{prefix}.{field.name}"
    holders[field.name] = kind(name, field.default, field.metadata["text"])
  return lambda: options(**{name: holder.value for name, holder in holders.items()})
