"""Sweeps on a real Slurm: several nodes on this machine, real jobs, real signals.

`mini_slurm.sh` installs and starts it. Where that cannot be, the tests are skipped.
"""

import csv
import json
import os
import signal
import socket
import subprocess
import textwrap
import time

import pytest

from launch.states import read_record
from mtp_jax.checkpoint import Checkpointer
from tests.commands import ROOT, Commands
from tests.tiny_runs import read_metrics, without_wall_clock, write_texts

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

SCRIPT = ROOT / "tests" / "mini_slurm.sh"
NODES = 4
LONG = 240  # Steps: time enough to be found at work.
EXPERIMENT = """
  from experiments import base

  def get_config(preset):
    config = base.get_config()
    config.trunk.update(
      num_layers=1, embed_dim=8, mlp_dim=8, num_heads=1, num_kv_heads=1
    )
    config.mtp.update(kind="sequential", depth=1)
    config.loss.block_tokens = 64
    config.data.update(
      source="files", path={corpus!r}, seq_len=32, batch_size=8,
      validation_fraction=0.3, test_fraction=0.1,
    )
    long = preset in ("pair", "endless")
    config.train.update(
      num_steps={long} if long else 12, log_every=20 if long else 3,
      diagnostics_every=0, eval_every=0, max_nonfinite_steps=1,
    )
    if preset == "endless":
      config.train.num_steps = 1_000_000
    config.checkpoint.update(every_steps=100, keep=1)
    config.eval.update(
      num_rows=8, rows_per_document=1, batch_size=4, line_prompts=0,
      function_prompts=0, max_new_tokens=8,
    )
    return config

  def sweep(preset):
    if preset == "array":
      yield {{"name": "seed=0", "seed": 0}}
      yield {{"name": "seed=1", "seed": 1}}
      yield {{"name": "diverges", "optimizer.learning_rate": 1e30}}
    elif preset == "pair":
      # The last task of an array has the job id of the array. Equal trials would be
      # trained once: these differ in what decides nothing.
      yield {{"name": "undisturbed", "checkpoint.keep": 2}}
      yield {{"name": "preempted"}}
    else:
      yield {{"name": "endless"}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
  """Commands that find a cluster of four nodes with two cores each."""
  folder = tmp_path_factory.mktemp("slurm")
  began = time.monotonic()
  installed = subprocess.run([SCRIPT, "install"], capture_output=True, text=True)
  if installed.returncode:
    pytest.skip(f"Slurm cannot be installed: {installed.stderr.strip()[-200:]}")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("MINI_SLURM_PORT", str(20_000 + os.getpid() % 10_000))
    started = subprocess.run(
      [SCRIPT, "up", folder, str(NODES)], capture_output=True, text=True
    )
    if started.returncode:
      pytest.skip(f"Slurm cannot be started: {started.stderr.strip()[-500:]}")
    print(f"installed and started in {time.monotonic() - began:.1f} s")
    patch.setenv("SLURM_CONF", started.stdout.strip().partition("=")[2])
    try:
      with Commands() as commands:
        yield commands
    finally:
      subprocess.run([SCRIPT, "down", folder], check=True)


@pytest.fixture(scope="module")
def sweep(cluster, tmp_path_factory):
  """Returns what runs `launch.sweep` for a preset in a folder."""
  folder = tmp_path_factory.mktemp("sweep")
  corpus = write_texts(folder / "texts")
  experiment = folder / "tiny.py"
  source = textwrap.dedent(EXPERIMENT).format(corpus=str(corpus), long=LONG)
  experiment.write_text(source)

  def run(preset, root, *arguments):
    return cluster(
      "launch.sweep", f"--config={experiment}:{preset}", f"--workdir={root}",
      f"--compilation_cache={folder / 'cache'}", "--watch_seconds=1", *arguments,
    )

  return run


def read_status(workdir):
  try:
    return json.loads((workdir / "status.json").read_text())
  except FileNotFoundError:
    return {}


def wait_until(condition, what, seconds=240):
  deadline = time.monotonic() + seconds
  while not condition():
    queue = slurm("squeue", "--states=all", "--format=%i %T %r")
    assert time.monotonic() < deadline, f"waited in vain until {what}\n{queue}"
    time.sleep(0.2)


def slurm(*command):
  return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def job_facts(workdir):
  """Returns what the controller knows about the job of a run folder."""
  text = slurm("scontrol", "show", "job", "-o", read_record(workdir)["id"])
  return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)


def is_at_step(workdir, step):
  status = read_status(workdir)
  return status.get("state") == "training" and status["step"] >= step


def explain(root):
  """Returns the logs of a sweep, for a failed assertion."""
  logs = [*root.glob("*/log*.txt"), *root.glob("slurm/*_log.*")]
  return "\n".join(f"--- {log}\n{log.read_text()[-2000:]}" for log in logs)


def table_rows(output):
  """Returns name and state of every trial, from the last table that was printed."""
  lines = output.splitlines()
  start = max(i for i, line in enumerate(lines) if line.startswith("trial "))
  rows = [line.split() for line in lines[start + 1 : -1]]
  return {row[0]: row[1] for row in rows}


def test_a_sweep_is_an_array_and_says_which_trial_failed_and_why(sweep, tmp_path):
  root = tmp_path / "runs"
  on = ("--on=slurm", "--slurm_grace=30", "--max_parallel=2")
  result = sweep("array", root, *on, "--watch")
  assert result.code == 1, result.output + explain(root)
  assert table_rows(result.output) == {
    "seed=0": "done", "seed=1": "done", "diverges": "failed"
  }, result.output
  assert "loss or gradient was not finite" in result.output
  ids = {read_record(root / name)["id"] for name in ("s0", "s1", "diverges")}
  assert len({id.partition("_")[0] for id in ids}) == 1 and len(ids) == 3
  attempts = (root / "diverges" / "attempts.jsonl").read_text().splitlines()
  assert [json.loads(line)["exit_class"] for line in attempts] == ["diverged"]

  with (root / "results.csv").open() as file:
    rows = {row["trial"]: row for row in csv.DictReader(file)}
  assert {name: row["complete"] for name, row in rows.items()} == {
    "seed=0": "True", "seed=1": "True", "diverges": "False"
  }
  assert rows["seed=1"]["seed"] == "1" and "train.num_steps" not in rows["seed=1"]
  found = json.loads((root / "s1" / "eval.json").read_text())["main_loss"]
  assert float(rows["seed=1"]["main_loss"]) == found["mean"]
  assert rows["diverges"]["main_loss"] == ""

  again = sweep("array", root, *on)
  assert again.code == 0 and "0 of 3 trial(s) given to slurm, 2 done" in again.output
  assert "diverges: not tried again without --again (diverged)" in again.output


def test_two_nodes_train_one_trial_and_resume_exactly_after_preemption(sweep, tmp_path):
  try:
    socket.gethostbyname("n1")
  except OSError:
    pytest.skip("the name n1 of a node does not resolve; root could see to it")
  root = tmp_path / "runs"
  preempted, undisturbed = root / "preempted", root / "undisturbed"
  on = ("--on=slurm", "--slurm=nodes=2 cpus-per-task=2", "--slurm_grace=30")
  assert sweep("pair", root, *on).code == 0
  wait_until(lambda: is_at_step(preempted, 40), "the trial is at work", 400)
  nodes = job_facts(preempted)["NodeList"]
  slurm(
    "sbatch", "--partition=urgent", f"--nodelist={nodes}", "--nodes=2",
    "--ntasks-per-node=2", "--output=/dev/null", "--wrap=sleep 1",
  )
  wait_until(
    lambda: read_status(preempted).get("exit_class") == "yielded", "it has yielded"
  )
  stopped_at = read_status(preempted)["step"]
  assert 40 <= stopped_at < LONG
  assert read_status(preempted)["num_processes"] == 2

  result = sweep("pair", root, "--status", "--watch")
  assert result.code == 0, result.output + explain(root)
  log = (preempted / "log.txt").read_text()
  assert f"resumed at step {stopped_at}" in log
  assert job_facts(preempted)["Restarts"] == "1"
  assert job_facts(undisturbed)["Restarts"] == "0"
  assert not (preempted / "attempts.jsonl").exists()  # Preemption does not count.
  assert (preempted / "log.1.txt").exists()
  assert outcome(preempted) == outcome(undisturbed)


def outcome(workdir):
  """Returns all that two equal runs agree on: records, evaluation, parameters."""
  reader = Checkpointer(workdir, read_only=True)
  meta = reader.meta(LONG)
  reader.close()
  evaluation = json.loads((workdir / "eval.json").read_text())
  records = [*read_metrics(workdir), evaluation]
  return [without_wall_clock(record) for record in records], meta["fingerprint"]


def test_a_killed_trial_is_tried_again_and_a_cancelled_one_is_not(sweep, tmp_path):
  root = tmp_path / "runs"
  workdir = root / "endless"
  on = ("--on=slurm", "--slurm_grace=30")
  assert sweep("endless", root, *on).code == 0
  wait_until(lambda: is_at_step(workdir, 20), "the trial is at work")
  first = read_status(workdir)

  twice = sweep("endless", root, *on)
  assert "0 of 1 trial(s) given to slurm" in twice.output
  assert "endless: running, left alone" in twice.output

  os.kill(first["pid"], signal.SIGKILL)
  wait_until(lambda: (workdir / "attempts.jsonl").exists(), "its end was noted")
  (line,) = (workdir / "attempts.jsonl").read_text().splitlines()
  attempt = json.loads(line)
  assert (attempt["code"], attempt["exit_class"]) == (137, "infrastructure")
  assert "SIGKILL" in attempt["reason"]
  wait_until(
    lambda: is_at_step(workdir, 20) and read_status(workdir)["pid"] != first["pid"],
    "it is at work again",
  )
  assert table_rows(sweep("endless", root, "--status").output) == {"endless": "running"}

  cancelled = sweep("endless", root, "--cancel")
  assert cancelled.output.strip().endswith("slurm: cancelled 1 trial(s)")
  wait_until(lambda: job_facts(workdir)["JobState"] == "CANCELLED", "it is cancelled")
  wait_until(lambda: read_status(workdir)["exit_class"] == "yielded", "it has saved")
  time.sleep(5)
  assert job_facts(workdir)["JobState"] == "CANCELLED"
  assert job_facts(workdir)["Restarts"] == "1"
  assert table_rows(sweep("endless", root, "--status").output) == {
    "endless": "cancelled"
  }


@pytest.mark.parametrize("flags, message", [
  (["--slurm=partition=nowhere"], "error: sbatch refused: "),
  (["--slurm=nodes=9"], "error: sbatch refused: "),
])
def test_what_slurm_refuses_is_said_before_anything_is_submitted(
  sweep, tmp_path, flags, message
):
  result = sweep(
    "array", tmp_path / "runs", "--on=slurm", *flags,
    "--config.data.batch_size=72", "--config.eval.batch_size=72",
  )
  assert result.code == 2 and result.output.startswith(message), result.output
  assert not (tmp_path / "runs").exists()
