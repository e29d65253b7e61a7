"""Reads the text of a compiled XLA program: its collectives and the arrays it makes.

XLA's own cost analysis counts the body of a loop once. Here every instruction counts as
often as it runs: a loop's length is read from what XLA noted about it or else from its
condition, which compares a counter with a constant.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)")
_CALLS = re.compile(r"\b(?:calls|to_apply|called_computations=\{)=?%([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")

# What each device sends, per byte of its array, in a group of n devices, if the
# collective runs as a ring.
_SENT = {
  "all-gather": lambda n: n - 1,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-permute": lambda n: 1,
}
KINDS = tuple(_SENT)
_PARTIAL = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction.

  times:       how often it runs in one step.
  group:       devices that take part together.
  operands, results: the arrays on one device, as (dtype, dimensions).
  sent_bytes:  what one device sends in one step, all times together.
  """

  kind: str
  name: str
  times: int
  group: int
  operands: tuple[tuple[str, tuple[int, ...]], ...]
  results: tuple[tuple[str, tuple[int, ...]], ...]

  @property
  def sent_bytes(self) -> float:
    # XLA on TPU may round an all-reduce: the result is what travels.
    arrays = self.results if self.kind == "all-reduce" else self.operands
    size = sum(map(array_bytes, arrays))
    return self.times * size * _SENT[self.kind](self.group)


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  opcode: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  operands: tuple[str, ...]
  text: str
  is_root: bool


class Program:
  """A compiled module, from `jax.stages.Compiled.as_text()`."""

  def __init__(self, text: str):
    self._computations: dict[str, dict[str, _Instruction]] = {}
    partitions = re.search(r"\bnum_partitions=(\d+)", text[: text.find("\n")])
    self._num_devices = int(partitions[1]) if partitions else 1
    self._parse(text)
    self.unknown_loops = 0

  def arrays(self) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields every array, as (dtype, dimensions on one device), that is made."""
    for instructions in self._computations.values():
      for instruction in instructions.values():
        yield from instruction.arrays

  @functools.cached_property
  def collectives(self) -> list[Collective]:
    """Every collective that runs at least once."""
    found = []
    self.unknown_loops = 0
    self._walk(self._entry, 1, found)
    return found

  def _parse(self, text: str) -> None:
    current: dict[str, _Instruction] = {}
    for line in text.splitlines():
      if header := _HEADER.match(line):
        current = self._computations.setdefault(header[2], {})
        if header[1]:
          self._entry = header[2]
      elif match := _INSTRUCTION.match(line):
        instruction = _parse_instruction(*match.groups())
        current[instruction.name] = instruction

  def _walk(self, computation: str, times: int, found: list[Collective]) -> None:
    instructions = self._computations[computation]
    for instruction in instructions.values():
      kind = instruction.opcode.removesuffix("-start")
      if kind in _SENT and not instruction.opcode.endswith("-done"):
        group = _group_size(instruction.text) or self._num_devices
        found.append(
          Collective(
            # On TPU a reduce-scatter is an all-reduce of which a fusion keeps one part.
            kind="reduce-scatter" if computation.startswith(_PARTIAL) else kind,
            name=instruction.name,
            times=times,
            group=group,
            operands=tuple(
              a for name in instruction.operands for a in instructions[name].arrays
            ),
            results=instruction.arrays,
          )
        )
      if instruction.opcode == "while":
        body = re.search(r"\bbody=%([\w.\-]+)", instruction.text)[1]
        self._walk(body, times * self._trips(instruction, instructions), found)
        continue
      if kind in _SENT or instruction.opcode in ("reduce", "scatter", "sort"):
        continue  # What they apply to pairs of numbers.
      called = _CALLS.findall(instruction.text)
      for branches in _BRANCHES.findall(instruction.text):
        called += re.findall(r"%([\w.\-]+)", branches)
      for name in called:
        self._walk(name, times, found)

  def _trips(
    self, loop: _Instruction, caller: dict[str, _Instruction]
  ) -> int:
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
      return int(known[1])
    condition = self._of(loop, "condition")
    compare = next(i for i in condition.values() if i.is_root)
    names = [condition[name] for name in compare.operands if name in condition]
    limits = [value for i in names if (value := _constant(i)) is not None]
    counters = [i for i in names if i.opcode == "get-tuple-element"]
    if (
      compare.opcode != "compare"
      or "direction=LT" not in compare.text
      or len(limits) != 1
      or len(counters) != 1
    ):
      self.unknown_loops += 1
      return 1
    index = int(re.search(r"\bindex=(\d+)", counters[0].text)[1])
    start = self._first_value(loop, caller, index)
    return -(-(limits[0] - start) // self._step(loop, index))

  def _of(self, loop: _Instruction, part: str) -> dict[str, _Instruction]:
    return self._computations[re.search(rf"\b{part}=%([\w.\-]+)", loop.text)[1]]

  def _first_value(
    self, loop: _Instruction, caller: dict[str, _Instruction], index: int
  ) -> int:
    """The counter before the loop: a constant of the caller, else 0."""
    initial = caller.get(loop.operands[0])
    if initial is None or initial.opcode != "tuple":
      return 0
    value = caller.get(initial.operands[index])
    while value is not None and value.opcode in ("copy", "bitcast", "convert"):
      value = caller.get(value.operands[0])
    return (_constant(value) if value is not None else None) or 0

  def _step(self, loop: _Instruction, index: int) -> int:
    """What the body adds to the counter, 1 where it is not told by a plain addition."""
    body = self._of(loop, "body")
    root = next(i for i in body.values() if i.is_root)
    if root.opcode != "tuple":
      return 1
    added = body.get(root.operands[index])
    if added is None or added.opcode != "add":
      return 1
    steps = [_constant(body[name]) for name in added.operands if name in body]
    return next((step for step in steps if step), 1)


def array_bytes(array: tuple[str, tuple[int, ...]]) -> float:
  """Returns the bytes of an array (dtype, dimensions) without padding."""
  dtype, dims = array
  bits = _BITS.get(dtype)
  if bits is None:
    bits = int(re.search(r"\d+", dtype)[0])
  return math.prod(dims) * bits / 8


def _group_size(text: str) -> int | None:
  """Devices of one replica group, None where it is not written out.

  Written as `{{0,1},{2,3}}`, as `[2,2]<=[4]` (the last number) or by axes of a mesh,
  `mesh['a'=2,'b'=4] {'a','b':(1)2}`, of the second of which there is a part only.
  """
  if groups := re.search(r"\breplica_groups=\{\{([\d,]*)\}", text):
    return groups[1].count(",") + 1
  if groups := re.search(r"\breplica_groups=\[([\d,]+)\]<=", text):
    return int(groups[1].split(",")[-1])
  if groups := re.search(r"\breplica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", text):
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups[1]))
    used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", groups[2])
    return math.prod(int(part or sizes[name]) for name, part in used)
  if re.search(r"\breplica_groups=(?!\{\})", text):
    raise ValueError(f"replica groups of an unknown form: {text}")
  return None


def _parse_instruction(root: str | None, name: str, rest: str) -> _Instruction:
  rest = re.sub(r"/\*.*?\*/", "", rest)
  kind, rest = _cut_type(rest)
  opcode, _, rest = rest.partition("(")
  inside = rest[: _closing(rest)]
  return _Instruction(
    name=name,
    opcode=opcode.strip(),
    arrays=tuple(
      (dtype, tuple(int(d) for d in dims.split(",") if d))
      for dtype, dims in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", kind))
    ),
    operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
    text=f"({rest}",
    is_root=root is not None,
  )


def _cut_type(text: str) -> tuple[str, str]:
  """Splits `f32[2]{0} add(...)` or `(f32[2], s32[]) tuple(...)` after the type."""
  if text.startswith("("):
    end = 1 + _closing(text[1:]) + 1
    return text[:end], text[end:]
  kind, _, rest = text.partition(" ")
  return kind, rest


def _closing(text: str) -> int:
  """Where the parenthesis closes that was opened just before `text`."""
  depth = 1
  for i, character in enumerate(text):
    depth += (character == "(") - (character == ")")
    if depth == 0:
      return i
  return len(text)


def _constant(instruction: _Instruction) -> int | None:
  value = re.match(r"\((\d+)\)", instruction.text)
  return int(value[1]) if instruction.opcode == "constant" and value else None
