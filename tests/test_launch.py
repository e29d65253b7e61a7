"""The commands end to end: what they print, write and return."""

import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

from experiments import base
from launch.cli import load_run_config
from launch.evaluate import fit_to_devices
from mtp_jax.config import from_config_dict, with_overrides
from mtp_jax.config_rules import validate
from mtp_jax.train import evaluate_run

pytest_plugins = ("tests.commands",)

PAGE = Path(__file__).resolve().parent.parent / "docs/reference/run-folder.md"
COMMANDS = ("launch.train", "launch.sweep", "launch.evaluate")

EXPERIMENT = """
  import os, signal, threading, time
  from experiments import base

  def get_config(preset=""):
    config = base.get_config()
    config.name = "tiny"
    config.trunk.update(
      num_layers=1, embed_dim=8, mlp_dim=8, num_heads=1, num_kv_heads=1
    )
    config.mtp.update(kind="sequential", depth=1)
    config.data.update(
      source="files", path={corpus!r}, seq_len=16, batch_size=2,
      validation_fraction=0.3, test_fraction=0.3,
    )
    config.train.update(
      num_steps=1500, log_every=10, diagnostics_every=500, eval_every=500
    )
    config.eval.update(
      num_rows=4, rows_per_document=1, batch_size=4, line_prompts=0, function_prompts=0
    )
    if preset == "stopped":
      threading.Thread(target=stop_when_it_trains, daemon=True).start()
    return config

  def stop_when_it_trains():
    metrics = os.path.join({workdir!r}, "metrics.jsonl")
    while not (os.path.exists(metrics) and os.path.getsize(metrics)):
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("module", COMMANDS)
def test_help_shows_examples_and_flags(command, module):
  result = command(module, "--help")
  assert result.code == 0
  assert not result.touched_backend
  name = module.removeprefix("launch.")
  examples = rf"\n  (?:mtp-jax {name}|python -m {re.escape(module)}) "
  assert len(re.findall(examples, result.output)) >= 2
  assert "--workdir: " in result.output
  assert "run folder" in result.output


@pytest.mark.parametrize("mesh, num_devices, fitted", [
  ({"data": 4}, 2, (-1, 1, 1, 1)),
  ({"fsdp": 2, "tensor": 2}, 8, (-1, 2, 2, 1)),
  ({"fsdp": 2, "tensor": 2}, 6, (-1, 1, 1, 1)),
])
def test_evaluation_fits_mesh_and_batch_to_the_devices(mesh, num_devices, fitted):
  default = from_config_dict(base.get_config())
  overrides = {f"mesh.{axis}": size for axis, size in mesh.items()}
  config = fit_to_devices(with_overrides(default, overrides), num_devices)
  found = config.mesh
  assert (found.data, found.fsdp, found.tensor, found.context) == fitted
  shards = num_devices // (found.tensor * found.context)
  assert 0 <= config.eval.batch_size - default.eval.batch_size < shards
  validate(config)
  assert config.eval.batch_size % shards == 0


def test_dry_run_lists_every_trial_and_trains_nothing(command):
  result = command("launch.sweep", "--config=experiments/head_design.py", "--dry_run")
  assert result.code == 0
  header, *rows, total = result.output.splitlines()
  assert header.split() == [
    "trial", "parameters", "deployed", "FLOPs/token", "steps", "tokens", "FLOPs"
  ]
  assert len(rows) == 27 and total.startswith("27 trial(s) of 7 program(s), ")
  cells = [row.replace(",", "").split() for row in rows]
  by_name = {name: [float(x) for x in numbers] for name, *numbers in cells}
  ntp = by_name["kind=nonedepth=0seed=0"]
  parallel = by_name["kind=parallelseed=0"]
  flops = by_name["kind=parallelarm=flopsseed=0"]
  assert parallel[1] == ntp[1] and parallel[0] > ntp[0]
  assert flops[:3] == ntp[:3] and flops[3] > ntp[3]
  assert flops[5] == pytest.approx(parallel[5], rel=0.01)


def check_fields_are_documented(workdir):
  page = PAGE.read_text()
  documented = set(re.findall(r"`(\w+)`", page))
  records = [
    json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]
  assert {record["kind"] for record in records} == {
    "train", "validation", "diagnostics"
  }
  for name in ("eval.json", "run.json"):
    records.append(json.loads((workdir / name).read_text()))
  for record in records:
    assert record.keys() <= documented
  listed = re.findall(r"^  ([\w.]+)", page.partition("RUN/\n")[2], re.MULTILINE)
  for path in workdir.iterdir():
    assert path.name.startswith((".lock", *listed))


@pytest.mark.slow
def test_a_run_is_trained_stopped_continued_evaluated_and_found_by_a_sweep(
  command, tmp_path
):
  corpus, root = tmp_path / "corpus", tmp_path / "runs"
  workdir, cache = root / "tiny", tmp_path / "cache"
  corpus.mkdir()
  for i in range(20):
    (corpus / f"{i}.txt").write_text(f"document {i} says {i * i}\n" * 10)
  source = textwrap.dedent(EXPERIMENT).format(corpus=str(corpus), workdir=str(workdir))
  experiment = tmp_path / "tiny.py"
  experiment.write_text(source)
  train = ("launch.train", f"--workdir={workdir}", f"--compilation_cache={cache}")

  stopped = command(*train, f"--config={experiment}:stopped")
  assert stopped.code == 143
  assert "SIGTERM at step " in stopped.output
  assert "the same command continues it.\n" in stopped.output
  assert "Traceback" not in stopped.output
  assert any("train_step" in path.name for path in cache.iterdir())

  status = ("launch.sweep", f"--config={experiment}", f"--workdir={root}")
  assert command(*status, "--status").output.splitlines()[1].split()[1] == "stopped"

  other = command(*train, f"--config={experiment}", "--config.trunk.mlp_dim=16")
  assert other.code == 2
  assert "trunk.mlp_dim: 8 there, 16 now" in other.output

  done = command(*train, f"--config={experiment}")
  assert done.code == 0
  assert "tiny: resumed at step " in done.output
  assert re.search(
    r"^tiny: first step after [\d.]+ s: imports [\d.]+, devices ", done.output, re.M
  )
  assert "tiny: done: main loss " in done.output
  assert (workdir / "DONE").exists()
  check_fields_are_documented(workdir)

  found = command(*status)
  assert (found.code, found.output) == (0, f"all 1 trial(s) are done in {root}.\n")
  row = command(*status, "--status").output.splitlines()[1].split()
  assert row[:3] == ["tiny", "done", "1,500/1,500"] and len(row) == 9

  own = (workdir / "eval.json").read_text()
  evaluate = ("launch.evaluate", f"--workdir={workdir}", f"--compilation_cache={cache}")
  again = command(*evaluate, "--split=validation")
  assert again.code == 0
  found = json.loads((workdir / "eval_validation.json").read_text())
  assert found == json.loads(own)
  mean = f"{found['main_loss']['mean']:.4f}"
  assert re.search(rf"^main_loss +{mean} ", again.output, re.MULTILINE)
  tested = command(*evaluate)
  assert tested.code == 0
  assert json.loads((workdir / "eval_test.json").read_text())["split"] == "test"
  assert (workdir / "eval.json").read_text() == own

  # On the eight devices of this process; the rows do not divide over them.
  config = fit_to_devices(load_run_config(workdir), 8)
  assert config.eval.batch_size == 8
  loss = evaluate_run(config, workdir)["main_loss"]
  np.testing.assert_allclose(loss["mean"], found["main_loss"]["mean"], rtol=1e-5)

  missing = command(*evaluate, "--step=7")
  assert missing.code == 2
  assert missing.output.startswith("error: no checkpoint of step 7 in ")
