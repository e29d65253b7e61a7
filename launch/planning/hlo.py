"""The text of a compiled program: its loops, and how often each line runs."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
)
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
# Asynchronous collectives count where they end: there the type is the results' type.
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-done)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|\w+_computations?)=\{?((?:%[\w.\-]+(?:, )?)+)")
# Lines whose computations run as they stand; a fusion is one kernel.
_RUNS = re.compile(r" (?:call|conditional)\(")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


class Module(NamedTuple):
  """The lines of every computation, and the name of the first that runs."""

  computations: dict[str, list[str]]
  entry: str


class Line(NamedTuple):
  """One line, the computation that it stands in, and how often it runs."""

  text: str
  computation: str
  times: int


def parse(text: str) -> Module:
  """Returns the module of `Compiled.as_text()`."""
  computations: dict[str, list[str]] = {}
  entry, lines = "", []
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      lines = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    else:
      lines.append(line)
  return Module(computations, entry)


def turn(module: Module) -> Module:
  """Returns the module that runs the body of its only loop outside of loops, once."""
  [loop] = [x for x in module.computations[module.entry] if " while(" in x]
  return module._replace(entry=_named("body", loop))


def unknown_loops(module: Module) -> int:
  """Returns the number of loops of unknown length, whose bodies count once."""
  lines = walk(module, into_calls=True)
  return sum(
    " while(" in x.text and _trips(x.text, module.computations) is None for x in lines
  )


def walk(module: Module, into_calls: bool = False) -> Iterator[Line]:
  """Yields the lines that run: of the entry, and of the bodies of loops and branches.

  Of a conditional every branch counts once. `into_calls`: also the lines of fusions and
  of other computations that a line names.
  """

  def run(name: str, times: int) -> Iterator[Line]:
    for line in module.computations[name]:
      yield Line(line, name, times)
      if " while(" in line:
        trips = _trips(line, module.computations)
        yield from run(_named("body", line), times * (trips or 1))
      elif "-done(" not in line and (into_calls or _RUNS.search(line)):
        for group in _CALLED.findall(line):
          for called in re.findall(r"[\w.\-]+", group):
            yield from run(called, times)

  yield from run(module.entry, 1)


def collectives(module: Module) -> dict[str, dict[str, int]]:
  """Returns by kind of collective `count` and `bytes` of one step.

  `bytes`: of the results on one device, over all times that they run.
  """
  found = {kind: {"count": 0, "bytes": 0} for kind in COLLECTIVES}
  for line in walk(module, into_calls=True):
    if match := _COLLECTIVE.search(line.text):
      # On a TPU, a fusion that keeps a part of an all-reduce is a reduce-scatter.
      is_part = line.computation.startswith("all-reduce-scatter")
      counts = found["reduce-scatter" if is_part else match[2]]
      counts["count"] += line.times
      counts["bytes"] += line.times * num_bytes(match[1])
  return found


def _trips(loop: str, computations: dict[str, list[str]]) -> int | None:
  """Returns how often a loop's body runs, None where its text does not tell.

  XLA notes it for CPUs and GPUs. For TPUs it is the constant that the counter stays
  below, over the constant that the body adds to the counter. Counters start at 0.
  """
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
    return int(known[1])
  condition = "\n".join(computations[_named("condition", loop)])
  limits = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", condition)
  places = re.findall(r"[su]32\[\]\S* get-tuple-element\(.*?, index=(\d+)", condition)
  if (len(limits), len(places)) != (1, 1) or "direction=LT" not in condition:
    return None
  body = computations[_named("body", loop)]
  of_name = dict(re.findall(r"%([\w.\-]+) = (.*)", "\n".join(body)))
  root = next(line for line in body if "ROOT " in line).partition(" tuple(")[2]
  counter = re.findall(r"%([\w.\-]+)", root)[int(places[0])] if root else ""
  added = re.search(r" add\((.*?)\)", of_name.get(counter, ""))
  for name in re.findall(r"%([\w.\-]+)", added[1]) if added else ():
    if step := re.search(r" constant\((\d+)\)", of_name.get(name, "")):
      return -(-int(limits[0]) // int(step[1]))
  return int(limits[0])


def _named(part: str, loop: str) -> str:
  return re.search(rf"\b{part}=%?([\w.\-]+)", loop)[1]


def num_bytes(types: str) -> int:
  """Returns the bytes of all arrays of a type, as `bf16[2,4]{1,0}` or a tuple."""
  return sum(
    math.prod(int(d) for d in dims.split(",") if d) * max(int(bits or 8), 8) // 8
    for name, bits, dims in _ARRAY.findall(re.sub(r"\{.*?\}", "", types))
  )
