"""Claims and verdicts: what planted results must be found to say, and refusals."""

import itertools
import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from launch import cli
from mtp_jax.analysis import results
from mtp_jax.analysis.claims import claim as claims
from mtp_jax.analysis.claims import kinds, picture
from mtp_jax.analysis.claims.claim import (
  EQUIVALENT,
  OPPOSITE,
  SUPPORTED,
  UNDECIDED,
)
from mtp_jax.analysis.claims.drafters import ARMS
from mtp_jax.analysis.claims.table import experiments
from mtp_jax.analysis.drawing import STYLE, WIDEST
from mtp_jax.analysis.findings import write_findings
from mtp_jax.analysis.runs import RunsError, load
from tests import result_tables as worlds
from tests.commands import run_report
from tests.synthetic_runs import World, trial_config, write_trial

EXPERIMENTS = {x.folder: x for x in experiments()}
COMMITTED = Path(__file__).parents[1] / "experiments" / "results"
FOLDERS = {
  "star_graph_cpu": worlds.star_graph,
  "sat_gpu": lambda folder: worlds.task(folder, 0.1),
  "countdown_gpu": lambda folder: worlds.task(folder, -0.05),
  "polynomial_gpu": worlds.polynomial,
  "induction_gpu": lambda folder: worlds.task(folder, 0.1, trunk__embed_dim=(16, 64)),
  "acceptance_by_depth_cpu": worlds.acceptance,
  "schedules_cpu": worlds.schedules,
  "bytes_or_bpe_cpu": worlds.bytes_or_bpe,
  "data_repetition_cpu": worlds.data_repetition,
  "hidden_source_cpu": worlds.hidden_source,
  "drafters_cpu": worlds.drafters,
  "markov_cpu": worlds.markov,
  "kinds_cpu": worlds.kinds,
  "kinds_cpu_siblings": worlds.kinds_on_siblings,
}
RUNS = World(gain={})
COMMAND = "python -m launch.sweep --config=x.py:cpu"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp("results")
  for name, write in FOLDERS.items():
    write(root / name)
  return root


def judge(folder, key):
  """Returns verdict and finding of one claim, from a folder of any name."""
  experiment = EXPERIMENTS[folder.name]
  claim = next(x for x in experiment.claims if x.key == key)
  finding = claim.judge(experiment.read(folder))
  return claim.verdict(finding), finding


VERDICTS = [
  ("star_graph_cpu", "none0_2_3", SUPPORTED, "10 of 10 seeds [0.72, 1.00]"),
  ("star_graph_cpu", "parallel1_2_3", SUPPORTED, "10 of 10"),
  ("star_graph_cpu", "parallel3_2_3", UNDECIDED, "5 of 10 seeds [0.24, 0.76]"),
  ("star_graph_cpu", "sequential1_2_3", OPPOSITE, "0 of 10"),
  # Wilson's interval of 3 of 3 holds 1/2; the control has a rule of its own.
  ("star_graph_cpu", "reversed_2_3", SUPPORTED, "3 of 3 seeds [0.44, 1.00]"),
  ("sat_gpu", "rises_with_n", SUPPORTED, "n=4 minus NTP: +0.30"),
  ("countdown_gpu", "rises_with_n", OPPOSITE, "n=4 minus NTP: -0.1"),
  ("polynomial_gpu", "beats_ntp", SUPPORTED, "n=2 minus NTP: +0.1"),
  ("induction_gpu", "small_models_gain", SUPPORTED, "width 16, n=2 minus NTP"),
  ("induction_gpu", "gain_shrinks", SUPPORTED, "gain at 16 minus at 64"),
  ("acceptance_by_depth_cpu", "parallel_falls", SUPPORTED, "+0.10"),
  ("acceptance_by_depth_cpu", "sequential_falls", EQUIVALENT, "-0.02"),
  ("acceptance_by_depth_cpu", "sequential_more", SUPPORTED, "on docstrings"),
  ("acceptance_by_depth_cpu", "rises_with_width", SUPPORTED, "parallel: +0.1"),
  ("schedules_cpu", "anneal_closes_half", SUPPORTED, "constant +0.20"),
  ("schedules_cpu", "reverse_closes_half", OPPOSITE, "+0.09"),
  ("schedules_cpu", "forward_keeps_drafts", SUPPORTED, "forward / constant: 0"),
  ("bytes_or_bpe_cpu", "bytes_pay_less_4", SUPPORTED, "+0.03"),
  ("bytes_or_bpe_cpu", "bytes_pay_less_8", SUPPORTED, "+0.07"),
  ("data_repetition_cpu", "shrinks_2", OPPOSITE, "-0.17"),
  ("hidden_source_cpu", "chained_more", SUPPORTED, "minus trunk: +0."),
  ("hidden_source_cpu", "embedding_helps", OPPOSITE, "-0.15"),
  ("hidden_source_cpu", "norm_is_neutral", EQUIVALENT, "before minus after"),
  ("drafters_cpu", "keeps_of_joint", OPPOSITE, "frozen / joint: 0.77"),
  ("drafters_cpu", "modules_more", SUPPORTED, "modules minus medusa: +0."),
  ("drafters_cpu", "medusa_jointly", EQUIVALENT, "+0.05"),
  ("drafters_cpu", "price", SUPPORTED, "parallel, joint: +0."),
  ("drafters_cpu", "eagle3_more", SUPPORTED, "eagle3 minus eagle: +0."),
  ("drafters_cpu", "eagle3_is_module", EQUIVALENT, "+0.10"),
  ("drafters_cpu", "kl_more", SUPPORTED, "+0.20"),
  ("drafters_cpu", "lk_more", SUPPORTED, "+0.10"),
  ("drafters_cpu", "written_more", EQUIVALENT, "written text minus"),
  ("markov_cpu", "greedy_more", EQUIVALENT, "rank 256 minus none"),
  ("markov_cpu", "loss_same", OPPOSITE, "+0.10"),
  ("markov_cpu", "sample_more", SUPPORTED, "rank 256 minus none: +1.0"),
  ("markov_cpu", "argmax_more", EQUIVALENT, "rank 256 minus none"),
  ("kinds_cpu", "passes_matter", SUPPORTED, "peagle minus eagle3: -"),
  ("kinds_cpu", "block_more", SUPPORTED, "dflash minus peagle: +0."),
  ("kinds_cpu", "markov_more", SUPPORTED, "medusa, Markov minus medusa: +0."),
  ("kinds_cpu", "block_costs", SUPPORTED, "dflash minus NTP: +0.05"),
  ("kinds_cpu", "top_costs", EQUIVALENT, "top minus NTP"),
  ("kinds_cpu_siblings", "blind_more", SUPPORTED, "blind minus fed: +0.05"),
  ("kinds_cpu_siblings", "medusa_Markov", SUPPORTED, "medusa, Markov, gain: +0.0"),
  ("kinds_cpu_siblings", "dflash", EQUIVALENT, "dflash, gain"),
]


@pytest.mark.parametrize("name, key, verdict, words", VERDICTS)
def test_planted_results_get_their_verdict(root, name, key, verdict, words):
  found, finding = judge(root / name, key)
  assert found == verdict
  assert words in finding.ours


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_every_experiment_has_its_picture(root, name):
  experiment = EXPERIMENTS[name]
  with matplotlib.rc_context(STYLE):
    figure, numbers = picture.of(experiment, experiment.read(root / name))
    assert worlds.clipped_texts(figure) == []
  assert figure.get_figwidth() <= WIDEST
  assert all(ax.has_data() for ax in figure.axes)
  assert len(numbers)


def test_shares_reach_to_1_and_each_verdict_has_a_mark(root):
  experiment = EXPERIMENTS["star_graph_cpu"]
  kept = experiment.read(root / "star_graph_cpu")
  figure, rows = picture.of(experiment, kept)
  shares = [ax for ax in figure.axes if "points" in ax.get_xlabel()]
  assert shares and all(
    -1 <= low < high <= 1 for low, high in (ax.get_xlim() for ax in shares)
  )
  looks = {
    box.get_label(): box[0].get_marker() for ax in figure.axes for box in ax.containers
    if box.get_label() in {SUPPORTED, OPPOSITE, EQUIVALENT, UNDECIDED}
  }
  assert {SUPPORTED, OPPOSITE, UNDECIDED} <= set(looks)
  assert len(set(looks.values())) == len(looks)
  of_claim = rows.set_index("claim")
  assert of_claim.loc["sequential1_2_3", "verdict"] == OPPOSITE
  assert of_claim.loc["reversed_2_3", "verdict"] == SUPPORTED  # By a rule of its own.


def test_the_comparison_of_drafters_has_a_row_an_arm_and_width(root):
  experiment = EXPERIMENTS["drafters_cpu"]
  rows = experiment.table(experiment.read(root / "drafters_cpu"))
  assert len(rows) == 2 * len(ARMS) and set(rows["seeds"]) == {3}
  row = rows[(rows["drafter"] == "modules, joint") & (rows["width"] == 64)].iloc[0]
  assert (row["parameters"], row["MFLOPs per token"]) == (500, 2.0)
  assert row["tokens per round, sampled"].startswith("2.2")
  assert row["alpha_1"] == pytest.approx(0.5, abs=0.01)
  assert row["S_3"] == pytest.approx(0.3, abs=0.01)
  assert row["main loss minus NTP's"].startswith(("+0.00", "-0.00"))


def test_the_table_of_kinds_has_a_row_an_arm_and_what_opens_it(root):
  experiment = EXPERIMENTS["kinds_cpu"]
  rows = experiment.table(experiment.read(root / "kinds_cpu"))
  assert len(rows) == len(kinds.ARMS) and set(rows["seeds"]) == {3}
  rows = rows.set_index(["kind", "trained"])
  row = rows.loc["dflash", "joint"]
  assert (row["parameters"], row["MFLOPs per token"]) == (500, 2.0)
  for how in kinds.HOW:
    assert row[f"tokens per round, {how}"].startswith("2.0")
  assert row["main loss minus NTP's"].startswith("+0.05")
  assert rows.loc["top", "joint"]["tokens per round, drafts drawn"] == ""
  opened = {name: rows.loc[name, "joint"]["opened by"] for name in rows.index.levels[0]}
  for name in ("medusa", "eagle3", "peagle"):
    assert opened[name] == name
  assert opened["modules"] == "glm4_moe"
  for name in ("parallel", "medusa, Markov", "dflash", "top"):
    assert opened[name] == "mtp-jax alone"


def test_claims_can_be_told_apart():
  assert len(EXPERIMENTS) == len(experiments())
  for experiment in EXPERIMENTS.values():
    for field in ("key", "statement"):
      values = [getattr(claim, field) for claim in experiment.claims]
      assert len(set(values)) == len(values)


def test_published_cells_make_the_claims_of_the_star_graphs():
  says = {x.key: x.statement for x in EXPERIMENTS["star_graph_gpu"].claims}
  assert says["none0_3_3"] == "G(3,3): NTP stays at chance"
  assert says["parallel1_5_3"] == "G(5,3): parallel n=2 fails"
  assert says["parallel3_5_3"] == "G(5,3): parallel n=4 solves it"
  assert says["none0_5_5"] == "G(5,5): NTP fails"  # Published: far below chance.
  assert says["sequential1_3_5"] == "G(3,5): sequential D=1 fails"


def test_a_graph_is_judged_by_its_own_trials(tmp_path):
  """NTP is at chance on G(3,3); other graphs and other fed tokens do not count."""
  trials = worlds.grid(
    (worlds.NTP, worlds.THREE_MODULES), range(5), task__star_graph__arms=(3, 5),
    mtp__fed=("true", "none"),
  )
  trials = [x for x in trials if x["mtp.kind"] != "none" or x["mtp.fed"] == "true"]

  def measure(trial, rng):
    solves = trial["mtp.kind"] != "none" and trial["mtp.fed"] == "true"
    return {("task_accuracy", 0): 1.0 if solves else 1 / trial["task.star_graph.arms"]}

  shared = {"task.star_graph.length": 3, "task.star_graph.reversed": False}
  folder = worlds.write_results(tmp_path / "star_graph_gpu", trials, measure, shared)
  for key in ("none0_3_3", "none0_5_3", "sequential3_3_3"):
    verdict, finding = judge(folder, key)
    assert (verdict, finding.seeds) == (SUPPORTED, 5)
  assert judge(folder, "parallel1_3_3")[0] == claims.NOT_RUN


@pytest.mark.parametrize("n", [1, 3, 4, 10])
def test_wilson_at_the_edges(n):
  """All or none of n seeds: n / (n + z^2) in closed form; four decide, three do not."""
  z2 = stats.norm.ppf(0.975) ** 2
  every, none = (claims.share(pd.Series([x] * n)) for x in (True, False))
  assert (every.low, every.high) == pytest.approx((n / (n + z2), 1.0))
  assert (none.low, none.high) == pytest.approx((0.0, z2 / (n + z2)))
  expected = (SUPPORTED, OPPOSITE) if n >= 4 else (UNDECIDED, UNDECIDED)
  assert (every.verdict, none.verdict) == expected


def test_no_seed_has_no_share():
  empty = claims.share(pd.Series(dtype=bool))
  assert (empty.n, empty.verdict) == (0, UNDECIDED)


def estimate(low, high, side="above", margin=0.1):
  mean = (low + high) / 2
  return claims.Estimate("", "", 3, mean, low, high, 1.0, side, margin)


@pytest.mark.parametrize(
  "low, high, side, verdict",
  [
    (1.15, 2.0, "above", SUPPORTED), (0.5, 0.9, "above", OPPOSITE),
    (0.5, 2.0, "above", UNDECIDED), (1.15, 2.0, "below", OPPOSITE),
    (0.5, 0.9, "below", SUPPORTED), (1.0, 2.0, "below", UNDECIDED),
    # Inside 1 +- 0.1 an effect is too small to matter, whichever its sign.
    (0.95, 1.05, "above", EQUIVALENT), (1.02, 1.08, "above", EQUIVALENT),
    (0.92, 0.98, "above", EQUIVALENT), (1.02, 1.12, "above", SUPPORTED),
    (0.95, 1.05, "within", EQUIVALENT), (1.02, 1.12, "within", UNDECIDED),
    (1.12, 1.15, "within", OPPOSITE), (0.5, 0.85, "within", OPPOSITE),
    (0.5, 2.0, "within", UNDECIDED), (np.nan, np.nan, "within", UNDECIDED),
    # Seeds that all give the same number: no spread to judge by.
    (1.0, 1.0, "above", UNDECIDED), (2.0, 2.0, "above", UNDECIDED),
  ],
)
def test_an_interval_decides_as_a_whole(low, high, side, verdict):
  assert estimate(low, high, side).verdict == verdict


def test_all_estimates_of_a_claim_must_agree():
  yes, no, open_ = estimate(2, 3), estimate(0, 0.5), estimate(0, 3)
  nil = estimate(0.95, 1.05)

  def verdict(*estimates):
    return claims.Finding(estimates).verdict

  assert verdict(yes, yes) == SUPPORTED
  assert verdict(yes, open_) == UNDECIDED
  assert verdict(yes, open_, no) == OPPOSITE
  assert verdict(nil, nil) == EQUIVALENT
  assert verdict(nil, yes) == UNDECIDED
  assert verdict() == UNDECIDED
  assert "(supported)" in claims.Finding((yes, open_)).ours  # Each has its own.


def test_a_smaller_margin_undoes_an_equivalence():
  finding = claims.Finding((estimate(0.96, 1.03),))
  assert finding.at(claims.Margin(0.05, "nats")).verdict == EQUIVALENT
  assert finding.at(claims.Margin(0.02, "nats")).verdict == UNDECIDED


def test_pairs_are_averaged_within_a_seed():
  index = list(itertools.product((0, 1, 2), ("a", "b", "c")))
  rows = pd.DataFrame(index, columns=["seed", "text"]).assign(trial="x")
  rows["data.seed"] = 0
  rows["value"] = rows["text"].map({"a": 1.0, "b": 3.0, "c": np.nan})
  rows.loc[(rows["seed"] == 2) & (rows["text"] == "a"), "value"] = np.nan
  over = claims.over_seeds(results.by_key(rows, ["seed", "data.seed", "text"]))
  # Text c was never measured and does not count; seed 2 lacks a text that others have.
  assert (over.n, over.mean) == (2, 2.0)
  assert "1 seed(s) incomplete, left out" in over.text


def test_nothing_is_decided_where_no_arm_has_learnt(tmp_path):
  folder = worlds.task(tmp_path / "sat_gpu", gain=0.01, base=0.01)
  verdict, finding = judge(folder, "rises_with_n")
  assert verdict == UNDECIDED
  assert "no arm has learnt the task: the best mean accuracy is 0.0" in finding.ours


def test_one_seed_decides_nothing(tmp_path):
  trials = worlds.grid((worlds.NTP, worlds.FOUR), [0])
  folder = worlds.write_results(
    tmp_path / "sat_gpu", trials,
    lambda trial, rng: {("task_accuracy", 0): 0.2 * (1 + trial["mtp.depth"])},
  )
  verdict, finding = judge(folder, "rises_with_n")
  assert (verdict, finding.seeds) == (UNDECIDED, 1)
  assert "one seed: no interval" in finding.ours


def test_no_penalty_cannot_be_closed(tmp_path):
  folder = worlds.schedules(tmp_path / "schedules_cpu")
  metrics = pd.read_csv(folder / "metrics.csv")
  is_loss = metrics["metric"] == "main_loss"
  metrics.loc[is_loss, "mean"] = np.random.default_rng(0).uniform(2, 3, is_loss.sum())
  metrics.to_csv(folder / "metrics.csv", index=False)
  verdict, finding = judge(folder, "anneal_closes_half")
  assert verdict == UNDECIDED
  assert "no penalty to close" in finding.ours


def test_trials_that_a_claim_cannot_tell_apart_are_refused(tmp_path):
  trials = worlds.grid((worlds.NTP,), (0, 0))
  folder = worlds.write_results(
    tmp_path / "sat_gpu", trials, lambda trial, rng: {("task_accuracy", 0): 0.5}
  )
  with pytest.raises(RunsError, match="trial0 and trial1 have the same seed"):
    judge(folder, "rises_with_n")


@pytest.fixture(scope="module")
def page(root, tmp_path_factory):
  """The page of two experiments; all others are not yet run."""
  some = tmp_path_factory.mktemp("some")
  for name in ("star_graph_cpu", "hidden_source_cpu"):
    (some / name).symlink_to(root / name)
  output = tmp_path_factory.mktemp("page") / "findings"
  return write_findings(some, output, "python -m launch.report --findings"), output


def test_table_has_a_row_for_each_claim(page):
  _, output = page
  rows = pd.read_csv(output / "findings.csv", keep_default_na=False)
  assert len(rows) == sum(len(x.claims) for x in EXPERIMENTS.values())
  rows = rows.set_index(["experiment", "claim"])
  row = rows.loc["star_graph_cpu", "sequential1_2_3"]
  assert row["verdict"] == OPPOSITE
  assert row["ours"] == "0 of 10 seeds [0.00, 0.28]"
  assert (row["seeds"], row["commit"], row["date"]) == (10, "0123abc", "2026-01-02")
  assert row["margin"] == "0.05 (5 points)"
  assert row["command"] == worlds.FACTS.command[0]
  waiting = rows.loc["sat_gpu", "rises_with_n"]
  assert (waiting["verdict"], waiting["ours"]) == (claims.NOT_RUN, "")
  assert waiting["command"] == (
    "python -m launch.sweep --config=experiments/sat.py:gpu --workdir=runs/sat_gpu"
  )
  shares = pd.read_csv(output / "estimates.csv").set_index("claim")
  assert shares.loc["parallel3_2_3", "mean"] == 0.5


def test_page_says_what_a_reader_needs(page):
  result, output = page
  text = (output / "findings.md").read_text()
  for words in (
    "10 of 10 seeds [0.72, 1.00]", "G(3,3): 33.8 % exact paths",
    "no figure that we could check", "a seed is at chance within 0.1 of 1/2",
    "1 x <chip>", "0123abc", "jax 0.10", "python -m launch.report --findings",
    "margin 0.01 nats", "](star_graph_cpu.png)",
  ):
    assert words in text, words
  assert "(interim)" not in text and "*Interim*" not in text
  # Decided before undecided; what waits is one folded list.
  places = [text.index(x) for x in (
    "**Supported**", "**Opposite", "**Equivalent", "## Undecided", "## Each experiment",
    "<summary>Not yet run",
  )]
  assert places == sorted(places)
  decided = text[: text.index("## Undecided")].splitlines()
  assert len(decided) < 45 and max(map(len, decided)) < 160  # One screen.
  assert text.count("<details>") == text.count("</details>") == 3
  names = {path.name for path in output.iterdir()}
  assert names == {path.name for path in result.paths}
  assert {"findings.md", "star_graph_cpu.png", "star_graph_cpu.csv"} <= names
  assert not {"findings.html", "summary.png"} & names


def test_terminal_shows_what_is_decided_and_ends_with_the_page(page):
  result, output = page
  opposite = result.text[result.text.index("**Opposite") :]
  assert "- G(2,3): sequential D=1 solves it: 0 of 10 seeds" in opposite
  counts = r"\d+ claims: \d+ supported, 2 opposite, 1 equivalent, "
  assert re.match(counts, result.sentence)
  assert result.paths[0] == output / "findings.md"
  assert "- sat_cpu: `python -m launch.sweep" in (output / "findings.md").read_text()


def test_interim_results_are_marked(tmp_path, runs, capsys):
  """The words of --interim stand beside the verdicts and in the figure's caption."""
  kept = tmp_path / "kept" / "sat_gpu"
  worlds.task(kept, 0.1)
  run = json.loads((kept / "run.json").read_text())
  words = "3 of 10 seeds"
  (kept / "run.json").write_text(json.dumps(run | {"interim": words}))
  assert run_report(findings=True, results=str(kept.parent)) == 0
  page = (kept.parent / "findings" / "findings.md").read_text()
  bullet, *_, row = (x for x in page.splitlines() if "accuracy rises with n" in x)
  assert bullet.endswith("(`sat_gpu`, *interim*)")
  assert row.endswith("| supported (interim) |")
  assert f"over seeds. Interim: {words}. Numbers: `sat_gpu.csv`" in page
  assert f"`sat_gpu`: {words}. Their verdicts may change." in page
  rows = pd.read_csv(kept.parent / "findings" / "findings.csv").set_index("experiment")
  assert rows.loc["sat_gpu", "interim"] == words
  again = tmp_path / "again"
  values = {"workdir": str(runs), "results": str(again), "command": ["x"]}
  assert run_report(**values, interim=words) == 0
  assert results.read(again).facts.interim == words


@pytest.mark.parametrize("name", ["sat", "countdown", "polynomial", "induction"])
def test_runs_that_cannot_test_a_claim_are_named_with_the_reason(name):
  kept = EXPERIMENTS[f"{name}_cpu"].read(COMMITTED / f"{name}_cpu")
  for claim in EXPERIMENTS[f"{name}_cpu"].claims:
    assert claim.verdict(claim.judge(kept)) == claims.NOT_TESTED
    assert len(claim.not_tested) > 40
  assert not any(x.not_tested for x in EXPERIMENTS[f"{name}_gpu"].claims)


def committed(folder, key):
  """Returns verdict and finding of one claim on the results that are kept."""
  experiment = EXPERIMENTS[folder]
  claim = next(x for x in experiment.claims if x.key == key)
  finding = claim.judge(experiment.read(COMMITTED / folder))
  return claim.verdict(finding), finding


def test_what_the_kept_results_decide_by_margin():
  verdict, finding = committed("hidden_source_cpu", "norm_is_neutral")
  (only,) = finding.estimates
  assert (verdict, only.margin) == (EQUIVALENT, 0.01)
  assert (round(only.low, 4), round(only.high, 4)) == (-0.0008, 0.0003)
  # Exact paths at the last step hide what the time to solve shows.
  key = "star_graph_cpu_8_labels"
  assert committed(key, "parallel1_2_3")[0] == UNDECIDED
  verdict, finding = committed(key, "sooner_parallel1_2_3")
  assert verdict == SUPPORTED
  assert "solved by 8 of 10 seeds, NTP 6 of 10" in finding.ours
  assert finding.estimates[0].mean == pytest.approx(0.7272, abs=1e-4)


def test_committed_results_make_a_page(tmp_path, capsys):
  """The ladder's findings follow from its tables, whatever else has been added."""
  (tmp_path / "only").mkdir()
  ladder = "gains_with_scale_cpu"
  (tmp_path / "only" / ladder).symlink_to(COMMITTED / ladder)
  results_, output = str(tmp_path / "only"), str(tmp_path)
  assert run_report(findings=True, results=results_, output=output) == 0
  out = capsys.readouterr().out.splitlines()
  assert any("Gains grow with size: parallel D=3" in line for line in out)
  assert out[-1] == f"Open: {tmp_path / 'findings.md'}"
  rows = pd.read_csv(tmp_path / "findings.csv").set_index(["experiment", "claim"])
  slopes = pd.read_csv(COMMITTED / ladder / "all_slopes.csv")
  slope = slopes[
    (slopes["method"] == "parallel D=3") & (slopes["metric"] == "main_loss")
    & (slopes["comparison"] == "tokens")
  ].iloc[0]
  ours = rows.loc[(ladder, "parallel3_grows"), "ours"]
  assert ours == (
    f"per decade: {slope['slope']:+.4f} [{slope['low']:+.4f}, {slope['high']:+.4f}]"
  )
  gains = pd.read_csv(COMMITTED / ladder / "all_gains.csv")
  gain = gains[
    (gains["method"] == "parallel D=3") & (gains["metric"] == "main_loss")
    & (gains["comparison"] == "tokens")
  ].iloc[-1]
  cost = pd.read_csv(tmp_path / "estimates.csv").set_index("claim").loc["heads_cost"]
  np.testing.assert_allclose(cost["high"].iloc[-1], gain["high"])
  # Other lambdas, tried at one size only, are no part of the ladder.
  assert set(pd.read_csv(tmp_path / f"{ladder}.csv")["n"]) == {3}


@pytest.mark.parametrize("folder", sorted(EXPERIMENTS.keys() & {
  path.name for path in COMMITTED.iterdir()
}))
def test_committed_results_have_a_verdict(folder):
  """Each claim can be tested on what was kept, and a picture be drawn."""
  experiment = EXPERIMENTS[folder]
  kept = experiment.read(COMMITTED / folder)
  verdicts = [claim.verdict(claim.judge(kept)) for claim in experiment.claims]
  assert set(verdicts) != {claims.NOT_RUN}
  assert len(picture.of(experiment, kept)[1])


@pytest.fixture
def small(tmp_path):
  return worlds.task(tmp_path / "sat_gpu", 0.1)


def drop_fact(folder):
  run = json.loads((folder / "run.json").read_text())
  del run["commit"]
  (folder / "run.json").write_text(json.dumps(run))


def spoil_fact(folder):
  run = json.loads((folder / "run.json").read_text())
  (folder / "run.json").write_text(json.dumps(run | {"seeds": "0, 1"}))


def drop_column(folder):
  pd.read_csv(folder / "trials.csv").drop(columns="data.seed").to_csv(
    folder / "trials.csv", index=False
  )


def break_number(folder):
  text = (folder / "metrics.csv").read_text().splitlines()
  text[2] = "trial1,task_accuracy,0,many,0.1,100"
  (folder / "metrics.csv").write_text("\n".join(text))


def add_stranger(folder):
  with (folder / "metrics.csv").open("a") as file:
    file.write("nobody,task_accuracy,0,0.5,0.1,100\n")


@pytest.mark.parametrize(
  "damage, words",
  [
    (drop_fact, "run.json: key 'commit' is missing"),
    (spoil_fact, "run.json: seeds must be of type list, got '0, 1'"),
    (drop_column, "trials.csv: key 'data.seed' is missing"),
    (break_number, "metrics.csv, line 3: mean must be a number, got 'many'"),
    (add_stranger, "metrics.csv: trial must be one of trials.csv, got 'nobody'"),
    (lambda x: (x / "curves.csv").unlink(), "curves.csv: no such file"),
    (lambda x: (x / "curves.csv").write_text(""), "curves.csv: not a table"),
    (lambda x: (x / "run.json").unlink(), "run.json: no such file"),
    (lambda x: (x / "run.json").write_text("{\n1"), "run.json, line 2: not JSON"),
  ],
)
def test_damaged_results_are_named(small, damage, words):
  damage(small)
  with pytest.raises(RunsError, match=re.escape(words)) as error:
    results.read(small)
  assert str(small) in str(error.value)


def test_missing_config_key_is_named(tmp_path, root, capsys):
  """A claim needs a key that the results do not have: no page, one message."""
  kept = tmp_path / "results" / "induction_gpu"
  worlds.task(kept, 0.1)
  assert run_report(findings=True, results=str(kept.parent)) == cli.BAD_INPUT
  message = capsys.readouterr().err
  assert "claim 'small_models_gain'" in message
  assert "trials.csv: key 'trunk.embed_dim' is missing" in message
  assert not (kept.parent / "findings").exists()


@pytest.fixture
def runs(tmp_path):
  """Two finished runs, one of a task, and one that is not finished."""
  folder = tmp_path / "runs"
  run_json = {"commit": "0123abc", "hardware": "1 x chip", "versions": {"jax": "0.10"}}
  for seed in (0, 1):
    config = trial_config(16, "sequential", 2, seed)
    run = write_trial(folder, RUNS, config, name=f"s{seed}", run_json=run_json)
  evaluation = json.loads((run / "eval.json").read_text())
  evaluation["task_accuracy"] = {"mean": 1 / 3, "stderr": 0.1, "count": 30}
  evaluation["task_accuracy_groups"] = {
    "operators=2": {"mean": 0.1, "stderr": 0.1, "count": 20}
  }
  (run / "eval.json").write_text(json.dumps(evaluation))
  with (run / "metrics.jsonl").open("a") as file:
    record = {"kind": "validation", "step": 100, "tokens": 1, "seconds": 1.0,
              "loss": [0.1 + 0.2], "bits_per_byte": 1.0, "task_accuracy": 2 / 3}
    file.write(json.dumps(record) + "\n")
  write_trial(folder, RUNS, trial_config(16, seed=2), name="late", finished=False)
  return folder


def test_results_of_runs_come_back(tmp_path, runs, capsys):
  kept = tmp_path / "results" / "sat_gpu"
  values = {"workdir": str(runs), "results": str(kept)}
  assert run_report(command=[COMMAND, "again"], **values) == 0
  out = capsys.readouterr().out
  assert "2 of 3 trials" in out
  assert "Not finished: late (step 50 of 100)." in out
  assert {x.name for x in kept.iterdir()} == {
    "trials.csv", "metrics.csv", "curves.csv", "run.json"
  }
  assert not (runs / "report").exists()
  written, read = load(runs), results.read(kept)
  columns = list(pd.read_csv(kept / "trials.csv").columns)
  assert columns == [
    "trial", "status", "step", "size", "tokens", "train_flops", "train_seconds",
    "added_parameters", "flops_per_token", "stopped_step", "stopped_tokens",
    "seed", "data.seed", "data.source", "mtp.kind", "mtp.depth",
  ]
  assert list(read.trials["seed"]) == [2, 0, 1]
  assert read.trials["trunk.embed_dim"].unique() == [16]  # Shared, from run.json.
  pd.testing.assert_frame_equal(
    read.metrics, written.metrics.astype({"count": float}), rtol=1e-14
  )
  pd.testing.assert_frame_equal(
    read.curves,
    written.curves[written.curves["split"] != "train"].drop(columns="seconds")
    .reset_index(drop=True),
    rtol=1e-14, check_dtype=False,
  )
  assert read.curves["task_accuracy"].max() == pytest.approx(2 / 3)
  assert "0.30000000000000004" in (kept / "curves.csv").read_text()  # Not rounded.
  task = read.metrics.set_index(["trial", "metric"])["count"]
  assert task["s1", "task_accuracy:operators=2"] == 20
  facts = read.facts
  assert facts.command == (COMMAND, "again")
  assert (facts.commit, facts.hardware) == (("0123abc",), ("1 x chip",))
  assert (facts.finished, facts.trials, facts.seeds) == (2, 3, (0, 1, 2))
  assert facts.date == written.trials["date"].max()
  assert re.fullmatch(r"\d{4}-\d\d-\d\d", facts.date)


def test_nothing_finished_leaves_no_results(tmp_path, capsys):
  write_trial(tmp_path / "runs", RUNS, trial_config(16), name="late", finished=False)
  kept = tmp_path / "kept"
  values = {"workdir": str(tmp_path / "runs"), "results": str(kept)}
  assert run_report(command=[COMMAND], **values) == cli.BAD_INPUT
  assert "no trial is finished" in (message := capsys.readouterr().err)
  assert "late (step 50 of 100)" in message
  assert not kept.exists()


@pytest.mark.parametrize("values, words", [
  ({}, "--workdir is required"),
  ({"workdir": "runs", "findings": True}, "--workdir must not be given, got runs"),
  ({"findings": True, "command": ["x"]}, "--command goes with --workdir and --results"),
  ({"workdir": "runs", "results": "x"}, "--command is required with --results"),
  ({"workdir": "runs", "command": ["x"]}, "--command goes with --results, which is mi"),
  ({"workdir": "runs", "interim": "x"}, "--interim goes with --results, which is mi"),
  ({"findings": True, "interim": "x"}, "--interim goes with --workdir and --results"),
  (
    {"workdir": "runs", "results": "x", "command": ["y"], "output": "z"},
    "--output goes with",
  ),
  ({"findings": True, "results": "nowhere"},
   "--results must name the folder of kept results, which a clone has as experiments"),
])
def test_flags_that_do_not_go_together(values, words, capsys):
  assert run_report(**values) == cli.BAD_INPUT
  assert words in capsys.readouterr().err


def test_the_gain_on_siblings_stands_beside_what_kinds_draft(root):
  experiment = EXPERIMENTS["kinds_cpu"]
  own, beside = (
    EXPERIMENTS[x].read(root / x) for x in ("kinds_cpu", experiment.beside)
  )
  rows = experiment.table(own, beside).set_index(["kind", "trained"])
  gains = rows["gain on siblings"]
  assert gains["medusa", "joint"].startswith(("+0.050", "+0.049"))
  assert gains["medusa", "frozen"] == "" == gains["one module", "joint"]
  figure, numbers = experiment.draw(own, beside)
  assert set(numbers["shown"]) == {"tokens", "price", "gain"}
  assert len(figure.axes) == 3 and not worlds.clipped_texts(figure)
  alone = experiment.draw(own)[1]
  assert set(alone["shown"]) == {"tokens", "price"}
