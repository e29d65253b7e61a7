"""What compiled programs depend on: a config without the keys of the host.

Trials with equal programs share their compilation: learning rate, lambda, seeds, number
of steps, names and intervals are traced or live on the host.
"""

import dataclasses
import functools
import typing
from typing import Any

from mtp_jax.config import Config
from mtp_jax.effects import settled
from mtp_jax.keys import HOST


def _without_host_keys(section: type) -> type:
  """Returns the dataclass of the keys of a section that programs depend on.

  It is the section's own class where all of them are, and has its properties.
  """
  hints, kept = typing.get_type_hints(section), {}
  for field in dataclasses.fields(section):
    facts, kind = field.metadata, hints[field.name]
    if "key" not in facts:
      kind = _without_host_keys(kind)
    if HOST not in facts["key"].role if "key" in facts else dataclasses.fields(kind):
      kept[field.name] = kind
  if kept == hints:
    return section
  properties = {k: v for k, v in vars(section).items() if isinstance(v, property)}
  made = dataclasses.make_dataclass(
    f"Program{section.__name__}", list(kept.items()), namespace=properties,
    frozen=True, kw_only=True,
  )
  made.__module__ = __name__
  globals()[made.__name__] = made  # Where pickle looks for it.
  return made


# The sections of a `Config` with the keys that compiled programs depend on: to read
# another one is an AttributeError.
ProgramConfig = _without_host_keys(Config)


@functools.lru_cache(maxsize=1024)
def program_config(config: Config) -> ProgramConfig:
  """Returns what compiled programs depend on; keys without effect have the default."""
  return _part(ProgramConfig, settled(config))


def _part(cls: type, section: Any) -> Any:
  """Returns the part of a section that has a place in `cls`."""
  if isinstance(section, cls):
    return section
  hints = typing.get_type_hints(cls)
  values = {name: getattr(section, name) for name in hints}
  return cls(**{
    name: _part(hints[name], value) if dataclasses.is_dataclass(value) else value
    for name, value in values.items()
  })
