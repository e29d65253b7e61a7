"""Packs: every run ends as it does alone, whatever becomes of the others."""

import contextlib
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from mtp_jax import pack, pack_program, records, train
from mtp_jax.checkpoint import Checkpointer
from mtp_jax.config import ConfigError, with_overrides
from mtp_jax.interrupt import Interrupted
from mtp_jax.pack_program import Pack
from mtp_jax.program import program_config
from mtp_jax.run import Diverged, Run
from mtp_jax.run_log import Observer
from mtp_jax.sharding import make_mesh, put_batch
from mtp_jax.train_state import hyperparameters
from mtp_jax.train_step import programs
from tests.common import (
  EXPERTS,
  assert_trees_close,
  microbatches,
  packed_batch,
  tiny_config,
)
from tests.tiny_runs import read_metrics, run_config, without_wall_clock, write_texts

# Losses of stacked runs agree to RTOL. Adam divides by what may be near zero, so single
# parameters differ by more: an update is up to 3e-3. EPS, which it adds there, keeps
# rounding from growing with the steps.
RTOL, PARAM_ATOL, EPS = 1e-5, 1e-4, 1e-3
VARIANTS = {
  # The others read its rows, also when it has left.
  "stops": {
    "seed": 3, "train.stop_metric": "loss", "train.stop_value": 99.0,
    "train.evals_per_doubling": 1,
  },
  "plain": {},
  "rate": {"seed": 1, "optimizer.learning_rate": 1e-3, "train.log_every": 4},
  "short": {"seed": 2, "mtp.weight": 0.7, "train.num_steps": 7},
  "diverges": {"optimizer.learning_rate": 1e30, "train.max_nonfinite_steps": 2},
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
  texts = write_texts(tmp_path_factory.mktemp("corpus") / "texts")
  base = run_config(
    texts,
    {
      "mesh.data": 1, "eval.line_prompts": 0, "eval.function_prompts": 0,
      "optimizer.eps": EPS,
    },
  )
  return {
    name: with_overrides(base, variant | {"name": name})
    for name, variant in VARIANTS.items()
  }


@contextlib.contextmanager
def machine(num_devices=1):
  """Lets JAX have no more than these devices."""
  first = jax.devices()[:num_devices]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "devices", lambda: first)
    patch.setattr(jax, "device_count", lambda: num_devices)
    yield


def fit_pack(configs, root, num_devices=1, observers=None):
  """Returns what became of each run, by name; one place or more is left empty."""
  folders = [root / name for name in configs]
  with machine(num_devices):
    ended = pack.fit_pack(
      list(configs.values()), folders, size=6, observers=observers
    )
  return dict(zip(configs, ended, strict=True))


@pytest.fixture(scope="module")
def alone(configs, tmp_path_factory):
  """The sweep folder of runs that were trained one by one, and how each ended."""
  root, ended = tmp_path_factory.mktemp("alone"), {}
  for name, config in configs.items():
    try:
      with machine():
        ended[name] = train.fit(config, root / name, progress=False)
    except Diverged as error:
      ended[name] = error
  return root, ended


def restored(workdir, config, step=None):
  """Returns the state of a checkpoint as numpy arrays."""
  with Run(config, workdir, read_only=True, devices=jax.devices()[:1]) as run:
    with jax.set_mesh(run.mesh):
      return jax.device_get(run.restore(step).state)


def close(value):
  """Returns what is equal to values that differ by rounding."""
  match value:
    case dict():
      return {k: close(v) for k, v in value.items()}
    case list():
      return [close(v) for v in value]
    case float():
      return pytest.approx(value, rel=RTOL, abs=1e-6)
  return value


def results(workdir):
  """Returns the records of a run and its evaluation, without the time they took."""
  found = [without_wall_clock(record) for record in read_metrics(workdir)]
  path = workdir / "eval.json"
  result = json.loads(path.read_text()) if path.exists() else {}
  return found, without_wall_clock(result)


def assert_close_run(found, expected, config):
  """Fails unless files, records, evaluation and state agree to rounding."""
  names = {path.name for path in expected.iterdir()}
  assert {path.name for path in found.iterdir()} == names
  (records, result), (wanted_records, wanted) = results(found), results(expected)
  assert records == [close(record) for record in wanted_records]
  if "DONE" in names:
    for key in (
      "step", "stopped", "train_flops", "main_loss", "depth_loss", "bits_per_byte"
    ):
      assert result[key] == close(wanted[key])
    states = [restored(folder, config) for folder in (found, expected)]
    assert_trees_close(*states, rtol=1e-3, atol=PARAM_ATOL)


def assert_equal_run(found, expected):
  """Fails unless records, evaluation and state agree to the last bit."""
  assert results(found) == results(expected)
  if (expected / "DONE").exists():
    last = json.loads((expected / "eval.json").read_text())["step"]
    assert fingerprint(found, last) == fingerprint(expected, last)


def fingerprint(workdir, step):
  reader = Checkpointer(workdir, read_only=True)
  found = reader.meta(step)["fingerprint"]
  reader.close()
  return found


@pytest.mark.slow
def test_packed_runs_are_those_that_were_trained_alone(configs, alone, tmp_path):
  root, expected = alone
  ended = fit_pack(configs, tmp_path)
  for name, config in configs.items():
    assert_close_run(tmp_path / name, root / name, config)
  assert ended["stops"]["stopped"]["last_step"] == ended["stops"]["step"] == 2
  assert ended["plain"]["stopped"] is None and ended["plain"]["step"] == 12
  assert json.loads((tmp_path / "plain" / "run.json").read_text())["packed"] == 5
  error = ended.pop("diverges")
  assert type(error) is Diverged and str(error) == str(expected["diverges"])
  assert not (tmp_path / "diverges" / "DONE").exists()
  for name, result in ended.items():
    assert json.loads((tmp_path / name / "eval.json").read_text()) == result


@pytest.mark.slow
def test_data_of_their_own_and_several_devices(configs, alone, tmp_path):
  """Three runs on two devices, each on its own rows."""
  root, _ = alone
  chosen = {name: configs[name] for name in ("plain", "rate", "short")}
  chosen["rate"] = with_overrides(chosen["rate"], {"data.seed": 5})
  fit_pack(chosen, tmp_path, num_devices=2)
  for name in ("plain", "short"):
    assert_close_run(tmp_path / name, root / name, configs[name])
  first, other = (
    read_metrics(folder / "rate", "train")[0]["loss"] for folder in (root, tmp_path)
  )
  assert first != close(other)


class Stops(Observer):
  """Sends a signal when its run is at a step."""

  def __init__(self, step, signum=signal.SIGTERM):
    self._at, self._signum = step, signum

  def stepped(self, step):
    if step == self._at:
      os.kill(os.getpid(), self._signum)


def finished_steps(workdir):
  reader = Checkpointer(workdir, read_only=True)
  steps = reader.steps()
  reader.close()
  return steps


@pytest.fixture(scope="module")
def never_stopped(configs, tmp_path_factory):
  """A pack of two runs that end at different steps, and what they ended in."""
  root = tmp_path_factory.mktemp("never_stopped")
  pair = {name: configs[name] for name in ("plain", "short")}
  return pair, root, fit_pack(pair, root)


@pytest.mark.slow
def test_an_interrupted_pack_goes_on_bit_for_bit(never_stopped, tmp_path):
  pair, root, _ = never_stopped
  for step in (5, 10):  # At the second one, the short run has ended.
    observers = [Stops(step), Observer()]
    ended = fit_pack(pair, tmp_path, observers=observers)
    assert [type(x) for x in ended.values()] == [Interrupted] * 2
    assert finished_steps(tmp_path / "plain")[-1] == step
    assert finished_steps(tmp_path / "short")[-1] == min(step, 7)
    assert not list(tmp_path.glob("*/DONE"))
  fit_pack(pair, tmp_path)
  for name in pair:
    assert_equal_run(tmp_path / name, root / name)


@pytest.mark.slow
def test_runs_at_different_steps_go_on_together(never_stopped, tmp_path):
  pair, root, _ = never_stopped
  fit_pack(pair, tmp_path, observers=[Stops(6), Observer()])
  shutil.rmtree(tmp_path / "short" / "checkpoints" / "6")  # Goes on from step 4.
  fit_pack(pair, tmp_path)
  for name, config in pair.items():
    assert_close_run(tmp_path / name, root / name, config)


@pytest.mark.slow
def test_a_signal_during_evaluation_keeps_what_is_evaluated(
  never_stopped, tmp_path, monkeypatch
):
  pair, root, expected = never_stopped
  shutil.copytree(root, tmp_path, dirs_exist_ok=True)
  for name in pair:
    (tmp_path / name / "DONE").unlink()
  likelihood_of = records.likelihood_of

  def stop(run, *args):
    if run.config.name == "short":
      os.kill(os.getpid(), signal.SIGTERM)
    return likelihood_of(run, *args)

  monkeypatch.setattr(records, "likelihood_of", stop)
  ended = fit_pack(pair, tmp_path)
  assert without_wall_clock(ended["plain"]) == without_wall_clock(expected["plain"])
  assert str(ended["short"]) == "SIGTERM at step 7; checkpoint saved"
  assert [path.parent.name for path in tmp_path.glob("*/DONE")] == ["plain"]


def contents(folder):
  """Returns the bytes of every file below a folder, and when it was written."""
  return {
    path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
    for path in folder.rglob("*")
    if path.is_file()
  }


@pytest.mark.slow
@pytest.mark.parametrize("done", [("short",), ("plain", "short")])
def test_a_pack_leaves_a_finished_run_alone(never_stopped, tmp_path, done):
  pair, root, expected = never_stopped
  for name in done:
    shutil.copytree(root / name, tmp_path / name)
  before = {name: contents(tmp_path / name) for name in done}
  ended = fit_pack(pair, tmp_path)
  for name in done:
    assert contents(tmp_path / name) == before[name]
    assert without_wall_clock(ended[name]) == without_wall_clock(expected[name])
  for name, config in pair.items():
    assert_close_run(tmp_path / name, root / name, config)


@pytest.mark.slow
def test_what_fails_in_one_run_is_its_own(never_stopped, tmp_path, monkeypatch):
  pair, root, _ = never_stopped
  save = Checkpointer.save

  def full(checkpointer, *args):
    if "short" in str(checkpointer.directory):
      raise OSError(28, "No space left on device")
    save(checkpointer, *args)

  monkeypatch.setattr(Checkpointer, "save", full)
  (tmp_path / "rate" / "checkpoints" / "4").mkdir(parents=True)
  (tmp_path / "rate" / "config.json").write_text(
    (root / "short" / "config.json").read_text()
  )
  configs = pair | {"rate": pair["plain"]}
  ended = fit_pack(configs, tmp_path)
  assert isinstance(ended["short"], OSError)
  assert isinstance(ended["rate"], ConfigError), "the folder holds another run"
  assert ended["plain"]["step"] == 12


def test_what_cannot_be_packed_is_refused(configs, tmp_path, monkeypatch):
  plain = configs["plain"]
  deeper = with_overrides(plain, {"mtp.depth": 1, "trunk.embed_dim": 32})
  with pytest.raises(
    ConfigError,
    match=r"one program, but these keys differ: mtp.depth, trunk.embed_dim\.",
  ):
    fit_pack({"a": plain, "b": deeper}, tmp_path)
  with pytest.raises(ConfigError, match=r"mesh must be .* number of devices \(1\)"):
    fit_pack({"a": with_overrides(plain, {"mesh.fsdp": 2})}, tmp_path)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ConfigError, match=r"trained by one process, got 2\."):
    fit_pack({"a": plain}, tmp_path)
  assert not list(tmp_path.iterdir())


# The program of a pack, without runs.


@pytest.mark.parametrize("kind, depth, overrides", [
  ("medusa", 1, {"train.freeze_trunk": True, "trunk.num_layers": 1}),
  pytest.param("parallel", 1, {"train.accumulation_steps": 2}, marks=pytest.mark.slow),
  pytest.param(
    "sequential",
    1,
    EXPERTS | {"trunk.moe.grouped_matmul": "ragged", "trunk.num_layers": 2},
    marks=pytest.mark.slow,
  ),
])
def test_every_kind_of_step_can_be_stacked(kind, depth, overrides):
  config = tiny_config(kind, depth, overrides)
  configs = [
    with_overrides(config, {"seed": seed, "optimizer.learning_rate": rate})
    for seed, rate in enumerate((1e-3, 3e-3, 1e-2))
  ]
  shape, mesh = program_config(config), make_mesh(config.mesh, jax.devices()[:1])
  one = programs.__wrapped__(shape, mesh)
  hypers = [hyperparameters(c) for c in configs]
  batch = microbatches(packed_batch(config), config.train.accumulation_steps)
  with jax.set_mesh(mesh):
    states = [jax.device_get(one.init(np.int32(c.seed))) for c in configs]
  packed = Pack(shape, states, hypers, 4, jax.devices()[:2])
  on_devices = packed.put([batch])
  packed.compile(on_devices)
  for i in range(2):
    active = {0: i == 0, 2: True} if i else {0: True, 1: True, 2: True}
    packed.step(on_devices, active)
  with jax.set_mesh(mesh):
    rows = put_batch(mesh, batch, ("microbatch",))
    for index, (state, hyper) in enumerate(zip(states, hypers, strict=True)):
      before = state
      for i in range(1 if index == 1 else 2):
        starts = i == 0 or index == 2
        state, expected = one.step(state, rows, hyper, np.bool_(starts))
      found = jax.device_get(packed.state(index))
      assert found.step == state.step == (1 if index == 1 else 2)
      if config.train.freeze_trunk:
        assert_trees_close(found.params["trunk"], before.params["trunk"], 0, 0)
      assert_trees_close(found, jax.device_get(state), rtol=1e-3, atol=PARAM_ATOL)
      if index != 1:
        expected = jax.device_get(expected)
        assert_trees_close(packed.report(index), expected, rtol=1e-5, atol=1e-6)


def test_a_pack_is_as_large_as_the_memory(monkeypatch):
  config = tiny_config("none", 0, {"trunk.num_layers": 1})
  state = jax.eval_shape(
    programs(program_config(config), make_mesh(config.mesh, jax.devices()[:1])).init, 0
  )
  per_trial = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  with machine():
    fits = lambda: pack_program.fitting_size(config, 4, jax.devices())  # noqa: E731
    assert fits() == 1, "a CPU gains nothing from a pack"
    monkeypatch.setattr(pack_program, "platform", lambda: "gpu")
    for memory, sizes in ((1e12, (4,)), (3 * per_trial, (1, 2)), (1, (1,))):
      monkeypatch.setattr(pack_program, "device_memory", lambda _, x=memory: x)
      assert fits() in sizes


def test_a_pack_needs_a_place_for_each():
  with pytest.raises(ValueError, match=r"size must be at least 2, got 1\."):
    Pack(program_config(tiny_config()), [{}, {}], [(), ()], 1, jax.devices())
