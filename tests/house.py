"""House rules in figures: lines per room, largest files, kinds, import circles.

  make house        # python -m tests.house

`tests/test_house.py` holds the code against the limits.
"""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import grimp

LONGEST_FILE = 450
LONGEST_LOOP = 300
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mtp_jax", "launch", "experiments")
ROOMS = (*PACKAGES, "mtp_jax/analysis", "launch/engines", "launch/benchmarks", "tests")
# Where a kind of predictor may be named: its own files, and the formats of others.
OF_KINDS = ("mtp_jax/predictors", "mtp_jax/interop")


def files(*folders: str) -> list[Path]:
  return sorted(x for folder in folders for x in (ROOT / folder).rglob("*.py"))


def num_lines(*paths: Path) -> int:
  return sum(len(path.read_text().splitlines()) for path in paths)


def questions_about_kinds() -> Iterator[str]:
  """Yields `file:line` wherever code outside of `OF_KINDS` compares `mtp.kind`."""
  for path in files("mtp_jax", "launch"):
    name = str(path.relative_to(ROOT))
    if not name.startswith(OF_KINDS):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare | ast.Match) and _reads_kind(node):
          yield f"{name}:{node.lineno}"


def _reads_kind(node: ast.Compare | ast.Match) -> bool:
  asked = [node.subject] if isinstance(node, ast.Match) else [
    node.left, *node.comparators
  ]
  return any(ast.unparse(part).endswith("mtp.kind") for part in asked)


def import_circle() -> list[str]:
  """Returns the modules of one circle of imports, or none."""
  graph = grimp.build_graph(*PACKAGES)
  imports = {
    module: graph.find_modules_directly_imported_by(module) for module in graph.modules
  }
  try:
    graphlib.TopologicalSorter(imports).prepare()
  except graphlib.CycleError as error:
    return error.args[1]
  return []


def main() -> None:
  for room in ROOMS:
    print(f"{num_lines(*files(room)):7,} lines  {room}")
  print(f"{num_lines(*files(*PACKAGES)):7,} lines  all outside of tests\n")
  for path in sorted(files(*PACKAGES), key=num_lines)[-5:]:
    print(f"{num_lines(path):7,} lines  {path.relative_to(ROOT)}")
  asked = list(questions_about_kinds())
  print(f"\nkinds asked outside of {', '.join(OF_KINDS)}: {len(asked)}")
  print("".join(f"  {where}\n" for where in asked), end="")
  print("circle of imports:", " -> ".join(import_circle()) or "none")


if __name__ == "__main__":
  main()
