"""The facts in the line of a config key: default, meaning, range, role, and effect.

  depth: int = key(0, "D extra tokens", ARCH, at_least(0))

declares a field of a section of a config. All that treats keys differently
is derived from these lines: which values are refused, what a run may change when it
resumes, what compiled programs depend on, and which trials an analysis compares.
"""

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Role(enum.Flag):
  """What else a change of the key changes; no flag: what is trained, and how."""

  ARCHITECTURE = enum.auto()  # The parameter tree, or what its numbers mean.
  HOST = enum.auto()  # Nothing in a compiled program.
  RESUMES = enum.auto()  # May differ between a checkpoint and the run that resumes it.
  SCALES = enum.auto()  # May differ between the sizes of a ladder of trials.
  REPEATS = enum.auto()  # Tells trials of one method and size apart.
  UNCOMPARED = enum.auto()  # Trials that differ in it are compared all the same.


ARCH, HOST, RESUMES = Role.ARCHITECTURE, Role.HOST, Role.RESUMES
SCALES, UNCOMPARED = Role.SCALES, Role.UNCOMPARED
SIZE = ARCH | SCALES
REPEATS = HOST | Role.REPEATS
# How a program runs, how often a run is looked at, and what the final evaluation reads.
RUNS = RESUMES | UNCOMPARED
WATCH = HOST | RUNS
MEASURE = HOST | RESUMES


class Range(NamedTuple):
  """Values that a key may have whatever the other values are: "must be `text`"."""

  text: str
  holds: Callable[[Any], bool]


def at_least(least: int) -> Range:
  return Range(f"at least {least}", lambda x: x >= least)


def at_most(most: int) -> Range:
  return Range(f"at most {most}", lambda x: x <= most)


NOT_NEGATIVE = Range("finite and not negative", lambda x: 0 <= x < math.inf)
ABOVE_0 = Range("finite and positive", lambda x: 0 < x < math.inf)
FACTOR = Range("finite and at least 1", lambda x: 1 <= x < math.inf)
FRACTION = Range("in [0, 1]", lambda x: 0 <= x <= 1)
SHARE = Range("in (0, 1]", lambda x: 0 < x <= 1)
BELOW_1 = Range("in [0, 1)", lambda x: 0 <= x < 1)
SEED = Range("in [0, 2^31)", lambda x: 0 <= x < 2**31)
REST_OR_1 = Range("-1 (the rest) or at least 1", lambda x: x == -1 or x >= 1)
INT32 = Range("less than 2^31: JAX counts in 32 bits", lambda x: x < 2**31)

ON = Range("positive", bool)

# Where a key has an effect: every condition holds, which is a dotted key (or several,
# of which one suffices) and the values that it must have.
Conditions = Mapping[Any, tuple[Any, ...] | Range]


@dataclasses.dataclass(frozen=True)
class Key:
  """One key.

  default, meaning: of the key. ranges, role: see `Range` and `Role`.
  most: the dotted key that holds its largest value. by: a key that divides it.
  when: elsewhere nothing reads the key, and it must have its default; None is
    the condition of its section.
  then: the same, checked where `when` holds.
  when_given: the same, but refused only where the key was set for this run alone: the
    next-token baseline of a sweep has what weighs the extra depths like the others.
  """

  default: Any
  meaning: str
  ranges: tuple[Range, ...]
  role: Role
  most: str | None
  by: str | None
  when: Conditions | None
  then: Conditions
  when_given: Conditions


def key(
  default: Any,
  meaning: str,
  *facts: Range | Role,
  most: str | None = None,
  by: str | None = None,
  when: Conditions | None = None,
  then: Conditions | None = None,
  when_given: Conditions | None = None,
) -> Any:
  """Returns the field of a section that holds one key; see `Key`.

  The field has no default for the constructor: a config is complete.
  """
  ranges = tuple(fact for fact in facts if isinstance(fact, Range))
  role = Role(0)
  for fact in facts:
    role |= fact if isinstance(fact, Role) else Role(0)
  found = Key(
    default, meaning, ranges, role, most, by, when, then or {}, when_given or {}
  )
  return dataclasses.field(metadata={"key": found})


def section(when: Conditions) -> Any:
  """Returns the field of a section within a section; its keys have an effect `when`."""
  return dataclasses.field(metadata={"when": when})
