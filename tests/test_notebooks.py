"""The notebooks run from a fresh kernel; what is committed is small and complete."""

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from tests.commands import ROOT
from tests.quick_xla import xla_flags
from tests.synthetic_runs import World, write_ladder
from tests.tiny_runs import write_texts

FOLDER = ROOT / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
QUICK = {
  "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(), "PYTHONPATH": str(ROOT)
}

TRAIN = """
import sys
from pathlib import Path
from mtp_jax import train
from tests.tiny_runs import run_config

off = ("eval.line_prompts", "eval.function_prompts", "train.diagnostics_every")
config = run_config(Path(sys.argv[1]), dict.fromkeys(off, 0))
train.fit(config, Path(sys.argv[2]), progress=False)
"""


def run_python(code, *arguments):
  """Runs it on one device: programs for the tests' eight take longer to compile."""
  subprocess.run(
    [sys.executable, "-c", code, *map(str, arguments)],
    cwd=ROOT, env=os.environ | QUICK, check=True,
  )


def execute(name, environment, last_cell=""):
  """Returns the notebook with its outputs, from a kernel of its own."""
  notebook = nbformat.read(FOLDER / name, as_version=4)
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.outputs = []
  if last_cell:
    notebook.cells.append(nbformat.v4.new_code_cell(last_cell))
  client = NotebookClient(
    notebook, timeout=240, resources={"metadata": {"path": str(FOLDER)}}
  )
  client.execute(env=os.environ | QUICK | environment)
  return notebook


def outputs(notebook):
  """Returns (output, its data) of every code cell."""
  return [
    (output, output.get("data", {}))
    for cell in notebook.cells if cell.cell_type == "code"
    for output in cell.outputs
  ]


def texts(notebook):
  parts = (x.get("text") or data.get("text/plain", "") for x, data in outputs(notebook))
  return "\n".join(parts)


def num_figures(notebook):
  return sum("image/png" in data for _, data in outputs(notebook))


@pytest.mark.slow
def test_a_checkpoint_is_explored(tmp_path):
  workdir = tmp_path / "run"
  run_python(TRAIN, write_texts(tmp_path / "texts"), workdir)
  done = execute("explore_checkpoint.ipynb", {"RUN": str(workdir)})
  said = texts(done)
  assert "<TrainedModel 'tiny': sequential, D = 2, " in said
  assert "step 12>" in said
  assert "same text: True" in said
  assert num_figures(done) == 2
  coloured = [data["text/html"] for _, data in outputs(done) if "text/html" in data]
  assert sum("draft of depth 2" in text for text in coloured) == 2


@pytest.mark.slow
def test_the_shipped_model_is_explored_by_default(monkeypatch):
  monkeypatch.delenv("RUN", raising=False)
  done = execute("explore_checkpoint.ipynb", {})
  assert "<TrainedModel 'demo': sequential, D = 3, " in texts(done)
  assert num_figures(done) == 2


@pytest.mark.slow
def test_a_sweep_is_reported(tmp_path):
  runs = write_ladder(
    tmp_path / "runs", World(gain={("sequential", 1): (-0.02, 0.04)}), seeds=(0, 1)
  )
  no_array = "import jax; print('arrays:', len(jax.live_arrays()))"
  done = execute("scaling_report.ipynb", {"RUNS": str(runs)}, no_array)
  said = texts(done)
  assert "sequential D=1" in said
  assert "gain per decade" in said
  assert "**On text at " in said
  assert num_figures(done) == 4
  assert "arrays: 0" in said


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_small_complete_and_without_traces(path):
  text = path.read_text()
  assert len(text.encode()) < 300_000
  notebook = nbformat.reads(text, as_version=4)
  nbformat.validate(notebook)
  counts = [c.execution_count for c in notebook.cells if c.cell_type == "code"]
  assert counts == list(range(1, 1 + len(counts))), "execute it: see its README"
  assert num_figures(notebook) >= 2
  for output, data in outputs(notebook):
    assert output.output_type != "error"
    assert output.get("name") != "stderr", output.text
    shown = json.dumps({k: v for k, v in data.items() if k != "image/png"})
    shown += output.get("text", "")
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|opt)/", shown)


def test_all_notebooks_are_here():
  names = {path.name for path in NOTEBOOKS}
  assert names == {"explore_checkpoint.ipynb", "scaling_report.ipynb"}
  listed = (FOLDER / "README.md").read_text()
  for name in names:
    assert name in listed
