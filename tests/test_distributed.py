"""Several processes on this machine train one model, and stop, die and freeze.

They compile little, and only process 0 finds it compiled when it starts again: on a CPU
the programs of the others have names of their own, which JAX does not keep.
"""

import functools
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import sys
import textwrap
import time

import pytest

import mtp_jax
from launch.distributed import Group, find_group, initialize, share_of_devices
from launch.exits import classify
from mtp_jax.checkpoint import Checkpointer
from mtp_jax.config import ConfigError
from mtp_jax.run_log import RunLog
from tests.common import assert_trees_close
from tests.quick_xla import xla_flags
from tests.tiny_runs import read_metrics, without_wall_clock, write_texts

# A server that has imported JAX, but not started it, forks every process: one import.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["launch.status", "tensorboardX"])

NUM_STEPS, SAVE_EVERY = 12, 4
ENDS_WITHIN = 15  # Seconds after a process has died or frozen.
HANGS_AFTER = 120

EXPERIMENT = """
  from experiments import base

  def get_config():
    config = base.get_config()
    config.name = "tiny"
    config.trunk.update(
      num_layers=1, embed_dim=8, mlp_dim=8, num_heads=1, num_kv_heads=1
    )
    config.loss.block_tokens = 64
    config.data.update(
      source="files", path={corpus!r}, seq_len=32, batch_size=8,
      validation_fraction=0.3, test_fraction=0.1,
    )
    config.train.update(num_steps=12, log_every=3, diagnostics_every=0, eval_every=6)
    config.checkpoint.every_steps = 4
    config.eval.update(
      num_rows=8, rows_per_document=1, batch_size=4, line_prompts=0,
      function_prompts=0, max_new_tokens=8,
    )
    return config
"""


def signal_itself(signum, step, note=None):
  """Makes the process send itself a signal when that step is done."""
  stepped = RunLog.stepped

  def stepped_and_signal(log):
    stepped(log)
    if log.step == step:
      if note is not None:
        note.write_text(str(time.time()))
      os.kill(os.getpid(), signum)

  RunLog.stepped = stepped_and_signal


def child(arguments, log, fault, num_devices):
  """Is `python -m launch.train`."""
  os.environ["XLA_FLAGS"] = xla_flags(num_devices)
  with log.open("ab", buffering=0) as file:
    for descriptor in (1, 2):
      os.dup2(file.fileno(), descriptor)
  if fault is not None:
    fault()
  sys.argv = ["launch.train", *arguments]
  runpy.run_module("launch.train", run_name="__main__", alter_sys=True)


def free_port():
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


class Job:
  """Some processes of one run; what process i prints goes to `log.i`."""

  def __init__(
    self, tiny, workdir, num_processes, *flags, faults=None, num_devices=1
  ):
    """Args: `workdir` is one for all, or a list with one for each."""
    experiment, cache = tiny
    is_list = isinstance(workdir, list)
    workdirs = workdir if is_list else [workdir] * num_processes
    self.logs = [x.with_name(f"{x.name}.{i}") for i, x in enumerate(workdirs)]
    coordinator = f"127.0.0.1:{free_port()}"
    self.processes = []
    for i, log in enumerate(self.logs):
      arguments = [
        f"--config={experiment}",
        f"--workdir={workdirs[i]}",
        f"--compilation_cache={cache}",
        f"--distributed={coordinator},{num_processes},{i}",
        *flags,
      ]
      process = PROCESSES.Process(
        target=child, args=(arguments, log, (faults or {}).get(i), num_devices)
      )
      process.start()
      self.processes.append(process)

  def wait(self, seconds=HANGS_AFTER, ranks=None):
    """Returns the exit codes of all, or of some; nothing is left running."""
    deadline = time.monotonic() + seconds
    chosen = [self.processes[i] for i in ranks or range(len(self.processes))]
    for process in chosen:
      process.join(max(deadline - time.monotonic(), 0))
    codes = [process.exitcode for process in chosen]
    if None in codes or ranks is None:
      self.kill()
    assert None not in codes, f"hangs: {codes}\n{self.output()}"
    return codes

  def kill(self):
    for process in self.processes:
      process.kill()
      process.join()

  def output(self):
    return "\n".join(f"--- {i}\n{log.read_text()}" for i, log in enumerate(self.logs))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """The experiment file, and the folder of compiled programs that all share."""
  folder = tmp_path_factory.mktemp("distributed")
  corpus = write_texts(folder / "texts")
  experiment = folder / "tiny.py"
  experiment.write_text(textwrap.dedent(EXPERIMENT).format(corpus=str(corpus)))
  return experiment, folder / "cache"


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
  """The run folder of one process that was never stopped."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  job = Job(tiny, workdir, 1)
  assert job.wait() == [0], job.output()
  return workdir


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory):
  """The run folder of two processes that were never stopped."""
  workdir = tmp_path_factory.mktemp("pair") / "run"
  job = Job(tiny, workdir, 2)
  assert job.wait() == [0, 0], job.output()
  return workdir


def finished_steps(workdir):
  reader = Checkpointer(workdir, read_only=True)
  steps = reader.steps()
  reader.close()
  return steps


def read_status(workdir):
  return json.loads((workdir / "status.json").read_text())


def results(workdir):
  """Returns what is in metrics.jsonl and eval.json, but for the clock."""
  assert (workdir / "DONE").exists()
  evaluation = json.loads((workdir / "eval.json").read_text())
  records = [*read_metrics(workdir), evaluation | {"kind": "eval"}]
  return [without_wall_clock(record) for record in records]


def assert_same_run(workdir, expected):
  """Fails unless records, evaluation and parameters agree to the last bit."""
  assert results(workdir) == results(expected)
  prints = []
  for folder in (workdir, expected):
    reader = Checkpointer(folder, read_only=True)
    prints.append(reader.meta(NUM_STEPS)["fingerprint"])
    reader.close()
  assert prints[0] == prints[1]


def assert_close_run(workdir, expected):
  """Fails unless records and evaluation agree to rounding."""
  found, wanted = results(workdir), results(expected)
  for record, other in zip(found, wanted, strict=True):
    numbers, others = (dict(flatten(x)) for x in (record, other))
    assert numbers.keys() == others.keys()
    for key, value in numbers.items():
      is_number = isinstance(value, (int, float))
      wanted = pytest.approx(others[key], rel=2e-5) if is_number else others[key]
      assert value == wanted, key


def flatten(value, name=""):
  if isinstance(value, (dict, list)):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in items:
      yield from flatten(entry, f"{name}/{key}")
  else:
    yield name, value


@pytest.mark.slow
def test_two_processes_train_as_one(alone, pair):
  assert_close_run(pair, alone)
  assert len(read_metrics(pair, "train")) == NUM_STEPS // 3
  status = read_status(pair)
  assert (status["state"], status["exit_class"], status["reason"]) == (
    "ended", "done", None
  )
  assert (status["step"], status["num_steps"]) == (NUM_STEPS, NUM_STEPS)
  assert status["num_processes"] == 2 and status["tokens_per_second"] > 0
  assert status["loss"] == read_metrics(pair, "train")[-1]["loss"][0]


@pytest.mark.slow
def test_two_processes_stop_at_the_same_success(tiny, tmp_path):
  settings = {
    "data.source": "siblings", "data.validation_fraction": 0.05,
    "data.test_fraction": 0.05, "task.siblings.num_parents": 2,
    "task.siblings.num_children": 6, "task.siblings.prefix_length": 2,
    "task.num_train": 8, "tokenizer.kind": "symbols", "eval.task_examples": 4,
    "train.evals_per_doubling": 1, "train.eval_every": 0, "train.eval_test": True,
    "train.stop_metric": "loss", "train.stop_value": 99.0,
    # What text alone has, at its default.
    "data.path": "", "eval.rows_per_document": 4, "eval.line_prompts": 64,
    "eval.function_prompts": 32, "eval.max_new_tokens": 64,
  }
  workdir = tmp_path / "run"
  job = Job(tiny, workdir, 2, *(f"--config.{x}={v}" for x, v in settings.items()))
  assert job.wait() == [0, 0], job.output()
  stopped = json.loads((workdir / "eval.json").read_text())["stopped"]
  assert (stopped["step"], stopped["last_step"]) == (1, 2)
  assert finished_steps(workdir) == [2]
  assert [x["step"] for x in read_metrics(workdir, "test")] == [1, 2]
  assert read_status(workdir)["exit_class"] == "done"


def check_infrastructure(codes):
  assert all(classify(code, yielded=False) == "infrastructure" for code in codes), codes


def check_survivors(job, note, ranks):
  """Fails unless these end in time after the fault that `note` was written before."""
  while not note.exists() and job.processes[ranks[0]].is_alive():
    time.sleep(0.05)
  codes = job.wait(ENDS_WITHIN, ranks)
  taken = time.time() - float(note.read_text())
  job.kill()
  print(f"ended {taken:.1f} s after the fault with exit codes {codes}")
  assert taken < ENDS_WITHIN
  check_infrastructure(codes)


@pytest.mark.slow
def test_two_processes_start_from_the_run_of_one(tiny, tmp_path):
  """They split what they read over both, and steps so small change nothing of it."""
  start = ("--config.mtp.kind=sequential", "--config.mtp.depth=1")
  job = Job(tiny, tmp_path / "source", 1, *start)
  assert job.wait() == [0], job.output()
  job = Job(
    tiny, tmp_path / "run", 2, *start, "--config.mesh.data=1", "--config.mesh.fsdp=2",
    f"--config.train.start_from={tmp_path / 'source'}",
    "--config.optimizer.learning_rate=1e-30", "--config.data.seq_len=16",
  )
  assert job.wait() == [0, 0], job.output()
  source, run = (mtp_jax.load(tmp_path / name) for name in ("source", "run"))
  assert source.step == run.step == NUM_STEPS
  assert_trees_close(run.params, source.params, rtol=0, atol=0)
  origin = json.loads((tmp_path / "run/run.json").read_text())["start_from"]
  assert (origin["path"], origin["step"]) == (str(tmp_path / "source"), NUM_STEPS)


@pytest.mark.slow
def test_it_goes_on_after_a_signal_and_a_kill_as_if_never_stopped(
  tiny, alone, pair, tmp_path
):
  workdir, note = tmp_path / "run", tmp_path / "note"
  # The periodic save of step 4 may still be under way then.
  fault = functools.partial(signal_itself, signal.SIGTERM, 4)
  job = Job(tiny, workdir, 2, faults={1: fault})
  assert job.wait() == [75, 75], job.output()
  stopped_at = finished_steps(workdir)[-1]
  assert 4 < stopped_at < 8
  status = read_status(workdir)
  assert (status["exit_class"], status["num_processes"]) == ("yielded", 2)
  assert status["reason"].startswith(f"SIGTERM at step {stopped_at}; checkpoint saved")
  copy = shutil.copytree(workdir, tmp_path / "copy")

  fault = functools.partial(signal_itself, signal.SIGKILL, 10, note)
  job = Job(tiny, workdir, 2, faults={1: fault})
  check_survivors(job, note, [0])
  assert f"resumed at step {stopped_at}" in job.output()
  assert "Another process may have ended" in job.output()
  status = read_status(workdir)
  assert (status["state"], status["exit_class"]) == ("ended", "infrastructure")
  assert "Another process may have ended" in status["reason"]

  job = Job(tiny, workdir, 2)
  assert job.wait() == [0, 0], job.output()
  # The save of step 8 may have died too.
  assert re.search(rf"resumed at step ({stopped_at}|8)$", job.logs[0].read_text(), re.M)
  assert_same_run(workdir, pair)

  job = Job(tiny, copy, 1)
  assert job.wait() == [0], job.output()
  assert f"resumed at step {stopped_at}" in job.output()
  assert_close_run(copy, alone)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_one_of_four_dies_or_freezes(tiny, alone, tmp_path, rank, signum):
  workdir, note = tmp_path / "run", tmp_path / "note"
  fault = functools.partial(signal_itself, signum, 10, note)
  job = Job(tiny, workdir, 4, faults={rank: fault})
  check_survivors(job, note, [i for i in range(4) if i != rank])
  said = job.output()
  assert "nother process may" in said or "JAX distributed service" in said
  if rank:
    assert "nother process may" in read_status(workdir)["reason"]
  assert finished_steps(workdir)[0] == 4
  job = Job(tiny, workdir, 1)
  assert job.wait() == [0], job.output()
  assert_close_run(workdir, alone)


def sleep_in_step(step):
  """Makes the process sleep before it counts that step: alive, and of no use."""
  stepped = RunLog.stepped

  def sleep_or_step(log):
    if log.step + 1 == step:
      time.sleep(1000)
    stepped(log)

  RunLog.stepped = sleep_or_step


@pytest.mark.slow
def test_a_stuck_process_ends_all(tiny, tmp_path):
  workdir = tmp_path / "run"
  fault = functools.partial(sleep_in_step, 8)
  job = Job(tiny, workdir, 2, "--stall_seconds=6", faults={1: fault})
  check_infrastructure(job.wait())
  assert "more than --stall_seconds=6: a process is stuck" in job.output()
  status = read_status(workdir)
  assert status["exit_class"] == "infrastructure" and status["step"] in (7, 8, 9)
  assert status["reason"].startswith("no step has ended for ")


@pytest.mark.slow
def test_four_processes_and_other_meshes(tiny, alone, tmp_path):
  workdir = tmp_path / "run"
  # Two processes for the rows of one microbatch, and two for the halves of each row.
  mesh = ("--config.mesh.fsdp=2", "--config.mesh.context=2")
  fault = functools.partial(signal_itself, signal.SIGTERM, 5)
  job = Job(tiny, workdir, 4, *mesh, faults={3: fault})
  assert job.wait() == [75] * 4, job.output()
  job = Job(tiny, workdir, 2, "--config.mesh.tensor=1", "--config.mesh.fsdp=1")
  assert job.wait() == [0, 0], job.output()
  assert_close_run(workdir, alone)


@pytest.mark.slow
def test_a_signal_during_evaluation_ends_it_and_it_is_made_up_for(tiny, pair, tmp_path):
  workdir = tmp_path / "run"
  fault = functools.partial(signal_itself, signal.SIGTERM, NUM_STEPS)
  job = Job(tiny, workdir, 2, faults={0: fault})
  assert job.wait() == [75, 75], job.output()
  assert not (workdir / "eval.json").exists()
  assert finished_steps(workdir)[-1] == NUM_STEPS
  prompts = ("--config.eval.line_prompts=2", "--config.eval.max_new_tokens=24")
  job = Job(tiny, workdir, 2, *prompts)
  assert job.wait() == [0, 0], job.output()
  found, wanted = (json.loads((x / "eval.json").read_text()) for x in (workdir, pair))
  assert found["main_loss"] == wanted["main_loss"]
  assert found["next_line_exact_match"]["count"] == 2


@pytest.mark.slow
def test_a_damaged_checkpoint_ends_the_job_and_the_next_goes_on(tiny, pair, tmp_path):
  workdir = tmp_path / "run"
  fault = functools.partial(signal_itself, signal.SIGTERM, 9)
  job = Job(tiny, workdir, 2, faults={0: fault})
  assert job.wait() == [75, 75], job.output()
  before, newest = finished_steps(workdir)
  for file in (workdir / "checkpoints" / str(newest) / "state").rglob("*"):
    if file.is_file() and file.parent.name == "d":
      file.write_bytes(b"")
  job = Job(tiny, workdir, 2)
  check_infrastructure(job.wait())
  assert "moved aside; start again to continue from the one before it" in job.output()
  assert finished_steps(workdir) == [before]
  (aside,) = (workdir / "damaged_checkpoints").iterdir()
  assert aside.name.startswith(f"{newest}.")
  job = Job(tiny, workdir, 2)
  assert job.wait() == [0, 0], job.output()
  assert_same_run(workdir, pair)


@pytest.mark.slow
def test_a_mesh_that_gives_a_row_to_parts_of_two_processes_is_refused(tiny, tmp_path):
  # Three rows of two devices: the second row has one of each process.
  flags = [f"--config.{x}" for x in (
    "mesh.tensor=2", "data.batch_size=6", "eval.batch_size=3",
    "trunk.num_heads=2", "trunk.num_kv_heads=2",
  )]
  job = Job(tiny, tmp_path / "run", 2, *flags, num_devices=3)
  assert job.wait() == [2, 2], job.output()
  assert "mesh must split a batch evenly over processes" in job.output()


@pytest.mark.slow
def test_processes_that_do_not_share_the_folder_refuse(tiny, tmp_path):
  folders = [tmp_path / "a", tmp_path / "b"]
  job = Job(tiny, folders, 2)
  assert job.wait() == [2, 2], job.output()
  assert job.output().count("error: --workdir must be a folder that all processes") == 2
  assert "process(es) 1 do not see what process 0 wrote there" in job.output()
  assert not folders[1].exists()


SLURM = {
  "SLURM_JOB_ID": "4097",
  "SLURM_STEP_ID": "0",
  "SLURM_STEP_NODELIST": "n[03-04,7]",
  "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
  "SLURM_NTASKS": "5",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "1",
  "SLURM_NODEID": "1",
  "CUDA_VISIBLE_DEVICES": "",
}
ENGINE = {
  "MTP_JAX_COORDINATOR": "run-0.svc:8476",
  "MTP_JAX_NUM_PROCESSES": "4",
  "MTP_JAX_PROCESS_ID": "2",
}
OPEN_MPI = {
  "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
  "OMPI_COMM_WORLD_SIZE": "8",
  "OMPI_COMM_WORLD_RANK": "5",
  "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
  "OMPI_COMM_WORLD_LOCAL_RANK": "1",
  "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}


@pytest.mark.parametrize("how, environ, group", [
  ("auto", {}, None),
  ("off", SLURM, None),
  ("localhost:99,3,2", {}, Group("localhost:99", 3, 2)),
  ("[::1]:99,3,2", SLURM, Group("[::1]:99", 3, 2)),
  ("localhost:99,1,0", {}, None),
  ("auto", ENGINE, Group("run-0.svc:8476", 4, 2)),
  ("auto", SLURM | ENGINE, Group("run-0.svc:8476", 4, 2)),
  ("auto", SLURM, Group("n03:61441", 5, 3)),
  ("auto", SLURM | {"SLURM_NTASKS": "1"}, None),
  ("auto", SLURM | {"SLURM_STEP_NODELIST": "a-1,b-2"}, Group("a-1:61441", 5, 3)),
  ("auto", SLURM | {"SLURM_STEP_NODELIST": "n[1,9]-ib"}, Group("n1-ib:61441", 5, 3)),
  ("auto", SLURM | {"SLURM_STEP_ID": "1"}, Group("n03:62450", 5, 3)),
  ("auto", SLURM | {"JAX_COORDINATOR_PORT": "77"}, Group("n03:77", 5, 3)),
  (
    "auto",
    SLURM | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:5"},
    Group("127.0.0.1:5", 5, 3),
  ),
  (
    "auto",
    SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"},
    Group("n03:61441", 5, 3, (2, 3)),
  ),
  (
    "auto",
    SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "a100:2"},
    Group("n03:61441", 5, 3, (0, 1)),
  ),
  (
    "auto",
    SLURM | {"CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "1"},
    Group("n03:61441", 5, 3),
  ),
  ("auto", OPEN_MPI, Group(None, None, None, (2, 3), "ompi")),
  ("auto", OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
  ("auto", {"TPU_WORKER_HOSTNAMES": "a,b"}, Group(None, None, None, method=None)),
  ("auto", {"TPU_WORKER_HOSTNAMES": "a"}, None),
  ("auto", {"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
])
def test_who_trains_together(how, environ, group):
  assert find_group(how, None, environ) == group


def test_device_ids_may_be_given():
  environ = SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"}
  assert find_group("auto", ["0", "2"], environ).device_ids == (0, 2)


@pytest.mark.parametrize("visible, here, index, per_process, share", [
  (8, 1, 0, None, tuple(range(8))),  # One process for a node.
  (1, 8, 5, None, (0,)),  # The scheduler shows each its own.
  (8, 8, 5, None, (5,)),
  (8, 2, 1, None, (4, 5, 6, 7)),
  (2, 2, 1, 2, (0, 1)),
  (8, 4, 3, 2, (6, 7)),
  (8, 3, 2, 2, (4, 5)),
])
def test_share_of_devices(visible, here, index, per_process, share):
  assert share_of_devices(visible, here, index, per_process) == share


@pytest.mark.parametrize("how, device_ids, environ, message", [
  ("maybe", None, {}, "--distributed must be auto, off or HOST:PORT,NUM_PROCESSES"),
  ("host,2,0", None, {}, "--distributed must have HOST:PORT, got 'host'."),
  ("host:0,2,0", None, {}, "--distributed must have HOST:PORT, got 'host:0'."),
  ("host:1,x,0", None, {}, "--distributed must have a number of processes from 1, got"),
  ("host:1,2,2", None, {}, "from 0 to 1, got '2'."),
  (
    "auto",
    None,
    {"MTP_JAX_COORDINATOR": "host:1"},
    "MTP_JAX_NUM_PROCESSES, MTP_JAX_PROCESS_ID must be set where MTP_JAX_COORDINATOR",
  ),
  (
    "auto",
    None,
    ENGINE | {"MTP_JAX_PROCESS_ID": "4"},
    "MTP_JAX_PROCESS_ID must have a number of this process from 0 to 3, got '4'.",
  ),
  ("off", ["0"], {}, "--local_device_ids is for several processes"),
  ("host:1,2,0", ["a"], {}, "--local_device_ids must be numbers from 0, got 'a'."),
  (
    "auto",
    None,
    SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"},
    "--local_device_ids is needed: 2 processes of this node see 3 GPUs",
  ),
])
def test_bad_groups(how, device_ids, environ, message):
  with pytest.raises(ConfigError, match=re.escape(message)):
    find_group(how, device_ids, environ)


def test_process_0_that_is_not_there():
  group = Group(f"127.0.0.1:{free_port()}", 2, 1)
  with pytest.raises(TimeoutError, match="process 1 of 2 could not reach process 0"):
    initialize(group, 1, 10)
