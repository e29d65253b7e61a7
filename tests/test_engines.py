"""Engines without their schedulers: texts, samples of output, choices, bad input.

`tests/test_slurm.py` has the real Slurm; here its commands are scripts that say what a
test wants them to say.
"""

import concurrent.futures
import csv
import fcntl
import importlib.metadata
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from experiments import base
from launch import cli, jobs, results_csv, state_table, states, trials
from launch.engines import (
  local,
  order,
  printed,
  slurm,
  slurm_end,
  slurm_queue,
  workers,
)
from launch.engines.workers import Slot
from launch.states import Job, State
from mtp_jax import run_folder
from mtp_jax.config import ConfigError, from_config_dict, to_dict, with_overrides

pytest_plugins = ("tests.commands",)

NTP = "--config=experiments/ntp_baseline.py"


def plan(root, *names, **overrides):
  """Returns trials of one program, and of another for names with `wide`."""
  wide = {"trunk.mlp_dim": 512}
  config = with_overrides(from_config_dict(base.get_config()), overrides)
  swept = [
    {"name": name, "data.seed": i} | (wide if "wide" in name else {})
    for i, name in enumerate(names)
  ]
  return trials.plan(config, {}, swept, Path(root))


def fill(trial, *files, **status):
  """Makes a run folder with these files and that status."""
  trial.workdir.mkdir(parents=True, exist_ok=True)
  (trial.workdir / "config.json").write_text(json.dumps(to_dict(trial.config)))
  for file in files:
    (trial.workdir / file).write_text(
      json.dumps({"main_loss": {"mean": 1.5, "stderr": 0.1}, "step": 7})
    )
  if status:
    record = {"host": socket.gethostname(), "time": time.time(), "reason": None}
    text = json.dumps(record | {"exit_class": None} | status)
    (trial.workdir / "status.json").write_text(text)


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
  """A folder of commands that print what lies beside them as NAME.out."""
  folder = tmp_path / "bin"
  folder.mkdir()

  def say(name, text, code=0):
    (folder / f"{name}.out").write_text(text)
    script = folder / name
    script.write_text(
      "#!/bin/sh\n"
      f'echo "$@" >> {folder}/{name}.calls\n'
      f"cat {folder}/{name}.out\n"
      f"exit {code}\n"
    )
    script.chmod(0o755)
    return folder / f"{name}.calls"

  for name in ("srun", "scancel", "squeue", "sacct"):
    say(name, "")
  say("sbatch", "Submitted batch job 12\n")
  say("scontrol", f"MaxArraySize = 1001\nNodeHostName={socket.gethostname()}\n")
  monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
  return say


# Slurm: arrays and scripts


def options(text="", **others):
  return slurm.parse([text], **others)


def test_a_sweep_is_one_array_with_the_most_work_first(tmp_path):
  planned = plan(tmp_path, "a", "wide1", "b", "wide2")
  text = slurm.Slurm(tmp_path, options()).preview(planned)
  names = [line.split()[1] for line in text.splitlines() if line.startswith("#   ")]
  assert names == ["wide1", "wide2", "a", "b"]
  assert text.count("#SBATCH --array=") == 1 and "#SBATCH --array=0-3%4" in text


def test_long_arrays_are_cut_and_together_run_no_more_than_allowed(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(slurm, "_MAX_ARRAY_SIZE", 4)
  planned = plan(tmp_path, *(f"a{i}" for i in range(7)))

  def lines(max_parallel, start):
    text = slurm.Slurm(tmp_path, options(), max_parallel=max_parallel).preview(planned)
    return [x for x in text.splitlines() if x.startswith(f"#SBATCH --{start}")]

  assert lines(2, "array") == ["#SBATCH --array=0-2%2"] * 2  # The last is one job.
  assert lines(2, "dependency") == ["#SBATCH --dependency=afterany:JOB"] * 2
  assert lines(None, "array") == ["#SBATCH --array=0-2%3"] * 2
  assert lines(None, "dependency") == []


def test_the_script_requeues_what_yielded_and_nothing_that_was_cancelled(tmp_path):
  given = slurm.parse(
    [
      "--partition=gpu account=lab nodes=2 gpus_per_node=8 time=1-00:00:00",
      "reservation=x exclusive comment='two words'",
    ],
    setup="module load cuda", grace=60,
  )
  engine = slurm.Slurm(tmp_path / "my sweep", given, "", 2, max_attempts=4)
  text = engine.preview(plan(tmp_path, "a", "b", "c"))
  lines = text.splitlines()
  for line in (
    "#   a", "#SBATCH --array=0-2%2", "#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8",
    "#SBATCH --ntasks-per-node=1", "#SBATCH --time=1-00:00:00",
    "#SBATCH --partition=gpu", "#SBATCH --account=lab", "#SBATCH --requeue",
    "#SBATCH --signal=TERM@60", "#SBATCH --reservation=x", "#SBATCH --exclusive",
    "#SBATCH --comment='two words'", "module load cuda", "trap 'STOP=1' TERM",
    'if [ "$STOP" = 1 ]; then exit "$CODE"; fi',
  ):
    assert lines.count(line) == 1, line
  assert "wckey" not in text and "--kill-on-bad-exit=1" in text
  # The task of an array that has the id of the array would requeue all others.
  assert "JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}" in text
  ends = lines.index('if [ "$STOP" = 1 ]; then exit "$CODE"; fi')
  assert ends < lines.index('  scontrol requeue "$JOB"')
  (end,) = [line for line in lines if "launch.engines.slurm_end" in line]
  assert f"'{tmp_path}/my sweep/slurm' \"$CODE\" \"$BEGAN\" 4;" in end


@pytest.mark.parametrize("time_limit, seconds", [
  ("90", 5400), ("4:30", 270), ("1:30:00", 5400), ("1-2", 93600), ("2-00:30", 174600),
])
def test_time_limits_are_those_of_slurm(time_limit, seconds):
  options(f"time={time_limit}", grace=seconds - 1)
  with pytest.raises(ConfigError, match=rf"longer .* \({seconds} s\), got '"):
    options(f"time={time_limit}", grace=seconds)
  assert options("time=UNLIMITED").sbatch["time"] == "UNLIMITED"


@pytest.mark.parametrize("text, message", [
  ("time=soon", r"time must be minutes, H:MM:SS .*, got 'soon'"),
  ("time=0", r"time must be .* longer than --slurm_grace \(180 s\), got '0'"),
  ("time", r"time must be .*, got True"),
  ("time=3", r"longer than --slurm_grace \(180 s\), got '3'"),
  ("nodes=0", r"nodes must be a number from 1 up, got '0'"),
  ("nodes=2-4", r"nodes must be a number from 1 up, got '2-4'"),
  ("nodes", r"nodes must be a number from 1 up, got True"),
  ("ntasks-per-node=two", r"ntasks-per-node must be a number from 1 up, got 'two'"),
  ("gpus-per-node=8 ntasks-per-node=3", r"a multiple of ntasks.* \(3\), got '8'"),
  ("gpus-per-node=a100:8 ntasks-per-node=3", r"a multiple .* \(3\), got 'a100:8'"),
  ("gpus-per-node=a100", r"must be NUMBER or TYPE:NUMBER .* got 'a100'"),
  ("gpus-per-node=a100:4,v100:4", r"gpus-per-node must be NUMBER or TYPE:NUMBER"),
  ("gpus-per-node=-1", r"gpus-per-node must be NUMBER or TYPE:NUMBER .* got '-1'"),
  ("exclusive 5", r"must be long options of sbatch, KEY=VALUE or KEY, got '5'"),
  ("comment='x", r"--slurm must be KEY=VALUE .* got \"comment='x\" \(No clos"),
  ("-w n1", r"must be long options of sbatch, .* got '-w'"),
  ("-t60", r"must be long options of sbatch, .* got '-t60'"),
  ("t=60", r"must be long options of sbatch, .* got 't=60'"),
  ("--Nodes=2", r"must be long options of sbatch, .* got '--Nodes=2'"),
  ("partition=", r"must be long options of sbatch, .* got 'partition='"),
  ("comment='a\n#SBATCH --nodes=9'", r"must be long options of sbatch"),
  ("nice=1 nice=2", r"--slurm must set nice once, got 'nice=2' again"),
  ("part=gpu", r"must have whole names of options, partition, got 'part=gpu'"),
  ("gpus-per-n=4", r"whole names of options, gpus-per-node, got 'gpus-per-n=4'"),
  ("gre=gres/gpu:2", r"whole names of options, gres, got 'gre=gres/gpu:2'"),
  ("arr=0-9", r"whole names of options, array or .*, got 'arr=0-9'"),
])
def test_options_of_slurm_are_checked(text, message):
  with pytest.raises(ConfigError, match=message):
    options(text)


@pytest.mark.parametrize("word, name, owner", [
  ("--gpus-per-task=1", "gpus-per-task", "gpus-per-node"),
  ("gpus_per_task=1", "gpus-per-task", "gpus-per-node"),
  ("gpus=4", "gpus", "gpus-per-node"),
  ("gres=gpu:a100:4", "gres", "gpus-per-node"),
  ("gres=nvme:1,gpu=2", "gres", "gpus-per-node"),
  ("tres-per-task=gres/gpu:1", "tres-per-task", "gpus-per-node"),
  ("ntasks=8", "ntasks", "nodes and ntasks-per-node"),
  ("ntasks-per-gpu=1", "ntasks-per-gpu", "nodes and ntasks-per-node"),
  ("signal=USR1@60", "signal", "--slurm_grace"),
  ("no-requeue", "no-requeue", "the sweep itself"),
  ("array=0-9", "array", "the sweep itself"),
  ("output=x", "output", "the sweep itself"),
  ("job_name=x", "job-name", "the sweep itself"),
  ("--parsable", "parsable", "the sweep itself"),
  ("chdir=/tmp", "chdir", "the sweep itself"),
])
def test_what_the_sweep_sets_is_not_passed_on(word, name, owner):
  with pytest.raises(ConfigError) as caught:
    options(f"reservation=x {word}")
  assert str(caught.value) == (
    f"--slurm must not set {name}, which {owner} sets, got {word!r}."
  )


def test_what_nobody_sets_is_passed_on(tmp_path):
  free = (
    "comment=x", "exclusive", "export=ALL", "gpu-bind=none", "gres=nvme:1",
    "gres-flags=enforce-binding", "mail-type=END", "mem-bind=local", "nodelist=n1",
    "time-min=60", "wckey=y", "x11=first", "cpus-per-gpu=8", "mem-per-cpu=4G",
    "mem=64G", "qos=low", "cpus-per-task=4",
  )
  given = options(" ".join(free))
  lines = slurm.Slurm(tmp_path, given).preview(plan(tmp_path, "a")).splitlines()
  for word in free:
    assert lines.count(f"#SBATCH --{word}") == 1


def test_gpus_of_a_type_are_counted_and_asked_for(tmp_path, fake_slurm):
  given = options("nodes=2 gpus-per-node=nvidia_a100_1g.5gb:4 ntasks-per-node=2")
  assert given.num_devices == 8
  engine = slurm.Slurm(tmp_path, given)
  lines = engine.preview(plan(tmp_path, "a")).splitlines()
  (line,) = [line for line in lines if line.startswith("#SBATCH --gpu")]
  assert line == "#SBATCH --gpus-per-node=nvidia_a100_1g.5gb:4"
  with pytest.raises(ConfigError, match=r"devices \(8\).* gpus-per-node=nvidia_a100"):
    engine.check(plan(tmp_path, "a", **{"mesh.fsdp": 16}))


def test_variables_that_sbatch_would_take_instead_are_refused(
  tmp_path, fake_slurm, monkeypatch
):
  monkeypatch.setenv("SBATCH_PARTITION", "debug")
  slurm.Slurm(tmp_path, options()).check(plan(tmp_path, "a"))
  with pytest.raises(ConfigError, match=r"SBATCH_PARTITION must not .* got 'debug'"):
    slurm.Slurm(tmp_path, options("partition=gpu")).check(plan(tmp_path, "a"))
  for variable in ("SBATCH_TIMELIMIT", "SBATCH_GPUS", "SBATCH_NO_REQUEUE"):
    with monkeypatch.context() as patch:
      patch.setenv(variable, "5")
      with pytest.raises(ConfigError, match=rf"{variable} must not .* got '5'"):
        slurm.Slurm(tmp_path, options()).check(plan(tmp_path, "a"))


def test_a_mesh_must_fit_the_allocation(tmp_path, fake_slurm):
  engine = slurm.Slurm(tmp_path, options("nodes=2 gpus-per-node=3"))
  with pytest.raises(ConfigError) as caught:
    engine.check(plan(tmp_path, "a", "b", **{"mesh.fsdp": 4}))
  text = str(caught.value)
  assert text.startswith("a and 1 more: mesh must be such that ")
  assert "number of devices (6)" in text
  assert text.endswith("The devices come from --slurm: nodes=2 times gpus-per-node=3.")


def test_slurm_that_is_not_there_is_missed_first(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(ConfigError, match=r"--on=slurm needs .* is no sbatch, srun"):
    slurm.Slurm(tmp_path, options()).check(plan(tmp_path, "a"))


def test_what_sbatch_refuses_is_said(tmp_path, fake_slurm):
  script = tmp_path / "bin" / "sbatch"
  script.write_text("#!/bin/sh\necho 'sbatch: error: no such partition' >&2\nexit 1\n")
  with pytest.raises(ConfigError, match=r"^sbatch refused: sbatch: error: no such"):
    slurm.Slurm(tmp_path, options()).check(plan(tmp_path, "a"))


# Slurm: what its commands say

SQUEUE = """\
12_0|RUNNING|n[1-2]|None
12_1|PENDING||JobArrayTaskLimit
12_2|COMPLETING|n3|None
13|CANCELLED|n1|None
14|COMPLETED|n1|None
15|TIMEOUT|n1|TimeLimit
"""
SACCT = """\
12_0|RUNNING|n1|0:0
12_[3-9%2]|PENDING|None assigned|0:0
13|CANCELLED by 1000|n1|0:15
15|FAILED|n1|137:0
16|NODE_FAIL|n2|0:9
"""


def test_squeue_is_read():
  found = slurm_queue.parse_jobs(SQUEUE)
  assert {id: (job.state, job.host) for id, job in found.items()} == {
    "12_0": ("running", "n[1-2]"), "12_1": ("queued", ""), "12_2": ("running", "n3"),
    "13": ("cancelled", "n1"), "14": ("ended", "n1"), "15": ("ended", "n1"),
  }
  assert found["12_1"].reason == "JobArrayTaskLimit"
  assert found["14"].reason == ""
  assert found["15"].reason == "Slurm reports TIMEOUT, TimeLimit"


def test_sacct_is_read():
  found = slurm_queue.parse_jobs(SACCT)
  assert found["13"].state == "cancelled"
  assert found["15"] == Job("ended", "15", "n1", "Slurm reports FAILED, exit code 137")
  assert found["16"].reason == "Slurm reports NODE_FAIL, signal 9"


def test_older_jobs_are_asked_of_sacct_if_there_is_accounting(fake_slurm):
  fake_slurm("squeue", "12_0|RUNNING|n1|None\n99|RUNNING|n2|None\n")
  fake_slurm("sacct", SACCT)
  found = slurm_queue.query(["12_0", "15", "20"])
  assert set(found) == {"12_0", "15"}
  assert found["15"].reason == "Slurm reports FAILED, exit code 137"
  fake_slurm("sacct", "Slurm accounting storage is disabled\n", code=1)
  assert set(slurm_queue.query(["12_0", "15"])) == {"12_0"}


# Slurm: submitting, and what is left alone


def submitted(planned, **more):
  engine = slurm.Slurm(planned[0].workdir.parent, options(), **more)
  choice = jobs.choose(planned, again=False)
  for trial in choice.todo:
    trials.prepare(trial)
  engine.submit(choice)
  return [trial.name for trial in choice.todo]


def test_only_failed_and_missing_trials_are_submitted_again(
  tmp_path, fake_slurm, capfd
):
  root = tmp_path / "runs"
  planned = plan(root, "done", "queued", "crashed", "diverged", "new", "gone")
  done, queued, crashed, diverged, _, gone = planned
  fill(done, "DONE", "eval.json")
  fill(queued)
  fill(crashed, state="ended", exit_class="infrastructure", reason="SIGKILL")
  fill(diverged, state="ended", exit_class="diverged", reason="not finite")
  fill(gone, state="training", time=time.time() - 5)
  for trial, id in ((queued, "7_0"), (gone, "7_1")):
    states.write_record(trial.workdir, "slurm", id=id)
  fake_slurm("squeue", "7_0|PENDING||Priority\n")
  assert submitted(planned) == ["crashed", "new", "gone"]
  assert "job 12: 3 trial(s)" in capfd.readouterr().out
  records = [states.read_record(root / name) for name in ("crashed", "new", "gone")]
  assert [record["id"] for record in records] == ["12_0", "12_1", "12_2"]
  assert (root / "new" / "config.json").exists()

  choice = jobs.choose(planned, again=False)
  assert choice.given_up == [diverged] and queued in choice.active
  assert diverged in jobs.choose(planned, again=True).todo


def test_what_is_cancelled_here_is_remembered_when_slurm_forgets(tmp_path, fake_slurm):
  planned = plan(tmp_path / "runs", "a", "b")
  submitted(planned)
  fake_slurm("squeue", "12_0|RUNNING|n1|None\n12_1|COMPLETED|n1|None\n")
  calls = fake_slurm("scancel", "")
  assert jobs.cancel(planned) == ["slurm: cancelled 1 trial(s)"]
  assert calls.read_text() == "12_0\n"
  fake_slurm("squeue", "")
  assert jobs.read_states(planned)["a"].kind == "cancelled"
  assert jobs.choose(planned, again=False).todo == planned


# Slurm: the end of a job


def conclude(trial, code, began=None, max_attempts=2):
  began = time.time() - 5 if began is None else began
  return slurm_end.conclude(trial.workdir, code, began, max_attempts, [])


def test_a_lost_process_is_tried_again_but_not_for_ever(tmp_path, monkeypatch):
  monkeypatch.setenv("SLURM_JOB_ID", "5")
  (trial,) = plan(tmp_path, "a")
  fill(trial, state="training")
  assert conclude(trial, 137)
  said = json.loads((trial.workdir / "status.json").read_text())
  assert (said["state"], said["exit_class"]) == ("ended", "infrastructure")
  assert said["reason"] == "ended with exit code 137 (SIGKILL, out of memory perhaps)"
  assert not conclude(trial, 137)
  monkeypatch.setenv("SLURM_JOB_ID", "6")  # Submitted again: a new count.
  assert conclude(trial, 137)


def test_what_training_said_counts_more_than_what_srun_returns(tmp_path):
  (trial,) = plan(tmp_path, "a")
  fill(trial, state="ended", exit_class="diverged", reason="not finite")
  assert not conclude(trial, 143)
  # What an earlier attempt said does not.
  assert conclude(trial, 143, began=time.time() + 5)


@pytest.mark.parametrize("code, again", [(0, False), (2, False), (3, False), (1, True)])
def test_exit_codes_alone_decide_otherwise(tmp_path, code, again):
  (trial,) = plan(tmp_path, "a")
  fill(trial)
  assert conclude(trial, code) == again


def test_the_reason_comes_from_the_log(tmp_path):
  (trial,) = plan(tmp_path, "a")
  fill(trial)
  (trial.workdir / "log.txt").write_text("Traceback\n  x\nImportError: no jax\nbye\n")
  conclude(trial, 1)
  reason = states.read_state(trial).reason
  assert reason == "ended with exit code 1: ImportError: no jax"
  assert slurm_end.last_error("all is well\n") is None


def test_a_folder_that_another_job_holds_is_left_alone(tmp_path):
  (trial,) = plan(tmp_path, "a")
  fill(trial, state="training")
  with run_folder.exclusive(trial.workdir):
    conclude(trial, 2)
    assert states.read_state(trial).kind == "running"
  assert json.loads((trial.workdir / "status.json").read_text())["state"] == "training"


@pytest.mark.slow
def test_a_task_that_sees_no_run_folder_says_where(tmp_path):
  code = (
    "from launch.engines import slurm_task as j; "
    f"j.start({str(tmp_path)!r}, [], config='config.json', log='log.txt')"
  )
  environment = {"SLURM_PROCID": "0", "SLURMD_NODENAME": "n7"}
  result = subprocess.run(
    [sys.executable, "-c", code], env=environment, capture_output=True, text=True
  )
  assert result.returncode == 2
  assert result.stderr == (
    "error: --workdir must be a folder that all hosts see: n7 does not see "
    f"{tmp_path}/config.json.\n"
  )


@pytest.mark.slow
def test_a_task_becomes_training_and_prints_to_the_log(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  code = (
    "from launch.engines import slurm_task as j; "
    f"j.start({str(tmp_path)!r}, ['/bin/sh', '-c', 'echo out; echo err >&2; exit 3'], "
    "config='config.json', log='log.txt')"
  )
  result = subprocess.run([sys.executable, "-c", code], env={"SLURM_PROCID": "1"})
  assert result.returncode == 3
  assert (tmp_path / "log.1.txt").read_text() == "out\nerr\n"


# States


def kind(trial, job=None):
  return states.read_state(trial, job).kind


def test_states_come_from_the_folder_and_the_scheduler(tmp_path):
  new, done, killed, saved, stale = plan(
    tmp_path, "new", "done", "killed", "saved", "stale"
  )
  assert kind(new) == "waiting"
  fill(new)  # Prepared, not begun.
  assert kind(new) == "waiting"
  assert kind(new, Job("queued", reason="Priority")) == "queued"
  assert kind(new, Job("running")) == "running"
  lost = states.read_state(new, Job("ended", reason="Slurm reports NODE_FAIL"))
  assert (lost.kind, lost.reason) == ("lost", "Slurm reports NODE_FAIL")
  fill(done, "DONE", "eval.json")
  assert kind(done, Job("queued")) == "done"
  fill(killed, state="training")
  assert kind(killed) == "lost" and kind(killed, Job("unknown")) == "lost"
  fill(saved, state="ended", exit_class="yielded", reason="SIGTERM")
  assert states.read_state(saved, Job("running")) == State(
    "running", host=socket.gethostname()
  )
  assert kind(saved) == "stopped" and kind(saved, Job("cancelled")) == "cancelled"
  fill(stale, state="ended", exit_class="diverged", time=time.time() - 60)
  assert kind(stale) == "failed"
  states.write_record(stale.workdir, "slurm", id="1")  # That was another job.
  assert kind(stale, Job("queued")) == "queued" and kind(stale) == "waiting"


def no_locks(*_):
  raise OSError(38, "Function not implemented")


def test_the_lock_decides_whether_a_trial_is_running(tmp_path):
  # A container that was restarted has another name, and its old self wrote lately.
  killed, at_work, unlocked = plan(tmp_path, "killed", "at_work", "unlocked")
  for trial in (killed, at_work, unlocked):
    fill(trial, state="training", host="another")
  with run_folder.exclusive(killed.workdir):
    assert kind(killed) == "running"
  assert kind(killed) == kind(killed, Job("unknown")) == kind(unlocked) == "lost"
  with run_folder.exclusive(at_work.workdir):
    assert jobs.choose([killed, at_work], again=False).todo == [killed]


@pytest.mark.parametrize("options", [
  None, "rw,nolock", "rw,vers=3,local_lock=all", "rw,localflock"
])
def test_where_locks_say_nothing_ten_minutes_count(tmp_path, monkeypatch, options):
  elsewhere, old = plan(tmp_path, "elsewhere", "old")
  fill(elsewhere, state="training", host="another")
  fill(old, state="training", host="another", time=time.time() - 3600)
  for trial in (elsewhere, old):
    (trial.workdir / run_folder.LOCK).touch()
  if options is None:
    monkeypatch.setattr(fcntl, "flock", no_locks)
  else:
    mounts = f"/dev/a / ext4 rw 0 0\nhost:/x {tmp_path} nfs {options} 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda _, text=Path.read_text: (
      mounts if str(_) == "/proc/self/mounts" else text(_)
    ))
  assert kind(elsewhere) == "running" and kind(elsewhere, Job("ended")) == "lost"
  assert kind(old) == "lost"


def test_asking_for_a_state_keeps_nobody_from_starting(tmp_path):
  lock = (tmp_path / run_folder.LOCK).open("w")
  fcntl.flock(lock, fcntl.LOCK_SH)
  threading.Timer(0.1, lock.close).start()
  with run_folder.exclusive(tmp_path):
    assert run_folder.is_in_use(tmp_path)


def test_the_table_shows_states_and_reasons(tmp_path):
  planned = plan(tmp_path, "a", "b")
  found = {
    "a": State("running", 10, 2.0, 3.5, None, 1234.5, "n1"),
    "b": State("failed", reason="x" * 200, exit_class="config"),
  }
  head, first, second, total = state_table.table(planned, found).splitlines()
  assert head.split()[-2:] == ["host", "reason"]
  assert first.split()[1:] == ["running", "10/500", "3.5000", "1,234", "2", "a", "n1"]
  assert second.endswith("  " + "x" * 100) and " failed " in second
  assert total == "2 trial(s): 1 running, 1 failed"


def test_watching_ends_when_nothing_waits_or_runs(tmp_path, monkeypatch, capsys):
  planned = plan(tmp_path, "a")
  turns = iter(["queued", "queued", "running", "done"])
  monkeypatch.setattr(jobs, "read_states", lambda _: {"a": State(next(turns))})
  assert state_table.watch(planned, tmp_path, 0.0) == 0
  shown = [x.split()[1] for x in capsys.readouterr().out.splitlines() if x[0] == "a"]
  assert shown == ["queued", "running", "done"]
  turns = iter(["failed"])
  assert state_table.watch(planned, tmp_path, 0.0) == 1


def test_results_hold_what_varies_and_flag_what_is_incomplete(tmp_path):
  (one,) = plan(tmp_path, "one", **{"seed": 1})
  (two,) = plan(tmp_path, "two", **{"seed": 2, "data.batch_size": 32})
  fill(one, "DONE")
  (one.workdir / "eval.json").write_text(json.dumps({
    "step": 9, "main_loss": {"mean": 1.5, "stderr": 0.25}, "split": "test",
    "depth_loss": [{"mean": 1.5, "stderr": 0.25, "count": 4}, {"mean": 2.5}],
  }))
  fill(two, state="ended", exit_class="diverged", reason="not finite, 1", step=3)
  with results_csv.collect(tmp_path).open() as file:
    first, second = csv.DictReader(file)
  assert first == {
    "trial": "one", "complete": "True", "step": "9", "exit_class": "done", "reason": "",
    "folder": "one", "seed": "1", "data.batch_size": "16", "main_loss": "1.5",
    "main_loss_stderr": "0.25", "split": "test", "depth_loss_0": "1.5",
    "depth_loss_0_stderr": "0.25", "depth_loss_1": "2.5", "depth_loss_1_stderr": "",
  } | {"data.batch_size": str(one.config.data.batch_size)}
  assert second["complete"] == "False" and second["main_loss"] == ""
  assert (second["step"], second["reason"]) == ("3", "not finite, 1")


# Local


def test_workers_share_the_gpus(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
  plugin = types.SimpleNamespace(name="xla_cuda12")
  monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [plugin])
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,5,7")
  assert workers.slots(2) == [Slot([0, 1], "0,3"), Slot([2, 3], "5,7")]
  assert workers.slots(1) == [Slot([0, 1, 2, 3], None)]
  with pytest.raises(ConfigError, match=r"--parallel must divide .* \(4\).* got 3"):
    workers.slots(3)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert workers.slots(2) == [Slot([0, 1]), Slot([2, 3])]


def test_a_worker_has_its_share_of_the_machine(monkeypatch):
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
  monkeypatch.setenv("XLA_FLAGS", "")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  core = max(os.sched_getaffinity(0))
  worker = workers.Worker(Slot([core], "2,3"), "")
  try:
    assert worker.result() == ("cpu", 1)
    ask = worker._pool.submit
    assert ask(os.getenv, "CUDA_VISIBLE_DEVICES").result() == "2,3"
    assert ask(os.sched_getaffinity, 0).result() == {core}
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.join()
    worker.give(plan(Path(), "a"))
    died = worker.result()
    assert (died.kind, died.exit_class) == ("died", "infrastructure")
    assert died.text.startswith("the worker was ended by SIGKILL (out of memory")
  finally:
    worker.close()
  assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_a_claimed_trial_is_reported_and_not_trained_twice(tmp_path):
  (trial,) = plan(tmp_path, "a")
  with run_folder.exclusive(trial.workdir):
    (outcome,) = workers.train([(trial.config, trial.workdir)])
  assert outcome.kind == "claimed" and "in use by another process" in outcome.text
  assert os.listdir(trial.workdir) == [".lock"]
  # Another sweep was faster.
  fill(trial, "DONE")
  (outcome,) = workers.train([(trial.config, trial.workdir)])
  assert outcome.kind == "done"
  assert not (trial.workdir / "status.json").exists()


def test_where_there_are_no_locks_that_is_said(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(fcntl, "flock", no_locks)
  with run_folder.exclusive(tmp_path):
    assert not run_folder.is_in_use(tmp_path)
  assert "nothing keeps a second process out" in capsys.readouterr().err


def test_cancelling_stops_the_sweep_of_a_trial(tmp_path, monkeypatch):
  killed = []
  monkeypatch.setattr(os, "kill", lambda *signalled: killed.append(signalled))
  here, idle, there = plan(tmp_path, "here", "idle", "there")
  for trial, host in ((here, None), (idle, None), (there, "another")):
    fill(trial)
    host = host or socket.gethostname()
    states.write_record(trial.workdir, "local", pid=77, host=host)
  with run_folder.exclusive(here.workdir), run_folder.exclusive(there.workdir):
    (said,) = jobs.cancel([here, idle, there])
  assert killed == [(77, signal.SIGTERM)]
  assert said == (
    "local: told 1 sweep(s) to save and stop; stop those on another there"
  )


def sweep_of(planned, root, **options):
  return local.Sweep(jobs.choose(planned, again=False), root, "", **options)


def test_what_is_retried_follows_the_exit_class(tmp_path):
  crashed, broken = plan(tmp_path, "crashed", "broken")
  passed = sweep_of([crashed, broken], tmp_path, max_attempts=2)
  worker = types.SimpleNamespace(give=lambda *_: None, trials=[], program=None)
  for trial, kinds in ((crashed, ("infrastructure",) * 2), (broken, ("config",))):
    for exit_class in kinds:
      passed._waiting = [trial]
      passed._give(worker)
      outcome = workers.Outcome("failed", "RuntimeError: it broke", exit_class)
      passed._note(trial, outcome)
  assert passed._attempts == {"crashed": 2, "broken": 1}
  assert passed._failed.keys() == {"crashed", "broken"}


def test_a_second_signal_ends_the_sweep_and_raises_nothing_amid_a_callback(
  tmp_path, monkeypatch, capfd
):
  ended = []
  worker = types.SimpleNamespace(
    trials=[], future=concurrent.futures.Future(), stop=lambda: ended.append("stop"),
    close=lambda: ended.append("close"),
  )
  monkeypatch.setattr(local, "Worker", lambda *_: worker)

  def wait(*_):
    signal.raise_signal(signal.SIGTERM)

  monkeypatch.setattr(concurrent.futures, "wait", wait)
  monkeypatch.setattr(local, "_SECONDS_BETWEEN_LOOKS", 0)
  sweep = sweep_of(plan(tmp_path, "a"), tmp_path)
  with pytest.raises(SystemExit) as caught:
    sweep.run([Slot(None)])
  assert caught.value.code == 143 and ended == ["stop", "close"]
  assert capfd.readouterr().out.count("a second signal ends at once") == 1


def test_packs_are_even_and_hold_what_is_alike(tmp_path):
  assert [order.pack_size(n, 8, 1) for n in (1, 8, 9, 13, 24)] == [1, 8, 5, 7, 8]
  # Each of two workers is to have one.
  assert [order.pack_size(n, 8, 2) for n in (1, 4, 13, 33)] == [1, 2, 7, 7]
  planned = plan(tmp_path, *"abcde", "wide")
  first = planned[0]
  short = with_overrides(first.resolved, {"train.num_steps": 9})
  planned[0] = states.Trial(first.config, short, first.workdir)
  found = {trial.name: State("waiting") for trial in planned}
  found["b"] = State("stopped", step=3)
  assert order.preview_packs(planned, found, 2, 1).splitlines() == [
    "program 1, 2 trial(s): c d",
    "program 1, 2 trial(s): e a",
    "program 1, 1 trial(s): b",
    "program 2, 1 trial(s): wide",
  ]


def test_a_pack_that_failed_is_not_packed_again(tmp_path):
  planned = plan(tmp_path, "a", "b", "c")
  given = []
  worker = types.SimpleNamespace(
    give=lambda *args: given.append(args), trials=[], program=None
  )
  passed = sweep_of(planned, tmp_path, max_attempts=1, pack=2)
  passed._give(worker)
  passed._note_all(planned[:2], [workers.Outcome("died", "killed", "infrastructure")])
  for _ in range(3):
    passed._give(worker)
  names = [("".join(trial.name for trial in trials), size) for trials, size in given]
  assert names == [("ab", 2), ("c", 2), ("a", None), ("b", None)]
  assert passed._attempts == {"a": 1, "b": 1, "c": 1} and not passed._failed


# Other schedulers, and the command


def test_commands_are_printed_for_every_process(tmp_path, capsys):
  options = printed.Options(processes=2, coordinator="$HOST:900", devices=4)
  engine = printed.Printed(tmp_path, options, "cache")
  planned = plan(tmp_path, "a,b=1")
  engine.check(planned)
  assert engine.submit(jobs.choose(planned, again=False)) == 0
  first, second = capsys.readouterr().out.splitlines()
  assert first.startswith(
    "MTP_JAX_COORDINATOR=$HOST:900 MTP_JAX_NUM_PROCESSES=2 MTP_JAX_PROCESS_ID=0 "
  )
  assert " MTP_JAX_PROCESS_ID=1 " in second
  assert f" -m launch.train --workdir={tmp_path}/a-b1 " in second
  with pytest.raises(ConfigError, match=r"The devices come from --print.processes=2"):
    engine.check(plan(tmp_path, "a", **{"mesh.fsdp": 16}))


@pytest.mark.parametrize("arguments, message", [
  (["--on=ray"], "flag --on=ray: value should be one of <local|slurm|"),
  (["--slurm=nodes=2"], "--slurm is for --on=slurm, got --on=local."),
  (["--slurm_grace=5"], "--slurm_grace is for --on=slurm, got --on=local."),
  (["--on=slurm", "--parallel=2"], "--parallel is for --on=local, got --on=slurm."),
  (["--on=print", "--pack=2"], "--pack is for --on=local, got --on=print."),
  (["--pack=0"], "--pack must be a number from 1 up or auto, got '0'."),
  (["--pack=all"], "--pack must be a number from 1 up or auto, got 'all'."),
  (["--max_parallel=2"], "--max_parallel is for --on=slurm, got --on=local."),
  (["--on=slurm", "--slurm=nodes=two"], "--slurm: nodes must be a number from 1 up"),
  (["--on=slurm", "--slurm_grace=0"], "flag --slurm_grace=0: "),
  (["--on=print", "--print.processes=0"], "flag --print.processes=0: "),
  (["--on=print", "--print.processes=2"], "--print.coordinator must be HOST:PORT "),
  (["--on=kubernetes"], "--kubernetes must set image, claim, which jobset.yaml has."),
  (["--on=kubernetes", "--kubernetes_template=x"], "--kubernetes_template must be a"),
])
def test_bad_engines_are_refused(command, tmp_path, arguments, message):
  root = tmp_path / "runs"
  result = command("launch.sweep", NTP, f"--workdir={root}", *arguments)
  assert result.output.startswith(f"error: {message}")
  assert result.code == 2 and not result.touched_backend and not root.exists()


def test_printed_trials_can_be_trained_as_they_are(command, tmp_path):
  root = tmp_path / "runs"
  sweep_command = ("launch.sweep", NTP, f"--workdir={root}", "--only=seed=1")
  result = command(*sweep_command, "--on=print")
  assert result.code == 0
  assert f"-m launch.train --workdir={root}/s1" in result.output
  assert "1 of 1 trial(s) printed, 0 done" in result.output
  assert cli.load_run_config(root / "s1").seed == 1
  shown = command(*sweep_command, "--status").output.splitlines()
  assert shown[1].split()[:2] == ["seed=1", "waiting"]
  assert (root / "results.csv").read_text().splitlines()[1].startswith("seed=1,False,")


def test_a_sweep_waits_for_no_other_that_is_being_started(command, tmp_path):
  root = tmp_path / "runs"
  with run_folder.exclusive(root):
    result = command("launch.sweep", NTP, f"--workdir={root}", "--on=print")
  assert result.code == 2
  assert result.output == f"error: another sweep is being started in {root}.\n"
  assert os.listdir(root) == [".lock"]


def test_a_dry_run_shows_packs(command):
  result = command("launch.sweep", NTP, "--dry_run", "--pack=auto")
  assert result.code == 0 and "\nprogram 1, 5 trial(s): seed=0 seed=1" in result.output
  assert "\npacks of at most 32, if as many fit the memory:\n" in result.output
  wide = command("launch.sweep", NTP, "--workdir=x", "--pack=2", "--config.mesh.fsdp=2")
  assert wide.code == 2 and "The devices come from --pack: each trial" in wide.output


def test_a_dry_run_shows_what_would_be_handed_over(command, tmp_path):
  result = command("launch.sweep", NTP, "--dry_run", "--on=slurm", "--slurm=qos=low")
  assert result.code == 0 and "#SBATCH --qos=low" in result.output
  assert result.output.startswith("# trial ") and not list(tmp_path.iterdir())
