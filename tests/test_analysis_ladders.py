"""Trials are grouped by what varies; the learning rate used is chosen by rule."""

import dataclasses

import pytest

from mtp_jax.analysis.ladders import (
  NTP,
  arrange,
  canonical,
  method_labels,
  settings_that_scale,
  size_text,
)
from mtp_jax.analysis.runs import load
from tests.common import tiny_config
from tests.synthetic_runs import World, trial_config, write_trial

WORLD = World(gain={})


def arranged(root, configs):
  for number, config in enumerate(configs):
    write_trial(root, WORLD, config, name=f"trial{number}")
  runs = load(root)
  return arrange(runs).set_index("trial").sort_index()


def mtp(kind="none", depth=0, **changes):
  return changed(tiny_config(kind, depth), **changes)


def changed(config, **changes):
  return dataclasses.replace(config, mtp=dataclasses.replace(config.mtp, **changes))


def test_values_without_effect_do_not_make_methods():
  assert canonical(mtp(weight=0.1)) == canonical(mtp(weight=0.9, schedule="linear"))
  assert canonical(mtp("sequential", 0)) == canonical(mtp())
  a, b = (mtp("sequential", 1, schedule_fraction=x) for x in (0.2, 0.7))
  assert canonical(a) == canonical(b)
  a, b = (changed(x, schedule="piecewise") for x in (a, b))
  assert canonical(a) != canonical(b)
  a, b = (mtp("sequential", 1, hidden=x) for x in ("chained", "trunk"))
  assert canonical(a) == canonical(b)
  a, b = (changed(x, depth=2) for x in (a, b))
  assert canonical(a) != canonical(b)
  longer = mtp("sequential", 1, arm="flops")
  assert canonical(longer) == canonical(changed(longer, fed="none"))
  assert canonical(longer) != canonical(changed(longer, fed="own"))
  assert canonical(longer) == canonical(changed(longer, weight=0.9))


def test_labels_say_what_varies_within_a_kind():
  methods = [
    mtp(),
    mtp("parallel", 3),
    mtp("sequential", 1, weight=0.1),
    mtp("sequential", 1, weight=1.0),
    mtp("sequential", 1, arm="flops"),
    mtp("sequential", 1, arm="flops", fed="own"),
  ]
  labels = method_labels([canonical(m) for m in methods])
  assert list(labels.values()) == [
    "parallel D=3", "sequential D=1 λ=0.1", "sequential D=1 λ=1", NTP,
    "NTP at FLOPs of sequential D=1", "NTP at FLOPs of sequential D=1 fed=own",
  ]


def test_steps_that_follow_the_size_keep_one_ladder(tmp_path):
  configs = [
    trial_config(width, overrides={"train.num_steps": 10 * width}) for width in (16, 32)
  ]
  trials = arranged(tmp_path, configs)
  assert set(trials["ladder"]) == {""}
  scaled = settings_that_scale(trials)
  assert list(scaled["train.num_steps"]) == [160, 320]
  assert list(scaled["trunk.embed_dim"]) == [16, 32]


def test_steps_that_vary_within_a_size_make_ladders(tmp_path):
  configs = [
    trial_config(16, overrides={"train.num_steps": steps}) for steps in (100, 200)
  ]
  trials = arranged(tmp_path, configs)
  assert list(trials["ladder"]) == ["train.num_steps=100", "train.num_steps=200"]


def test_other_text_makes_another_ladder_and_speed_settings_do_not(tmp_path):
  configs = [
    trial_config(16),
    trial_config(16, seed=1, overrides={"trunk.remat": "full", "mesh.data": -1}),
    trial_config(32, overrides={"data.source": "site_packages"}),
  ]
  trials = arranged(tmp_path, configs)
  assert list(trials["ladder"]) == [
    "data.source=stdlib", "data.source=stdlib", "data.source=site_packages",
  ]


def test_a_source_is_named_once_and_others_settings_are_not(tmp_path):
  """A text and a task differ in more than their names; only what varies is said."""
  task = {
    "data.source": "siblings", "tokenizer.kind": "symbols", "tokenizer.vocab_size": 544,
    "data.seq_len": 14,
  }
  configs = [trial_config(16)] + [
    trial_config(16, overrides=task | {"task.num_train": n}) for n in (1000, 3000)
  ]
  trials = arranged(tmp_path, configs)
  assert list(trials["ladder"]) == [
    "data.source=stdlib",
    "data.source=siblings, task.num_train=1000",
    "data.source=siblings, task.num_train=3000",
  ]


def test_each_method_may_have_a_weight_decay_of_its_own(tmp_path):
  decays = (("none", 0, 1.0), ("parallel", 1, 0.1), ("parallel", 1, 3.0))
  configs = [
    trial_config(16, kind, depth, overrides={"optimizer.weight_decay": decay})
    for kind, depth, decay in decays
  ]
  trials = arranged(tmp_path, configs)
  assert set(trials["ladder"]) == {""} and set(trials["copy"]) == {""}
  assert sorted(trials["chosen"]) == [False, True, True]  # One of the two is a check.


def test_trunks_of_other_runs_follow_the_seed(tmp_path):
  sources = ("", "runs/seed=0", "runs/seed=1")
  configs = [
    trial_config(16, "medusa", 3, seed=i, overrides={"train.trunk_from": source})
    for i, source in enumerate(sources)
  ]
  trials = arranged(tmp_path, configs)
  assert list(trials["ladder"]) == [
    "train.trunk_from=False", "train.trunk_from=True", "train.trunk_from=True",
  ]


def test_size_is_that_of_the_ntp_model(tmp_path):
  configs = [
    trial_config(16),
    trial_config(16, "parallel", 3),
    trial_config(16, "parallel", 3, overrides={"mtp.arm": "shortened"}),
    trial_config(16, "sequential", 2, overrides={"mtp.arm": "flops"}),
  ]
  trials = arranged(tmp_path, configs)
  assert trials["size"].nunique() == 1
  assert trials.loc["trial1", "total"] > trials.loc["trial0", "total"]
  assert trials.loc["trial2", "total"] == trials.loc["trial0", "total"]
  assert trials.loc["trial2", "deployed"] < trials.loc["trial0", "deployed"]
  assert trials.loc["trial3", "total"] == trials.loc["trial0", "total"]
  assert trials.loc["trial3", "num_steps"] > 100


def test_the_rate_with_most_seeds_is_chosen(tmp_path):
  # The better rate has one seed only: it is a check, not the main comparison.
  configs = [trial_config(16, seed=s, rate=2e-3) for s in (0, 1)]
  configs.append(trial_config(16, seed=0, rate=1e-3))
  trials = arranged(tmp_path, configs)
  assert list(trials["chosen"]) == [True, True, False]


def test_the_best_mean_is_chosen_among_rates_with_equal_seeds(tmp_path):
  configs = [trial_config(16, rate=rate) for rate in (5e-4, 1e-3, 2e-3)]
  trials = arranged(tmp_path, configs)
  assert list(trials["chosen"]) == [False, True, False]


def test_the_same_trial_counts_once(tmp_path):
  configs = [trial_config(16), trial_config(16, overrides={"mtp.weight": 0.9})]
  trials = arranged(tmp_path, configs)
  assert list(trials["copy"]) == ["", "trial0"]
  assert list(trials["chosen"]) == [True, False]


@pytest.mark.parametrize(
  "parameters, text",
  [(950, "950"), (12_345, "12.3k"), (3.1e6, "3.1M"), (13e9, "13B"), (999_900, "1M")],
)
def test_size_text(parameters, text):
  assert size_text(parameters) == text
