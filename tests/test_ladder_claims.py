"""Siblings, look-ahead and the tax: planted effects get the planted verdict."""

import importlib
import itertools
import math
import re

import matplotlib
import numpy as np
import pandas as pd
import pytest

from mtp_jax.analysis import tax_and_gain
from mtp_jax.analysis.claims import arms
from mtp_jax.analysis.claims.claim import (
  EQUIVALENT,
  NOT_RUN,
  OPPOSITE,
  SUPPORTED,
  UNDECIDED,
)
from mtp_jax.analysis.claims.table import experiments
from mtp_jax.analysis.drawing import STYLE, WIDEST
from mtp_jax.analysis.findings import write_findings
from mtp_jax.config import flatten
from tests import result_tables as worlds
from tests.result_tables import NTP, ONE_MODULE, TWO

EXPERIMENTS = {x.folder: x for x in experiments()}
SIZES = {8: 10_000, 32: 100_000, 128: 1_000_000}
WIDTHS = tuple(SIZES)


def judge(folder, key):
  experiment = EXPERIMENTS[folder.name]
  claim = next(x for x in experiment.claims if x.key == key)
  finding = claim.judge(experiment.read(folder))
  return claim.verdict(finding), finding


def decades(width):
  """Decades of parameters above the smallest size."""
  return math.log10(SIZES[width] / SIZES[8])


def siblings(folder, slope=0.02, endless=-0.02, noise=0.004, seeds=10, shift=0.0):
  """The gain in loss: `shift` plus a slope on repeated data, another on endless data.

  Shares gain 0.1 at every size. Both kinds of record are best at step 20, where the
  validation loss is lowest, and worse by 0.3 at step 40.
  """
  trials = worlds.grid(
    (NTP, TWO), range(seeds), trunk__embed_dim=WIDTHS, task__num_train=(1000, 3000, 0),
    task__siblings__num_children=(100,),
  )
  for trial in trials:
    trial |= {"size": SIZES[trial["trunk.embed_dim"]], "mtp.weight": 1.0}

  def curve(trial, rng):
    size = decades(trial["trunk.embed_dim"])
    is_two = trial["mtp.depth"] == 1
    per_decade = slope if trial["task.num_train"] else endless
    gain = is_two * (shift + per_decade * size)
    for step, split in itertools.product((10, 20, 40), ("validation", "test")):
      wrong = abs(step - 20) / 20 * 0.3
      yield {
        "split": split, "step": step,
        "loss": 2.5 - gain + wrong + 0.1 * trial["seed"] + rng.normal(0, noise),
        "task_accuracy": 0.6 + 0.1 * is_two + rng.normal(0, 0.01),
        "task_new": 0.3 - 0.1 * is_two + rng.normal(0, 0.01),
      }

  return worlds.write_results(folder, trials, lambda *_: {}, curve=curve)


@pytest.mark.parametrize(
  "world, verdicts",
  [
    ({}, {
      "loss_gains": SUPPORTED, "loss_grows": SUPPORTED, "loss_grows_last": SUPPORTED,
      "loss_shrinks_endless": SUPPORTED, "regimes_part": SUPPORTED,
      "capacity_over_data": UNDECIDED,  # The gain was planted equal at both sizes.
      "coherent_gains": SUPPORTED, "coherent_grows": EQUIVALENT,
      "new_gains": OPPOSITE, "new_grows": EQUIVALENT,
    }),
    ({"slope": -0.02, "endless": 0.02}, {
      "loss_gains": OPPOSITE, "loss_grows": OPPOSITE, "loss_grows_last": OPPOSITE,
      "loss_shrinks_endless": OPPOSITE, "regimes_part": OPPOSITE,
    }),
    ({"slope": 0.001, "endless": 0.0, "noise": 0.002}, {
      "loss_gains": EQUIVALENT, "loss_grows": EQUIVALENT,
      "loss_shrinks_endless": EQUIVALENT, "regimes_part": EQUIVALENT,
    }),
    ({"slope": 0.01, "endless": -0.01, "noise": 0.1}, {
      "loss_grows": UNDECIDED, "loss_shrinks_endless": UNDECIDED,
      "regimes_part": UNDECIDED,
    }),
    ({"seeds": 1}, {"loss_grows": UNDECIDED}),
  ],
  ids=["planted", "reversed", "nil", "noisy", "one seed"],
)
def test_siblings(tmp_path, world, verdicts):
  folder = siblings(tmp_path / "siblings_cpu", **world)
  found = {key: judge(folder, key)[0] for key in verdicts}
  assert found == verdicts


def test_siblings_are_read_on_test_at_the_best_validation_step(tmp_path):
  folder = siblings(tmp_path / "siblings_cpu", noise=0.0)
  curves = pd.read_csv(folder / "curves.csv")
  is_test = curves["split"] == "test"
  curves.loc[is_test, "loss"] += 1.0 * (curves["step"] == 20)  # Only test is worse.
  curves.to_csv(folder / "curves.csv", index=False)
  results = EXPERIMENTS["siblings_cpu"].read(folder)
  losses = {
    moment: arms.at_moment(results, "loss", moment, "min")["trial0"]
    for moment in ("best", "last")
  }
  assert losses == pytest.approx({"best": 2.5 + 1.0, "last": 2.5 + 0.3})


def test_siblings_by_cell_and_by_data_set(tmp_path):
  folder = siblings(tmp_path / "siblings_cpu")
  experiment = EXPERIMENTS["siblings_cpu"]
  rows = experiment.table(experiment.read(folder)).set_index(
    ["score", "step", "examples", "size"]
  )
  cell = rows.loc[("loss", "best", 1000, 1_000_000)]
  assert (cell["seeds"], cell["verdict"]) == (10, SUPPORTED)
  assert cell["mean"] == pytest.approx(0.04, abs=0.006)
  assert rows.loc[("loss", "best", 1000, 10_000), "verdict"] == EQUIVALENT
  assert rows.loc[("loss", "best", 3000, ""), "verdict"] == SUPPORTED  # Its slope.
  assert rows.loc[("loss", "best", "endless", ""), "mean"] < -0.015


def test_capacity_over_data(tmp_path):
  """The gain grows with size and falls with data, by as much."""
  trials = worlds.grid(
    (NTP, TWO), range(10), trunk__embed_dim=WIDTHS, task__num_train=(300, 1000, 10000),
    task__siblings__num_children=(40, 100),
  )
  for trial in trials:
    trial |= {"size": SIZES[trial["trunk.embed_dim"]], "mtp.weight": 1.0}

  def curve(trial, rng):
    data = math.log10(trial["task.num_train"] / 1000)
    gain = 0.02 * (decades(trial["trunk.embed_dim"]) - data)
    loss = 2.0 - gain * trial["mtp.depth"] + rng.normal(0, 0.003)
    for split in ("validation", "test"):
      yield {"split": split, "step": 9, "loss": loss, "task_accuracy": 0.5}

  folder = worlds.write_results(
    tmp_path / "siblings_gpu", trials, lambda *_: {}, curve=curve
  )
  verdict, finding = judge(folder, "capacity_over_data")
  assert verdict == SUPPORTED
  assert [x.mean for x in finding.estimates] == pytest.approx([0.02] * 2, abs=0.004)


def test_a_partly_finished_sweep_says_how_precise_it_is(tmp_path):
  folder = siblings(tmp_path / "siblings_cpu")
  trials = pd.read_csv(folder / "trials.csv")
  late = (trials["seed"] >= 4) & (trials["trunk.embed_dim"] == 128)
  trials.loc[late, "status"] = "unfinished"
  trials.to_csv(folder / "trials.csv", index=False)
  verdict, finding = judge(folder, "loss_grows")
  assert (verdict, finding.seeds) == (SUPPORTED, 4)
  assert "3 sizes, 6 cells of 4 to 10 seeds, sd of a gain 0.00" in finding.note


def test_tuning_seeds_are_left_out(tmp_path):
  """Seeds 0 and 1 tried three rates, the others the one that was chosen."""
  rates = [(seed, rate) for seed in (0, 1) for rate in (0.1, 0.2, 0.4)]
  rates += [(seed, 0.2) for seed in range(2, 7)]
  rows = pd.DataFrame(rates, columns=["seed", "optimizer.learning_rate"])
  kept = arms.reported(rows.assign(size=1), ["size"])
  assert list(kept["seed"]) == [2, 3, 4, 5, 6]
  assert set(kept["optimizer.learning_rate"]) == {0.2}
  assert arms.reported(rows[:6].assign(size=1), ["size"]).empty


ADDED, SHORTENED = {"mtp.arm": "added"}, {"mtp.arm": "shortened"}


def look_ahead(folder, factor, slope=1.0, noise=0.2, solves=True, seeds=10):
  """NTP solves at 2M tokens; n = 2 `factor` sooner, times `slope` a decade."""
  trials = []
  for width, layers in [*((w, 4) for w in WIDTHS), *((32, x) for x in (1, 2))]:
    for methods, arm in (((NTP, TWO), ADDED), ((TWO,), SHORTENED)):
      for trial in worlds.grid(methods, range(seeds), trunk__embed_dim=[width]):
        size = SIZES[width] + (0 if layers == 4 else layers)
        trials.append(trial | arm | {"trunk.num_layers": layers, "size": size})

  horizon = 10e6
  for index, trial in enumerate(trials):
    rng = np.random.default_rng(index)
    sooner = factor * slope ** decades(trial["trunk.embed_dim"])
    if trial["trunk.num_layers"] <= 2:
      sooner = 1.0
    if trial["mtp.arm"] == "shortened":
      sooner = 0.5
    time = 2e6 * rng.lognormal(0, noise) / (sooner if trial["mtp.depth"] else 1)
    is_stuck = not solves or (noise and time > horizon)
    trial |= {"stopped_tokens": None if is_stuck else time}
    trial |= {"tokens": horizon if is_stuck else time}

  shared = {"task.star_graph.arms": 2, "task.star_graph.length": 3}
  return worlds.write_results(folder, trials, lambda *_: {}, shared)


@pytest.mark.parametrize(
  "world, verdicts",
  [
    (dict(factor=3.0, slope=2.0), {
      "n2_sooner": SUPPORTED, "n2_grows": SUPPORTED, "n2_crosses": OPPOSITE,
      "shallow_none": EQUIVALENT, "shortened_costs": SUPPORTED,
      "n4_sooner": "not yet run",
    }),
    (dict(factor=3.0, slope=0.5, noise=0.1), {
      "n2_sooner": SUPPORTED, "n2_grows": OPPOSITE,
    }),
    (dict(factor=0.4, slope=3.0, noise=0.1), {
      "n2_grows": SUPPORTED, "n2_crosses": SUPPORTED,
    }),
    (dict(factor=3.0, slope=1.0, noise=0.1), {
      "n2_sooner": SUPPORTED, "n2_grows": EQUIVALENT, "n2_crosses": OPPOSITE,
    }),
    (dict(factor=1.5, noise=1.2), {"n2_grows": UNDECIDED}),
    # Nobody solves it: nothing is known, and nothing is "equivalent".
    (dict(factor=3.0, solves=False), {
      "n2_sooner": "not yet run", "n2_grows": "not yet run",
    }),
  ],
  ids=["grows", "shrinks", "crosses", "flat", "noisy", "unsolved"],
)
def test_look_ahead(tmp_path, world, verdicts):
  folder = look_ahead(tmp_path / "look_ahead_cpu", **world)
  assert {key: judge(folder, key)[0] for key in verdicts} == verdicts


def test_look_ahead_is_censored_and_says_who_solved(tmp_path):
  folder = look_ahead(tmp_path / "look_ahead_cpu", factor=3.0, noise=2.0)
  _, finding = judge(folder, "n2_sooner")
  assert "solved by NTP and by n = 2: 10k " in finding.note
  experiment = EXPERIMENTS["look_ahead_cpu"]
  rows = experiment.table(experiment.read(folder))
  width = rows[(rows["ladder"] == "width") & (rows["method"] == "n = 2")]
  assert list(width["width"]) == list(WIDTHS)
  assert (width["solved by NTP"] < 1).any()


def tax(folder, power=-0.3, scale=0.1, d1=0.0, repeated=-0.05, noise=0.003, seeds=5):
  """A tax of n = 2 that falls with size as a power, and a gain on repeated text."""
  trials = worlds.grid(
    (NTP, TWO, ("parallel", 3), ONE_MODULE), range(seeds), trunk__embed_dim=WIDTHS,
    data__test_fraction=(0.05, 0.95),
  )
  for trial in trials:
    trial |= {
      "size": SIZES[trial["trunk.embed_dim"]],
      "mtp.weight": 0.3 if trial["mtp.kind"] in ("none", "sequential") else 1.0,
    }

  def measure(trial, rng):
    cost = scale * 10 ** (power * decades(trial["trunk.embed_dim"]))
    if trial["data.test_fraction"] > 0.5:
      cost = repeated
    cost *= {("none", 0): 0, ("parallel", 1): 1, ("parallel", 3): 2}.get(
      (trial["mtp.kind"], trial["mtp.depth"]), 0
    )
    cost += d1 * (trial["mtp.kind"] == "sequential")
    loss = 2.0 + cost + 0.1 * trial["seed"] + rng.normal(0, noise)
    return {("main_loss", 0): loss}

  return worlds.write_results(folder, trials, measure)


@pytest.mark.parametrize(
  "world, verdicts",
  [
    ({}, {
      "n2_costs": SUPPORTED, "n4_costs": SUPPORTED, "n2_falls": SUPPORTED,
      "n2_repeated_last": SUPPORTED, "n2_regimes": SUPPORTED, "d1_nil": EQUIVALENT,
      "n2_repeated_best": "not yet run",  # No records of the test split.
    }),
    (dict(power=0.3, scale=0.05, repeated=0.05, d1=0.05), {
      "n2_costs": SUPPORTED, "n2_falls": OPPOSITE, "n2_repeated_last": OPPOSITE,
      "d1_nil": OPPOSITE,
    }),
    (dict(power=0.0, noise=0.001, seeds=10), {"n2_falls": EQUIVALENT}),
    (dict(scale=0.01, noise=0.02), {
      "n2_costs": UNDECIDED, "n2_falls": UNDECIDED, "d1_nil": UNDECIDED,
    }),
    (dict(scale=-0.05), {"n2_costs": OPPOSITE, "n2_falls": UNDECIDED}),
  ],
  ids=["falls", "rises", "flat", "noisy", "a gain"],
)
def test_tax(tmp_path, world, verdicts):
  folder = tax(tmp_path / "tax_cpu", **world)
  assert {key: judge(folder, key)[0] for key in verdicts} == verdicts


def test_the_page_of_tax_and_gain(tmp_path):
  kept = tmp_path / "results"
  tax(kept / "tax_cpu")
  siblings(kept / "siblings_cpu", seeds=3)
  look_ahead(kept / "look_ahead_cpu", factor=3.0, seeds=3)
  report = write_findings(kept, tmp_path / "page", "make findings")
  names = {path.name for path in report.paths}
  assert {"tax_and_gain.png", "tax_and_gain.csv", "siblings_cpu_table.csv"} <= names
  text = (tmp_path / "page" / "findings.md").read_text()
  places = [text.index(x) for x in ("**Supported**", "](tax_and_gain.png)", "## Each")]
  assert places == sorted(places)
  numbers = pd.read_csv(tmp_path / "page" / "tax_and_gain.csv")
  assert set(numbers["shown"]) == {"tax", "siblings", "look_ahead"}
  ours = numbers[numbers["source"] == "measured here"].set_index(
    ["shown", "series", "size"]
  )["mean"]
  n2 = "parallel n = 2, weight 1"
  assert ours["tax", f"{n2}, fresh", 10_000] == pytest.approx(0.1, abs=0.01)
  assert ours["tax", f"{n2}, repeated", 10_000] == pytest.approx(-0.05, abs=0.01)
  far = numbers[numbers["source"] == "extrapolated"]
  assert far["size"].max() == pytest.approx(1.3e9)  # Of the tax only.
  assert set(far["shown"]) == {"tax"}
  caption = tax_and_gain.caption(numbers)
  assert f"![{caption}](tax_and_gain.png)" in text
  assert all(words in caption for words in ("Tax:", "Dotted:", "Gain:"))


def test_published_points_are_hollow_and_named_as_not_fitted(tmp_path):
  experiment = EXPERIMENTS["tax_cpu"]
  results = {"tax": experiment.read(tax(tmp_path / "tax_cpu"))}
  with matplotlib.rc_context(STYLE):
    figure, numbers = tax_and_gain.draw(tax_and_gain.of_results(results))
    assert worlds.clipped_texts(figure) == []
  (ax,) = figure.axes
  published = [
    box for box in ax.containers if box.get_label().startswith("published, not fitted")
  ]
  assert len(published) == numbers["source"].str.contains(
    "TOP|DeepSeek|golf|mmiovski", na=False
  ).groupby(numbers["source"]).any().sum()
  assert all(box[0].get_markerfacecolor() == "white" for box in published)
  assert tax_and_gain.draw([]) is None


def test_the_page_of_tax_and_gain_shows_what_has_pairs(tmp_path):
  """Without the tax, and with star graphs that nobody has solved yet."""
  unsolved = look_ahead(tmp_path / "look_ahead_cpu", 3.0, solves=False, seeds=2)
  kept = {
    "siblings": EXPERIMENTS["siblings_cpu"].read(
      siblings(tmp_path / "siblings_cpu", seeds=2)
    ),
    "look_ahead": EXPERIMENTS["look_ahead_cpu"].read(unsolved),
  }
  figure, numbers = tax_and_gain.draw(tax_and_gain.of_results(kept))
  assert [ax.get_title() for ax in figure.axes] == ["Gain on siblings"]
  assert set(numbers["shown"]) == {"siblings"}
  assert tax_and_gain.caption(numbers).endswith("Gain: above 0 the extra losses pay.")
  assert "Tax:" not in tax_and_gain.caption(numbers)
  del kept["siblings"]
  assert tax_and_gain.of_results(kept) == []


@pytest.mark.parametrize(
  "world, words",
  [
    ({}, "fresh raised the next-token loss (less in larger models)"),
    (dict(scale=-0.05, power=0.3), "fresh lowered the next-token loss (more in larger"),
    (dict(scale=0.0), "changed the next-token loss by less than 0.01 nats (the same at "
                      "every size)"),
    (
      dict(noise=2.0),
      "showed no effect on the next-token loss (undecided whether larger models differ",
    ),
    (dict(seeds=1), "fresh raised the next-token loss (one seed, so without an "),
  ],
  ids=["costs", "gains", "equal", "noisy", "one seed"],
)
def test_the_sentence_follows_from_the_numbers(tmp_path, world, words):
  kept = EXPERIMENTS["tax_cpu"].read(tax(tmp_path / "tax_cpu", **world))
  sentence = tax_and_gain.sentence(tax_and_gain.of_results({"tax": kept}))
  assert sentence.startswith("On text at 10k to 1M parameters ")
  assert words in sentence and sentence.endswith(".")


def test_the_sentence_has_the_gain_and_its_trend(tmp_path):
  kept = EXPERIMENTS["siblings_cpu"].read(
    siblings(tmp_path / "siblings_cpu", shift=0.02)
  )
  panels = tax_and_gain.of_results({"siblings": kept})
  assert re.fullmatch(
    r"On siblings at 10k to 1M parameters n = 2 on repeated examples lowered the "
    r"next-token loss by 0.0\d+ nats \[0.0\d+, 0.0\d+\] \(more in larger models: "
    r"\+0.0\d+ \[\+0.0\d+, \+0.0\d+\] per tenfold\), n = 2 on endless examples .* "
    r"\(less in larger models: .*\)\.",
    tax_and_gain.sentence(panels),
  )


def test_a_data_set_looks_the_same_for_every_score(tmp_path):
  folder = siblings(tmp_path / "siblings_cpu", seeds=2)
  curves = pd.read_csv(folder / "curves.csv")
  trials = pd.read_csv(folder / "trials.csv").set_index("trial")
  endless = curves["trial"].map(trials["task.num_train"]) == 0
  curves.loc[endless, "task_new"] = np.nan  # All is new there: it is not measured.
  curves.to_csv(folder / "curves.csv", index=False)
  figure, _ = EXPERIMENTS["siblings_cpu"].draw(EXPERIMENTS["siblings_cpu"].read(folder))
  looks = [
    {box.get_label(): box[0].get_color() for box in ax.containers}
    for ax in figure.axes
  ]
  assert [len(x) for x in looks] == [3, 3, 2]
  assert looks[2].items() <= looks[0].items()


@pytest.mark.parametrize(
  "write", [siblings, lambda x: look_ahead(x, factor=3.0), tax],
  ids=["siblings", "look_ahead", "tax"],
)
def test_each_ladder_has_its_picture(tmp_path, write, request):
  name = f"{request.node.callspec.id}_cpu"
  experiment = EXPERIMENTS[name]
  kept = experiment.read(write(tmp_path / name))
  with matplotlib.rc_context(STYLE):
    figure, numbers = experiment.draw(kept)
    assert worlds.clipped_texts(figure) == []
  assert figure.get_figwidth() <= WIDEST
  assert all(ax.has_data() for ax in figure.axes) and len(numbers)


def swept(folder, name, is_kept):
  """Writes results of the trials that `experiments/NAME.py:cpu` really plans.

  Those that `is_kept` does not choose, by index and trial, are unfinished. n = 2 gains,
  in every score; a star graph is solved early by every other trial.
  """
  module = importlib.import_module(f"experiments.{name}")
  shared = flatten(module.get_config("cpu").to_dict())
  points = list(module.sweep("cpu"))
  keys = set().union(*points) - {"name"}
  trials = [
    {key: point.get(key, shared[key]) for key in {*keys, "trunk.num_layers"}}
    for point in points
  ]
  for index, trial in enumerate(trials):
    time = 1e6 * (1 + index % 7) if index % 2 else None
    trial |= {
      "size": trial["trunk.embed_dim"] ** 2 * trial["trunk.num_layers"],
      "status": "finished" if is_kept(index, trial) else "unfinished",
      "tokens": time or 8e6, "stopped_tokens": time,
    }

  def loss(trial, rng):
    return 2.0 - 0.03 * (trial["mtp.depth"] > 0) + rng.normal(0, 0.003)

  def curve(trial, rng):
    for split in ("validation", "test"):
      share = 0.5 + 0.1 * trial["mtp.depth"] + rng.normal(0, 0.003)
      yield {
        "split": split, "step": 9, "loss": loss(trial, rng), "task_accuracy": share,
        "task_new": share,
      }

  return worlds.write_results(
    folder, trials, lambda *x: {("main_loss", 0): loss(*x)}, shared, curve=curve
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "is_kept",
  [
    lambda index, trial: trial["seed"] < 5 and index % 11 > 1,
    lambda index, trial: trial["seed"] == 0 and index < 3,
    lambda index, trial: trial["mtp.kind"] == "none",
  ],
  ids=["half, with holes", "three trials", "NTP only"],
)
def test_the_planned_sweeps_have_verdicts_at_any_stage(tmp_path, is_kept):
  for name in ("siblings", "look_ahead", "tax"):
    swept(tmp_path / "kept" / f"{name}_cpu", name, is_kept)
  report = write_findings(tmp_path / "kept", tmp_path / "page")
  texts = [report.text, (tmp_path / "page" / "findings.md").read_text()]
  assert not any(re.search(r"\bnan\b", text) for text in texts)
  rows = pd.read_csv(tmp_path / "page" / "findings.csv")
  rows = rows[rows["experiment"].isin(["siblings_cpu", "look_ahead_cpu", "tax_cpu"])]
  siblings = rows[rows["experiment"] == "siblings_cpu"]
  if is_kept(13, {"seed": 4, "mtp.kind": "parallel"}):
    assert set(siblings["seeds"]) <= {2, 3, 4, 5}
    assert (siblings["verdict"] == SUPPORTED).sum() >= 3
  else:
    assert set(rows["verdict"]) <= {UNDECIDED, NOT_RUN}
