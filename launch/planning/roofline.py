"""A model of the time of a program compiled for a GPU, kernel by kernel.

Each kernel takes the longest of three times: its FLOPs at a share of the peak, its
bytes at a share of the memory's bandwidth, and the time that a kernel takes at least.
Nothing overlaps. It is a model, not a measurement: it ranks programs, and finds what is
slow in one of them.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

from launch.planning import hlo
from launch.planning.chips import CHIPS, Gpu

# Assumed: shares of the peak and of the bandwidth that large kernels reach, and the
# seconds of the smallest kernel.
_OF_PEAK = {
  "products": 0.68, "grouped": 0.50, "attention": 0.35, "attention backward": 0.30
}
_OF_BANDWIDTH, _OF_LINK, _LEAST_SECONDS = 0.83, 0.8, 3e-6
ASSUMED = (
  f"Assumed: products reach {_OF_PEAK['products']:.0%} of the peak, grouped products "
  f"of tokamax {_OF_PEAK['grouped']:.0%}, attention of cuDNN "
  f"{_OF_PEAK['attention']:.0%} forward and {_OF_PEAK['attention backward']:.0%} "
  f"backward, memory {_OF_BANDWIDTH:.0%} of {{chip.bandwidth:.3g}} bytes/s, links "
  f"{_OF_LINK:.0%} of {{chip.link:.3g}}; a kernel takes {1e6 * _LEAST_SECONDS:g} us at "
  "least."
)
KINDS = ("products", "attention", "elementwise", "copies", "collectives")
# They start no kernel; what -done ends was counted where it started.
_FREE = {
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call",
  "conditional", "after-all", "partition-id", "replica-id", "opt-barrier",
  "add-dependency", "domain",
}
_MOVES = {
  "copy", "transpose", "reshape", "broadcast", "slice", "dynamic-slice", "concatenate",
  "dynamic-update-slice", "pad", "reverse", "iota", "convert", "bitcast-convert",
}
_SLICES = {"slice", "dynamic-slice", "gather"}


class Kernel(NamedTuple):
  """One line that starts a kernel.

  kind: one of `KINDS`. num_bytes: read and written. times: how often it runs. target:
  of a custom call. flops: of products and attention.
  """

  kind: str
  name: str
  target: str
  times: int
  flops: float
  num_bytes: int
  is_wide: bool

  def seconds(self, gpu: Gpu) -> float:
    """Returns the time of one run."""
    part = self.kind
    if part == "attention" and "Backward" in self.target:
      part = "attention backward"
    elif part == "products" and "triton" in self.target:
      part = "grouped"
    # The tensor cores multiply float32 (as TF32) at half the rate of bfloat16.
    peak = gpu.peak_flops * _OF_PEAK.get(part, 1.0) * (0.5 if self.is_wide else 1.0)
    is_sent = self.kind == "collectives"
    rate = gpu.link * _OF_LINK if is_sent else gpu.bandwidth * _OF_BANDWIDTH
    return max(self.flops / peak, self.num_bytes / rate, _LEAST_SECONDS)


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  type: str
  opcode: str
  operands: list[str]
  rest: str
  is_root: bool


def summary(kernels: list[Kernel], gpu: Gpu) -> dict[str, dict[str, float]]:
  """Returns by kind of kernel `count`, `bytes`, `flops` and `seconds` of one step."""
  found = {}
  for kind in KINDS:
    own = [kernel for kernel in kernels if kernel.kind == kind]
    found[kind] = {
      "count": sum(x.times for x in own),
      "bytes": sum(x.times * x.num_bytes for x in own),
      "flops": sum(x.times * x.flops for x in own),
      "seconds": sum(x.times * x.seconds(gpu) for x in own),
    }
  return found


def predicted(program: jax.stages.Compiled, device_kind: str) -> dict[str, float]:
  """Returns `roofline_seconds` of a step, on a GPU whose figures are known."""
  gpus = (x for x in CHIPS.values() if isinstance(x, Gpu))
  gpu = next((x for x in gpus if x.device_kind == device_kind), None)
  if gpu is None:
    return {}
  found = summary(kernels(hlo.parse(program.as_text())), gpu)
  return {"roofline_seconds": sum(x["seconds"] for x in found.values())}


def kernels(module: hlo.Module) -> list[Kernel]:
  """Returns the kernels of a program compiled for a GPU, in their order."""
  parsed: dict[str, dict[str, Instruction]] = {}

  def of(computation: str) -> dict[str, Instruction]:
    if computation not in parsed:
      lines = map(_instruction, module.computations[computation])
      parsed[computation] = {x.name: x for x in lines if x}
    return parsed[computation]

  found = []
  for line in hlo.walk(module):
    instruction = _instruction(line.text)
    if instruction is None or instruction.opcode in _FREE:
      continue
    if not instruction.opcode.endswith(("-done", "-update")):
      called = re.search(r"calls=%?([\w.\-]+)", instruction.rest)
      body = of(called[1]) if called else None
      found.append(_kernel(instruction, of(line.computation), body, line.times))
  return found


def _kernel(
  line: Instruction,
  around: dict[str, Instruction],
  body: dict[str, Instruction] | None,
  times: int,
) -> Kernel:
  """Returns the kernel of a line; `body` is what a fusion computes."""
  opcode = line.opcode.removesuffix("-start")
  target = re.search(r'custom_call_target="([^"]*)"', line.rest)
  target = target[1] if target else ""
  products = [x for x in (body or {}).values() if x.opcode == "dot"]
  flops, is_wide = sum(_dot_flops(x, body) for x in products), False
  if products:
    is_wide = body[products[0].operands[0]].type.startswith("f32")
  if opcode == "dot":
    kind, flops = "products", _dot_flops(line, around)
  elif "fmha" in target:
    kind, flops = "attention", _attention_flops(line, "Backward" in target)
  elif "triton" in target and len(_dims(around[line.operands[0]].type)) == 2:
    # The kernel of tokamax. Each row has one matrix, or gives to the gradient of one.
    rows, columns = _dims(around[line.operands[0]].type), _dims(line.type)[-1]
    kind, flops = "products", 2.0 * math.prod(rows) * columns
  elif "cublas" in target or "gemm" in target:
    kind, flops = "products", _gemm_flops(line, around)
    is_wide = around[line.operands[0]].type.startswith("f32")
  elif products:
    kind = "products"
  elif opcode in hlo.COLLECTIVES:
    kind = "collectives"
  elif opcode in _MOVES or (body is not None and _only_moves(body)):
    kind = "copies"
  else:
    kind = "elementwise"
  if kind == "collectives":
    num_bytes = hlo.num_bytes(line.type)
  else:
    num_bytes = _bytes(line, around, body)
  return Kernel(kind, line.name, target, times, flops, num_bytes, is_wide)


def _instruction(text: str) -> Instruction | None:
  """Returns the parts of a line `%name = type opcode(%a, %b), attributes`."""
  head, equals, rest = text.strip().partition(" = ")
  if not equals:
    return None
  is_root = head.startswith("ROOT ")
  end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
  kind, rest = rest[:end], rest[end:].lstrip()
  opcode, _, rest = rest.partition("(")
  end = _closing(f"({rest}") - 1
  # A type may stand before each operand; the name is its last word.
  operands = re.findall(r"%([\w.\-]+)(?=\s*(?:,|$))", rest[:end])
  return Instruction(
    head.removeprefix("ROOT ").lstrip("%"), kind, opcode, operands, rest[end + 1 :],
    is_root,
  )


def _closing(text: str) -> int:
  """Returns the index of the parenthesis that closes the first one."""
  depth = 0
  for index, character in enumerate(text):
    depth += (character == "(") - (character == ")")
    if character in "()" and depth == 0:
      return index
  return len(text)


def _only_moves(body: dict[str, Instruction]) -> bool:
  """Returns whether a fusion computes nothing but scalars, such as indices."""
  return all(
    x.opcode in _MOVES | _FREE or "[]" in x.type.partition("{")[0]
    for x in body.values()
  )


def _bytes(
  line: Instruction,
  around: dict[str, Instruction],
  body: dict[str, Instruction] | None,
) -> int:
  """Returns the bytes that a kernel reads and writes.

  Of an operand that is only sliced, the slices; of an operand updated in place, the
  update.
  """
  if body is None:
    result = hlo.num_bytes(line.type)
    if line.opcode in _SLICES:
      return 2 * result
    sizes = [hlo.num_bytes(around[x].type) for x in line.operands if x in around]
    is_update = line.opcode == "dynamic-update-slice"
    return 2 * sizes[1] if is_update else result + sum(sizes)
  total = 0
  for parameter in body.values():
    if parameter.opcode == "parameter":
      total += min(hlo.num_bytes(parameter.type), _read(parameter.name, body))
  roots = [x for x in body.values() if x.is_root]
  return total + sum(_written(root, body) for root in roots)


def _read(name: str, body: dict[str, Instruction]) -> int:
  """Returns the bytes that a fusion reads of one of its values."""
  total = 0
  for user in body.values():
    if name not in user.operands:
      continue
    if user.opcode in _SLICES and user.operands[0] == name:
      total += hlo.num_bytes(user.type)
    elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
      continue
    elif user.opcode == "bitcast":
      total += _read(user.name, body)
    else:
      return hlo.num_bytes(body[name].type)
  return total


def _written(root: Instruction, body: dict[str, Instruction]) -> int:
  """Returns the bytes that the result of a fusion takes; of an update, its own."""
  if root.opcode in ("tuple", "bitcast"):
    return sum(_written(body[x], body) for x in root.operands)
  if root.opcode == "dynamic-update-slice":
    return hlo.num_bytes(body[root.operands[1]].type)
  return hlo.num_bytes(root.type)


def _dims(kind: str) -> list[int]:
  return [int(x) for x in re.search(r"\[([\d,]*)\]", kind)[1].split(",") if x]


def _dot_flops(dot: Instruction, around: dict[str, Instruction]) -> float:
  contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.rest)[1]
  return _product_flops(
    dot.type, around[dot.operands[0]].type, contracted.split(",")
  )


def _gemm_flops(call: Instruction, around: dict[str, Instruction]) -> float:
  contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.rest)[1]
  return _product_flops(
    call.type, around[call.operands[0]].type, re.findall(r"\d+", contracted)
  )


def _product_flops(result: str, left: str, contracted: list[str]) -> float:
  sizes = _dims(left)
  inner = math.prod(sizes[int(axis)] for axis in contracted if axis)
  return 2.0 * math.prod(_dims(result)) * inner


def _attention_flops(call: Instruction, is_backward: bool) -> float:
  """Returns the FLOPs of cuDNN's attention: of the causal half where the mask is."""
  config = json.loads(next(_json_objects(call.rest)))["cudnn_fmha_backend_config"]
  scores = math.prod(map(int, config["intermediate_tensor_shape"]["dimensions"]))
  head_dim = int(_dims(call.type)[-1])
  pairs = scores / 2 if "CAUSAL" in config.get("mask_type", "") else scores
  return pairs * head_dim * (10.0 if is_backward else 4.0)


def _json_objects(text: str) -> Iterator[str]:
  """Yields what stands between the braces of `backend_config={...}`."""
  for match in re.finditer(r"backend_config=\{", text):
    depth, start = 0, match.end() - 1
    for index in range(start, len(text)):
      depth += (text[index] == "{") - (text[index] == "}")
      if depth == 0:
        yield text[start : index + 1]
        break
