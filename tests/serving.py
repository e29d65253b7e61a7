"""Layouts and engines: exports planted models and compares what engines decode.

  python -m tests.serving --python=.venv-vllm/bin/python [CASE ...]
  python -m tests.serving ... --output=experiments/results/serving/verified.json

The file keeps rows of earlier calls, each with its commit. `--table` prints all of them
as docs/how-to/serving.md has them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from launch.verify import Verification, verify
from mtp_jax import interop
from mtp_jax.data.tokenizers import ByteTokenizer
from mtp_jax.interop import serving
from mtp_jax.sharding import make_mesh
from mtp_jax.trained_model import TrainedModel
from tests import planted

_KEEP = lambda folder: None  # noqa: E731


def model_of(case: str) -> TrainedModel:
  config = planted.config_of(case)
  params = jax.tree.map(jnp.asarray, planted.planted(config))
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  return TrainedModel(config, params, ByteTokenizer(), 0, Path(), mesh)


def check(
  case: str,
  engine: str,
  python: str,
  folder: Path,
  change: Callable[[Path], None] = _KEEP,
) -> Verification:
  """Exports the model of a case below `folder` and decodes with it there and here.

  `change`: edits the exported folder first, which may make it another model's.
  """
  model, (layout, of_trunk, *_) = model_of(case), planted.CASES[case]
  trunk, out = folder / "trunk", folder / "out"
  how = {"tokenizer": model.tokenizer}
  if of_trunk:
    interop.export_params(
      model.params, model.config, trunk, of_trunk, trunk_only=True, **how
    )
  base_model = str(trunk) if of_trunk else ""
  interop.export_params(
    model.params, model.config, out, layout, base_model=base_model, **how
  )
  change(out)
  return verify(model, out, layout, engine, python, base_model=base_model)


def row_of(case: str, engine: str, found: Verification, seconds: float) -> dict:
  """Returns what is kept of a verification."""
  return {
    "case": case,
    "engine": engine,
    "version": found.version,
    "drafts": found.drafts,
    "equal": sum(not row.differs for row in found.rows),
    "prompts": len(found.rows),
    "ours": [row.ours for row in found.rows],
    "theirs": [row.theirs for row in found.rows],
    "differs": sorted({row.differs for row in found.rows if row.differs}),
    "seconds": round(seconds),
  }


def table(kept: list[dict]) -> str:
  """Returns the rows of a file of results as Markdown."""
  lines = [
    "| model | engine | drafts | equal prompts | else differs | "
    "accepted/rounds, engine (here) |",
    "|---|---|---|---|---|---|",
  ]
  for case in planted.CASES:
    for row in kept:
      if row["case"] == case:
        pairs = zip(row["theirs"], row["ours"], strict=True)
        counts = ", ".join(
          theirs if theirs == ours else f"{theirs} ({ours})" for theirs, ours in pairs
        )
        is_text = any(what.startswith("the text") for what in row["differs"])
        what = "text" if is_text else "drafts" if row["differs"] else ""
        lines.append(
          f"| {case} | {row['engine']} {row['version']} | {row['drafts']} | "
          f"{row['equal']} of {row['prompts']} | {what} | "
          f"{counts if row['drafts'] else ''} |"
        )
  return "\n".join(lines)


def main() -> int:
  parser = argparse.ArgumentParser()
  parser.add_argument("cases", nargs="*", metavar="CASE")
  parser.add_argument("--python", help="of vLLM; without it, transformers alone")
  parser.add_argument("--engine", choices=serving.ENGINES, help="this one alone")
  parser.add_argument("--output", help="file for the results")
  parser.add_argument("--table", action="store_true", help="print what is kept")
  wanted = parser.parse_args()
  pythons = {"transformers": sys.executable, "vllm": wanted.python}
  output = Path(wanted.output or "experiments/results/serving/verified.json")
  kept = json.loads(output.read_text()) if output.exists() else []
  if wanted.table:
    print(table(kept))
    return 0
  commit = subprocess.run(
    ["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True
  ).stdout.strip()
  rows = []
  for case in wanted.cases or planted.CASES:
    config, layout = planted.config_of(case), planted.CASES[case][0]
    for engine, python in pythons.items():
      if (
        not python
        or wanted.engine not in (None, engine)
        or serving.engine_obstacle(config, layout, engine)
      ):
        continue
      start = time.monotonic()
      with tempfile.TemporaryDirectory() as folder:
        try:
          found = check(case, engine, python, Path(folder))
        except RuntimeError as error:
          print(f"{case}, {engine}: {error}", flush=True)
          rows.append({"case": case, "engine": engine, "differs": ["does not open"]})
          continue
      rows.append(
        row_of(case, engine, found, time.monotonic() - start) | {"commit": commit}
      )
      print(f"{case}: {found}", flush=True)
      if wanted.output:
        is_new = lambda row: (row["case"], row["engine"]) != (case, engine)  # noqa: B023, E731
        kept = [*filter(is_new, kept), rows[-1]]
        output.write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")
  return int(any(row["differs"] for row in rows))


if __name__ == "__main__":
  sys.exit(main())
