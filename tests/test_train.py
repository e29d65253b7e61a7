"""The training loop: what it writes, refuses, survives and shares."""

import gc
import json
import os
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import base
from mtp_jax import accounting, evaluate, generative_metrics, records, train
from mtp_jax import run as run_module
from mtp_jax.checkpoint import Checkpointer, CheckpointError
from mtp_jax.config import ConfigError, to_dict, with_overrides
from mtp_jax.data.sources import DataError
from mtp_jax.interrupt import Interrupt, Interrupted
from mtp_jax.run import Diverged, Run
from mtp_jax.run_log import Observer, is_log_spaced
from tests.corpora import write_jsonl
from tests.test_metrics import read_events
from tests.tiny_runs import read_metrics, run_config, without_wall_clock, write_texts

MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.context": 2}
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  return write_texts(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="module")
def config(texts):
  return run_config(texts, MESH)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
  """The folder of a finished run, and what `fit` returned."""
  workdir = tmp_path_factory.mktemp("finished")
  return workdir, train.fit(config, workdir, progress=False)


def test_rows_of_too_many_documents_take_the_mask(texts, tmp_path, monkeypatch):
  one = {"mesh.data": 1, "trunk.attention": "cudnn_packed"}
  config = accounting.resolve(run_config(texts, one))
  monkeypatch.setattr(run_module, "MOST_DOCUMENTS", 2)

  def attention(seq_len):
    changed = with_overrides(config, {"data.seq_len": seq_len})
    run = Run(changed, tmp_path, read_only=True, devices=jax.devices()[:1])
    return run.config.trunk.attention, run.corpus.train_rows(0).most_documents

  assert attention(64) == ("cudnn_packed", 2)
  with pytest.warns(UserWarning, match="at most 2 documents: a row may have [3-9]"):
    kind, most = attention(512)
  assert kind == "cudnn" and most > 2


@pytest.fixture
def copy(finished, tmp_path):
  """A copy that was stopped after step 8, when its last record was of step 9."""
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  shutil.rmtree(workdir / "checkpoints" / "12")
  for name in ("DONE", "eval.json"):
    (workdir / name).unlink()
  return workdir


@pytest.fixture
def num_compiled():
  """The names of what is compiled while the test runs."""
  events = []

  def note(event, duration, **_):
    events.extend([event] if event == COMPILED else [])

  jax.monitoring.register_event_duration_secs_listener(note)
  yield events
  jax.monitoring.unregister_event_duration_listener(note)


def test_the_folder_holds_what_the_contract_says(finished, config):
  workdir, result = finished
  assert {path.name for path in workdir.iterdir()} == {
    "config.json", "run.json", "tokenizer.json", "metrics.jsonl", "tensorboard",
    "checkpoints", "startup.json", "eval.json", "DONE",
  }
  assert json.loads((workdir / "eval.json").read_text()) == result
  run = json.loads((workdir / "run.json").read_text())
  assert run["parameters"]["total"] == accounting.count(config).total
  assert run["num_steps"] == 12
  assert run["data"]["num_documents"] == 24
  assert {"jax", "flax", "optax", "python"} <= run["versions"].keys()
  reader = Checkpointer(workdir, read_only=True)
  assert reader.steps() == [8, 12]
  meta = reader.meta(12)
  reader.close()
  assert meta["data"]["batches"] == 12
  assert meta["tokenizer"] == (workdir / "tokenizer.json").read_text().strip()
  assert meta["config"]["mtp"]["depth"] == 2


def test_every_field_of_the_log(finished, config):
  records = read_metrics(finished[0], "train")
  assert [x["step"] for x in records] == [3, 6, 9, 12]
  for record in records:
    assert record["tokens"] == record["step"] * 8 * 64
    assert record["loss_total"] == pytest.approx(sum(record["weighted_loss"]), rel=1e-6)
    # Constant weights: the means may be multiplied.
    product = np.dot(record["weight"], record["loss"])
    assert record["loss_total"] == pytest.approx(product, rel=1e-6)
    assert record["weight"] == pytest.approx([1.0, 0.15, 0.15])
    assert record["lambda"] == pytest.approx(0.3)
    assert all(0 <= x <= 1 for x in record["accuracy"])
    main, *extra = record["count"]
    assert 3 * 8 * 64 >= main > extra[0] > extra[1] > 0
    assert record["grad_norm"] > 0
    assert record["tokens_per_second"] > 0
    assert record["mfu"] is None, "the peak of a CPU is not known"
    assert record["nonfinite_steps"] == 0
  rates = [x["learning_rate"] for x in records]
  final = config.optimizer.learning_rate * config.optimizer.final_fraction
  assert rates == sorted(rates, reverse=True)
  assert rates[-1] == pytest.approx(final)
  seconds = [x["seconds"] for x in records]
  assert seconds == sorted(seconds)
  assert records[-1]["loss_total"] < records[0]["loss_total"]


def test_diagnostics_and_validation_are_logged(finished):
  workdir, result = finished
  diagnostics = read_metrics(workdir, "diagnostics")
  assert [x["step"] for x in diagnostics] == [6]
  for record in diagnostics:
    assert 0 < record["mtp_grad_share"] < 1
    assert -1 <= record["mtp_grad_cosine"] <= 1
  validation = read_metrics(workdir, "validation")
  assert [x["step"] for x in validation] == [6, 12]
  assert validation[-1]["loss"] == [x["mean"] for x in result["depth_loss"]]
  assert validation[-1]["bits_per_byte"] == result["bits_per_byte"]["mean"]


def logged_steps(workdir, kind="validation"):
  return [x["step"] for x in read_metrics(workdir, kind)]


@pytest.mark.slow
def test_validations_for_each_doubling_of_the_step_and_at_the_last(
  finished, config, tmp_path
):
  due = lambda k: [n for n in range(1, 33) if is_log_spaced(n, k)]  # noqa: E731
  assert due(1) == [1, 2, 4, 8, 16, 32]
  assert due(2) == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32]
  for k in (3, 5, 40):
    assert due(k) == sorted({round(2 ** (j / k)) for j in range(1 + 5 * k)})
  often = {"train.evals_per_doubling": 1, "train.eval_every": 5}
  train.fit(with_overrides(config, often), tmp_path / "a", progress=False)
  assert logged_steps(tmp_path / "a") == [1, 2, 4, 5, 8, 10, 12]
  # Where every is no divisor of the steps; and not at all.
  for every, steps in ((8, [8, 12]), (0, [])):
    changed = with_overrides(config, {"train.eval_every": every})
    train.fit(changed, tmp_path / f"{every}", progress=False)
    assert logged_steps(tmp_path / f"{every}") == steps


# Training ends when a metric has reached a value twice in a row.

OFTEN = {"train.eval_every": 2, "checkpoint.every_steps": 3}


@pytest.fixture(scope="module")
def curve(finished, config, tmp_path_factory):
  """The folder of a run that is validated often, and its losses by step."""
  workdir = tmp_path_factory.mktemp("curve")
  train.fit(with_overrides(config, OFTEN), workdir, progress=False)
  records = read_metrics(workdir, "validation")
  losses = {x["step"]: x["loss"][0] for x in records}
  assert sorted(losses.values(), reverse=True) == list(losses.values())
  return workdir, losses


@pytest.fixture(scope="module")
def stopping(config, curve):
  """A config that reaches its loss at step 6 and ends at step 8."""
  value = (curve[1][4] + curve[1][6]) / 2
  stop = {"train.stop_metric": "loss", "train.stop_value": value}
  return with_overrides(config, OFTEN | stop)


@pytest.fixture(scope="module")
def stopped(stopping, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("stopped")
  return workdir, train.fit(stopping, workdir, progress=False)


def records_until(workdir, step):
  records = [without_wall_clock(x) for x in read_metrics(workdir)]
  return [x for x in records if x["step"] <= step]


@pytest.mark.slow
def test_success_ends_training_with_all_that_the_last_step_has(
  stopping, stopped, curve
):
  workdir, result = stopped
  folder, losses = curve
  assert result["stopped"] == {
    "step": 6, "tokens": 6 * 8 * 64, "metric": "loss", "value": losses[6],
    "last_step": 8,
  }
  assert (result["step"], result["tokens"]) == (8, 8 * 8 * 64)
  assert (workdir / "DONE").exists() and finished_steps(workdir) == [6, 8]
  assert json.loads((workdir / "eval.json").read_text()) == result
  # Until there it is the run that is not stopped, learning rates included; the interval
  # that is cut short is logged.
  records, whole = records_until(workdir, 12), records_until(folder, 8)
  *before, _ = (x for x in records if x["kind"] == "train")
  assert before == [x for x in whole if x["kind"] == "train"]
  assert logged_steps(workdir, "train") == [3, 6, 8]
  for kind in ("validation", "diagnostics"):
    same = [[x for x in part if x["kind"] == kind] for part in (records, whole)]
    assert same[0] == same[1]
  assert train.fit(stopping, workdir, progress=False) == result
  assert logged_steps(workdir, "train") == [3, 6, 8]
  assert train.evaluate_run(stopping, workdir) == result
  assert train.evaluate_run(stopping, workdir, step=6)["stopped"] is None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "signal"])
def test_success_between_two_starts_ends_the_run_as_ever(
  stopping, stopped, tmp_path, how
):
  """Between the two validations that are asked for."""
  run = tmp_path / "run"
  if how == "killed":
    shutil.copytree(stopped[0], run)
    shutil.rmtree(run / "checkpoints" / "8")
    for name in ("DONE", "eval.json"):
      (run / name).unlink()
  else:

    class Stops(Observer):
      def stepped(self, step):
        if step == 7:
          os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="at step 7"):
      train.fit(stopping, run, progress=False, observer=Stops())
  result = train.fit(stopping, run, progress=False)
  assert without_wall_clock(result) == without_wall_clock(stopped[1])
  assert records_until(run, 12) == records_until(stopped[0], 12)


@pytest.mark.slow
@pytest.mark.parametrize("hits, first, last", [
  ((4, 8, 10), 8, 10), ((2, 6, 10), None, 12), ((12,), None, 12), ((10, 12), 10, 12),
])
def test_success_counts_twice_in_a_row(
  finished, config, tmp_path, monkeypatch, hits, first, last
):
  likelihood_of, steps = records.likelihood_of, iter(range(2, 99, 2))

  def scripted(run, *args):
    summary = likelihood_of(run, *args)
    summary["bits_per_byte"]["mean"] = 1.0 if next(steps) in hits else 1.01
    return summary

  monkeypatch.setattr(records, "likelihood_of", scripted)
  stop = {"train.stop_metric": "bits_per_byte", "train.stop_value": 1.0}
  plain = {"train.diagnostics_every": 0, "eval.line_prompts": 0}
  stopping = with_overrides(
    config, OFTEN | stop | plain | {"eval.function_prompts": 0}
  )
  result = train.fit(stopping, tmp_path, progress=False)
  assert result["step"] == logged_steps(tmp_path)[-1] == last
  found = result["stopped"]
  assert found is None if first is None else found["step"] == first


@pytest.mark.slow
def test_a_line_says_that_success_ended_it(stopping, stopped, tmp_path, capsys):
  train.fit(stopping, tmp_path)
  lines = capsys.readouterr().out.splitlines()
  value = stopping.train.stop_value
  assert f"tiny: loss reached {value} at steps 6 and 8" in lines
  assert lines[-2].startswith("tiny: 8 of 8 steps") and lines[-2].endswith(", 0 s left")


TASKS = {
  "siblings": {
    "task.siblings.num_parents": 2, "task.siblings.num_children": 6,
    "task.siblings.prefix_length": 2, "task.num_train": 4,
  },
  "polynomial": {
    "task.polynomial.max_operators": 1, "task.polynomial.held_out_operators": 2,
  },
}


# What text alone has, at its default.
OF_TEXT = {
  f"eval.{key}": base.get_config().eval[key]
  for key in ("rows_per_document", "line_prompts", "function_prompts", "max_new_tokens")
}


def task_config(texts, source, **overrides):
  values = {
    "data.source": source, "data.path": "", "tokenizer.kind": "symbols",
    "mesh.data": -1, "mtp.kind": "none", "mtp.depth": 0, "trunk.num_layers": 1,
    "data.test_fraction": 0.3, "train.num_steps": 4, "train.eval_every": 0,
    "train.diagnostics_every": 0, "eval.task_examples": 16, "eval.num_rows": 16,
    "train.accumulation_steps": 2, "data.batch_size": 16,
    **OF_TEXT,
  }
  changed = {key.replace("__", "."): x for key, x in overrides.items()}
  return run_config(texts, values | TASKS[source] | changed)


@pytest.mark.slow
@pytest.mark.parametrize("source", TASKS)
def test_validations_of_a_task_have_all_its_metrics_on_both_splits(
  texts, tmp_path, source
):
  config = task_config(
    texts, source, train__evals_per_doubling=1, train__eval_test=True
  )
  result = train.fit(config, tmp_path, progress=False)
  validation, test = (read_metrics(tmp_path, kind) for kind in ("validation", "test"))
  assert [x["step"] for x in validation] == [x["step"] for x in test] == [1, 2, 4]
  both = with_overrides(config, {"eval.split": "test"})
  for record, expected in (
    (validation[-1], result), (test[-1], train.evaluate_run(both, tmp_path)),
  ):
    assert record["loss"] == [expected["main_loss"]["mean"]]
    assert record["bits_per_byte"] == expected["bits_per_byte"]["mean"]
    assert record["task_accuracy"] == expected["task_accuracy"]["mean"]
    if source == "siblings":
      assert record["task_new"] == expected["task_new"]["mean"]
      assert "task_accuracy_groups" not in record
    else:
      groups = expected["task_accuracy_groups"]
      assert len(groups) > 0 and "task_new" not in record
      assert record["task_accuracy_groups"] == {
        name: x["mean"] for name, x in groups.items()
      }
  assert validation[0].keys() == test[0].keys()
  assert [x["loss"] for x in validation] != [x["loss"] for x in test]
  scalars, _ = read_events(tmp_path)
  for record in test:
    found = scalars["test/task_accuracy", record["step"]]
    assert found == pytest.approx(record["task_accuracy"])
  # The records are of these splits whatever is evaluated at the end.
  train.fit(both, tmp_path / "other", progress=False)
  assert read_metrics(tmp_path / "other", "validation")[-1]["loss"] == (
    validation[-1]["loss"]
  )


@pytest.mark.slow
def test_a_task_is_solved_from_below(texts, tmp_path, monkeypatch):
  """New answers count, on the validation split alone; in two microbatches a step."""
  measure, splits = generative_metrics.task_metrics, []

  def scripted(config, params, corpus, before_batch=None):
    split = corpus.config.eval.split
    splits.append(split)
    share = {"validation": 0.5, "test": 0.4}[split] if len(splits) > 2 else 0.4
    return measure(config, params, corpus, before_batch) | {"task_new": {"mean": share}}

  monkeypatch.setattr(generative_metrics, "task_metrics", scripted)
  config = task_config(
    texts, "siblings", train__eval_every=1, train__eval_test=True,
    train__stop_metric="task_new", train__stop_value=0.5, train__num_steps=9,
  )
  result = train.fit(config, tmp_path, progress=False)
  assert result["stopped"] == {
    "step": 2, "tokens": 2 * 16 * 64, "metric": "task_new", "value": 0.5,
    "last_step": 3,
  }
  assert logged_steps(tmp_path, "test") == [1, 2, 3]


@pytest.mark.slow
def test_text_is_tested_beside_validation(finished, config, tmp_path):
  tested = with_overrides(config, {"train.eval_test": True})
  train.fit(tested, tmp_path, progress=False)
  assert records_until(tmp_path, 12) != records_until(finished[0], 12)
  assert read_metrics(tmp_path, "validation")[-1]["loss"] == (
    read_metrics(finished[0], "validation")[-1]["loss"]
  )
  expected = train.evaluate_run(
    with_overrides(tested, {"eval.split": "test"}), tmp_path
  )
  assert read_metrics(tmp_path, "test")[-1]["loss"] == [
    x["mean"] for x in expected["depth_loss"]
  ]


def test_tensorboard_agrees_with_the_records(finished):
  workdir, _ = finished
  scalars, _ = read_events(workdir)
  for record in read_metrics(workdir):
    for key, value in record.items():
      if key in ("kind", "step") or value is None:
        continue
      named = {key: value}
      if isinstance(value, list):
        named = {f"{key}/{depth}": x for depth, x in enumerate(value)}
      for name, x in named.items():
        found = scalars.pop((f"{record['kind']}/{name}", record["step"]))
        assert found == pytest.approx(x, rel=1e-6)
  assert scalars == {}


def test_the_evaluation_is_complete(finished):
  _, result = finished
  assert result["step"] == 12
  assert result["tokens"] == 12 * 8 * 64
  assert result["split"] == "validation"
  assert result["num_documents"] > 1
  assert len(result["depth_loss"]) == 3
  assert len(result["teacher_forced_agreement"]) == 2
  assert result["next_line_exact_match"]["count"] == 2
  assert result["function_parses"]["count"] == 2
  assert 1 <= result["simulated_accepted_length"]["mean"] <= 3


def test_trials_of_one_shape_compile_once(finished, config, tmp_path, num_compiled):
  other = {
    "name": "other",
    "seed": 5,
    "data.seed": 5,
    "optimizer.learning_rate": 1e-3,
    "mtp.weight": 0.7,
    "train.num_steps": 4,
  }
  result = train.fit(with_overrides(config, other), tmp_path, progress=False)
  assert num_compiled == []
  assert result["main_loss"] != finished[1]["main_loss"]
  (record,) = read_metrics(tmp_path, "train")[-1:]
  assert record["lambda"] == pytest.approx(0.7)


def test_a_finished_run_is_evaluated_again_and_not_trained(finished, config):
  workdir, result = finished
  before = (workdir / "metrics.jsonl").read_text()
  again = train.fit(config, workdir, progress=False)
  assert again == result
  assert (workdir / "metrics.jsonl").read_text() == before


def test_resuming_ends_where_the_run_ended(finished, config, copy, capsys):
  result = train.fit(config, copy)
  assert "tiny: resumed at step 8" in capsys.readouterr().out
  assert json.loads((copy / "startup.json").read_text())["step"] == 8
  assert without_wall_clock(result) == without_wall_clock(finished[1])
  found, expected = (
    [without_wall_clock(x) for x in read_metrics(folder)]
    for folder in (copy, finished[0])
  )
  assert found == expected


@pytest.mark.slow
def test_resuming_on_another_mesh_of_eight_goes_on(finished, config, copy):
  # Diagnostics are off because they would be compiled again.
  mesh = {"mesh.data": 8, "mesh.fsdp": 1, "mesh.context": 1}
  other = with_overrides(config, mesh | {"train.diagnostics_every": 0})
  result = train.fit(other, copy, progress=False)
  assert result["main_loss"]["mean"] == pytest.approx(
    finished[1]["main_loss"]["mean"], rel=1e-5
  )


@pytest.mark.slow
def test_evaluate_run_repeats_the_evaluation(finished, config):
  workdir, result = finished
  before = sorted(path for path in workdir.rglob("*"))
  assert train.evaluate_run(config, workdir) == result
  other = train.evaluate_run(
    with_overrides(config, {"eval.num_rows": 3, "eval.line_prompts": 0}), workdir
  )
  assert other["next_line_exact_match"] is None
  assert other["main_loss"] != result["main_loss"]
  assert sorted(path for path in workdir.rglob("*")) == before


def test_evaluate_run_needs_a_checkpoint(config, tmp_path):
  with pytest.raises(CheckpointError, match="no checkpoint in"):
    train.evaluate_run(config, tmp_path)


def test_another_run_may_not_use_the_folder(copy, config):
  with pytest.raises(ConfigError, match=r"(?s)architecture.*mtp.depth: 2 there"):
    train.fit(with_overrides(config, {"mtp.depth": 1}), copy, progress=False)
  with pytest.raises(ConfigError, match=r"(?s)training.*seed: 0 there, 1 now"):
    train.fit(with_overrides(config, {"seed": 1}), copy, progress=False)


def test_what_cannot_be_trained_claims_no_folder(config, texts, tmp_path, capsys):
  (tmp_path / "short.txt").write_text("short")
  (tmp_path / "one.txt").write_text("".join(x.read_text() for x in texts.iterdir()))
  workdir = tmp_path / "run"

  def fit(**values):
    values = {key.replace("__", "."): value for key, value in values.items()}
    return train.fit(with_overrides(config, values), workdir)

  with pytest.raises(DataError, match="has too little text"):
    fit(data__path=str(tmp_path / "short.txt"))
  assert not (workdir / "config.json").exists()
  # An engine writes the config before the job looks at the text.
  refused = with_overrides(config, {"data.path": str(tmp_path / "short.txt")})
  workdir.mkdir(exist_ok=True)
  (workdir / "config.json").write_text(json.dumps(to_dict(refused)))
  # The corrected command trains, on one file.
  result = fit(
    data__path=str(tmp_path / "one.txt"), train__num_steps=2, eval__num_rows=2
  )
  assert result["num_documents"] == 1 and result["main_loss"]["stderr"] is None
  said = capsys.readouterr().out
  assert (
    "left out: 0 duplicate, 0 empty, 0 not UTF-8; too few to be split whole, so the "
    "end of each is held out (0.3 for validation, 0.1 for test of the text, after a "
    "gap of 64 tokens)\n"
  ) in said
  assert "nats per token (an error needs two documents)\n" in said
  assert "+-" not in said and "nan" not in said


FOLDERS = ("config.json", "run.json", "metrics.jsonl", "eval.json", "DONE")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_in_place_of_a_file(config, tmp_path, name):
  (tmp_path / name).mkdir()
  with pytest.raises(ConfigError) as caught:
    train.fit(config, tmp_path, progress=False)
  assert str(caught.value) == (
    f"{tmp_path / name} must be a file that training writes, and is a folder."
  )
  assert [x.name for x in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard"])
def test_a_file_in_place_of_a_folder(config, tmp_path, name):
  (tmp_path / name).write_text("")
  with pytest.raises(ConfigError) as caught:
    train.fit(config, tmp_path, progress=False)
  assert str(caught.value) == (
    f"{tmp_path / name} must be a folder that training fills, and is a file."
  )


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"{}", b"[" * 10**5, b"3"])
@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_garbage_in_a_run_folder(copy, config, name, content):
  (copy / name).write_bytes(content)
  with pytest.raises(ConfigError) as caught:
    train.fit(config, copy, progress=False)
  assert str(caught.value).startswith(f"{copy / name} must be ")


def test_other_text_may_not_continue_a_run(copy, config, tmp_path):
  other = with_overrides(config, {"data.path": str(write_texts(tmp_path / "t", 20))})
  with pytest.raises(DataError, match=r"must be the corpus of the saved run.*manifest"):
    train.fit(other, copy, progress=False)
  with pytest.raises(DataError, match=r"must be the corpus of the saved run.*manifest"):
    train.evaluate_run(other, copy)


def test_text_may_move(finished, copy, config, texts, tmp_path):
  moved = shutil.copytree(texts, tmp_path / "moved")
  result = train.fit(
    with_overrides(config, {"data.path": str(moved)}), copy, progress=False
  )
  assert without_wall_clock(result) == without_wall_clock(finished[1])


@pytest.mark.slow
def test_other_text_to_train_on_leaves_what_is_evaluated(
  finished, config, tmp_path, capsys
):
  file = write_jsonl(tmp_path / "a.jsonl", [f"other text {i}\n" * 9 for i in range(20)])
  run = tmp_path / "run"
  changed = {"data.train_on": str(file), "train.num_steps": 8}
  result = train.fit(with_overrides(config, changed), run)
  assert "20 documents (0.0 MB) from 1 file(s) in " in capsys.readouterr().out
  for key in ("num_documents", "split"):
    assert result[key] == finished[1][key]
  count = lambda result: [x["count"] for x in result["depth_loss"]]  # noqa: E731
  assert count(result) == count(finished[1])
  first, other = (read_metrics(x, "train")[0]["loss"] for x in (finished[0], run))
  assert first != other
  data = json.loads((run / "run.json").read_text())["data"]
  assert (data["num_documents"], data["train_on"]["num_documents"]) == (24, 20)

  shutil.rmtree(run / "checkpoints/8")
  (run / "DONE").unlink()
  moved = {"data.train_on": str(shutil.copy(file, tmp_path / "moved.jsonl"))}
  again = train.fit(with_overrides(config, changed | moved), run, progress=False)
  assert without_wall_clock(again) == without_wall_clock(result)
  shutil.rmtree(run / "checkpoints/8")
  less = {"data.train_on": str(write_jsonl(tmp_path / "b.jsonl", ["other text\n"] * 9))}
  with pytest.raises(DataError, match=r"must be the corpus of the saved run.*train_on"):
    train.fit(with_overrides(config, changed | less), run, progress=False)


def test_a_bad_config_is_refused_before_the_folder_is_made(config, tmp_path):
  with pytest.raises(ConfigError, match=r"mtp\.weight must be"):
    train.fit(with_overrides(config, {"mtp.weight": -1.0}), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.fixture
def poison(monkeypatch):
  """A function that makes lambda, and so the loss, NaN at given steps.

  Whether every poisoned step left parameters and moments alone is noted in `kept`.
  """
  compiled_step = Run.compiled_step
  kept = []

  def install(steps):
    def poisoned(run, state, batch):
      program = compiled_step(run, state, batch)

      def step(state, batch, hyper, starts_interval):
        if int(state.step) not in steps:
          return program(state, batch, hyper, starts_interval)
        before = jax.device_get((state.params, state.opt_state))
        hyper = hyper._replace(mtp_weight=jnp.float32(np.nan))
        state, report = program(state, batch, hyper, starts_interval)
        after = jax.device_get((state.params, state.opt_state))
        kept.append(jax.tree.all(jax.tree.map(np.array_equal, before, after)))
        return state, report

      return step

    monkeypatch.setattr(Run, "compiled_step", poisoned)
    return kept

  return install


def test_nonfinite_steps_are_skipped_counted_and_not_saved(
  finished, config, tmp_path, poison
):
  kept = poison({3, 4, 5, 7})
  train.fit(config, tmp_path, progress=False)
  assert kept == [True] * 4
  records = read_metrics(tmp_path, "train")
  assert [x["nonfinite_steps"] for x in records] == [0, 3, 4, 4]
  # An interval without a step that counts has no loss, not a loss of 0.
  for key in ("loss_total", "grad_norm"):
    assert records[1][key] is None
  assert records[1]["loss"] == records[1]["accuracy"] == [None] * 3
  assert records[1]["count"] == [0.0] * 3
  assert records[2]["loss_total"] == pytest.approx(sum(records[2]["weighted_loss"]))
  assert records[2]["count"][0] < records[0]["count"][0]
  # Steps 4 and 8 ended a skipped update.
  assert finished_steps(tmp_path) == [12]


def finished_steps(workdir):
  reader = Checkpointer(workdir, read_only=True)
  steps = reader.steps()
  reader.close()
  return steps


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run(finished, config, tmp_path, poison):
  poison(range(5, 99))
  strict = with_overrides(config, {"train.max_nonfinite_steps": 4})
  with pytest.raises(Diverged) as error:
    train.fit(strict, tmp_path, progress=False)
  message = str(error.value)
  assert "not finite for 4 steps in a row (train.max_nonfinite_steps = 4)" in message
  assert "before step 9" in message
  assert f"Last good checkpoint: {tmp_path / 'checkpoints' / '4'}" in message
  assert finished_steps(tmp_path) == [4]
  assert not (tmp_path / "DONE").exists()


def test_divergence_from_the_start_names_no_checkpoint(
  finished, config, tmp_path, poison
):
  poison(range(99))
  strict = with_overrides(config, {"train.max_nonfinite_steps": 3})
  with pytest.raises(Diverged, match="none was saved yet"):
    train.fit(strict, tmp_path, progress=False)


@pytest.mark.slow
def test_a_huge_learning_rate_diverges(finished, config, tmp_path):
  huge = with_overrides(
    config, {"optimizer.learning_rate": 1e30, "train.max_nonfinite_steps": 2}
  )
  with pytest.raises(Diverged, match=r"Lower optimizer.learning_rate \(1e\+30\)"):
    train.fit(huge, tmp_path, progress=False)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_the_run(
  finished, config, copy, monkeypatch
):
  def full(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", full)
  with pytest.raises(CheckpointError, match=r"No space left on device.*steps \[8\]"):
    train.fit(config, copy, progress=False)
  monkeypatch.undo()
  result = train.fit(config, copy, progress=False)
  assert without_wall_clock(result) == without_wall_clock(finished[1])


@pytest.mark.slow
def test_a_damaged_checkpoint_is_reported_and_training_goes_on(finished, config, copy):
  shutil.copytree(copy / "checkpoints" / "8", copy / "checkpoints" / "10")
  (copy / "checkpoints" / "10" / "meta" / "metadata").write_text("{}")
  with pytest.warns(UserWarning, match="checkpoints/10 is damaged"):
    result = train.fit(config, copy, progress=False)
  assert without_wall_clock(result) == without_wall_clock(finished[1])


@pytest.mark.slow
def test_lines_and_time_left_where_there_is_no_terminal(
  finished, config, tmp_path, capsys
):
  train.fit(with_overrides(config, {"train.num_steps": 6}), tmp_path)
  corpus, start, first, second, done = capsys.readouterr().out.splitlines()
  assert corpus.startswith("tiny: 24 documents ")
  record = json.loads((tmp_path / "startup.json").read_text())
  assert record["step"] == 0
  assert list(record["seconds"]) == [
    "devices", "data", "state", "compile", "first step"
  ]
  assert record["total"] == pytest.approx(sum(record["seconds"].values()))
  assert all(x > 0 for x in record["seconds"].values())
  assert start.startswith(f"tiny: first step after {record['total']:.1f} s: devices ")
  assert first.startswith("tiny: 3 of 6 steps, loss ")
  assert first.endswith(" s left")
  assert second.endswith(" tokens/s, 0 s left")
  assert done.startswith("tiny: done: main loss ")


def test_a_run_that_is_done_is_left_alone(
  config, finished, tmp_path, monkeypatch, capsys
):
  workdir, expected = finished
  copied = shutil.copytree(workdir, tmp_path / "run")
  times = lambda: {x: x.stat().st_mtime_ns for x in copied.rglob("*")}  # noqa: E731
  before = times()
  with monkeypatch.context() as patch:
    patch.setattr(train, "Run", None)
    assert train.fit(config, copied) == expected
  assert times() == before
  loss = expected["main_loss"]["mean"]
  assert f"tiny: done before: main loss {loss:.4f} nats" in capsys.readouterr().out
  # What may be different is measured.
  other = train.fit(with_overrides(config, {"eval.num_rows": 4}), copied)
  assert other["depth_loss"][0]["count"] < expected["depth_loss"][0]["count"]


def collect_garbage(function):
  """Sends a signal amid a callback to the garbage collector, where raising is lost."""

  def callback(phase, _):
    if phase == "start":
      gc.callbacks.remove(callback)
      signal.raise_signal(signal.SIGTERM)

  def collect_and_call(*args, **kwargs):
    gc.callbacks.append(callback)
    gc.collect()
    return function(*args, **kwargs)

  return collect_and_call


def signal_itself(function):
  """Sends a signal, then calls `function`."""

  def signal_and_call(*args, **kwargs):
    signal.raise_signal(signal.SIGTERM)
    return function(*args, **kwargs)

  return signal_and_call


# Where a signal hits, in the order of a run, and what is done by then.
PLACES = [
  (Observer, "stepped", collect_garbage, 1),
  (records, "validation_record", collect_garbage, 6),
  (records, "diagnostics_record", signal_itself, 7),
  (Run, "save", signal_itself, 9),
  (records, "final_evaluation", signal_itself, 12),
  (evaluate, "put_batch", collect_garbage, 12),
  (generative_metrics, "line_prompts", signal_itself, 12),
  (generative_metrics, "function_prompts", collect_garbage, 12),
  (Checkpointer, "wait", signal_itself, 12),
]


@pytest.mark.slow
def test_a_signal_is_answered_wherever_it_hits_and_the_run_goes_on(
  finished, config, tmp_path, monkeypatch, capfd
):
  before = signal.getsignal(signal.SIGTERM)
  for owner, name, how, step in PLACES:
    with monkeypatch.context() as patch:
      patch.setattr(owner, name, how(getattr(owner, name)))
      with pytest.raises(Interrupted, match=f"^SIGTERM at step {step};") as caught:
        train.fit(config, tmp_path, progress=False)
    assert caught.value.signum == signal.SIGTERM
    assert not (tmp_path / "eval.json").exists() and not (tmp_path / "DONE").exists()
  assert signal.getsignal(signal.SIGTERM) is before
  assert "Exception ignored" not in capfd.readouterr().err

  workdir, expected = finished
  result = train.fit(config, tmp_path, progress=False)
  assert without_wall_clock(result) == without_wall_clock(expected)
  found, wanted = (
    [without_wall_clock(record) for record in read_metrics(folder)]
    for folder in (tmp_path, workdir)
  )
  assert found == wanted
  assert fingerprint_of(tmp_path) == fingerprint_of(workdir)


class AtOnce(BaseException):
  """Raised by the handler of a command."""


def raise_at_once(signum, frame):
  raise AtOnce


@pytest.mark.parametrize("owner, name", [
  (run_module, "load_corpus"), (Run, "start"), (Run, "compiled_step"),
])
def test_a_signal_before_there_is_work_to_save_is_for_the_caller(
  config, tmp_path, monkeypatch, owner, name
):
  before = signal.signal(signal.SIGTERM, raise_at_once)
  monkeypatch.setattr(owner, name, signal_itself(getattr(owner, name)))
  try:
    with pytest.raises(AtOnce):
      train.fit(config, tmp_path, progress=False)
    assert signal.getsignal(signal.SIGTERM) is raise_at_once
  finally:
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.parametrize("whole, of, call, step", [
  ("finished", "config", 0, 6),
  ("stopped", "stopping", 6, 8),  # The validation that would end training.
])
def test_a_signal_cuts_a_validation_short_and_the_next_start_makes_up_for_it(
  request, tmp_path, monkeypatch, whole, of, call, step
):
  (workdir, expected), config = map(request.getfixturevalue, (whole, of))
  put_batch, calls = evaluate.put_batch, iter(range(99))

  def signal_at_call(*args, **kwargs):  # Every validation has two batches.
    if next(calls) == call:
      signal.raise_signal(signal.SIGTERM)
    return put_batch(*args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(evaluate, "put_batch", signal_at_call)
    with pytest.raises(Interrupted, match=f"^SIGTERM at step {step};"):
      train.fit(config, tmp_path, progress=False)
  assert next(calls) == call + 1, "the second batch was not measured"
  assert step not in logged_steps(tmp_path) + logged_steps(tmp_path, "train")
  assert finished_steps(tmp_path)[-1] == step
  # Twice: what makes up for the validation may be cut short as well.
  with monkeypatch.context() as patch:
    patch.setattr(evaluate, "summarize", signal_itself(evaluate.summarize))
    before = signal.signal(signal.SIGTERM, raise_at_once)
    with pytest.raises(AtOnce):
      train.fit(config, tmp_path, progress=False)
    signal.signal(signal.SIGTERM, before)
  result = train.fit(config, tmp_path, progress=False)
  assert without_wall_clock(result) == without_wall_clock(expected)
  assert records_until(tmp_path, 12) == records_until(workdir, 12)
  assert fingerprint_of(tmp_path) == fingerprint_of(workdir)
  assert train.evaluate_run(config, tmp_path)["stopped"] == expected["stopped"]


def fingerprint_of(workdir):
  reader = Checkpointer(workdir, read_only=True)
  meta = reader.meta(reader.steps()[-1])
  reader.close()
  return meta["fingerprint"]


@pytest.mark.usefixtures("sigint_raises")
def test_a_second_signal_acts_as_ever():
  with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
    interrupt.catch()
    os.kill(os.getpid(), signal.SIGINT)
    assert interrupt.received() == signal.SIGINT
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


def test_outside_the_main_thread_nothing_is_caught():
  before = signal.getsignal(signal.SIGTERM)
  seen = []

  def work():
    with Interrupt() as interrupt:
      interrupt.catch()
      seen.append((signal.getsignal(signal.SIGTERM), interrupt.received()))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert seen == [(before, None)]
