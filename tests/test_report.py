"""The report as a reader gets it: files, words on the terminal, refusals."""

import itertools
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from launch import cli
from mtp_jax.analysis import figures
from mtp_jax.analysis.gains import analyse
from mtp_jax.analysis.report import write_report
from mtp_jax.analysis.runs import load
from tests.commands import run_report
from tests.synthetic_runs import World, trial_config, write_ladder, write_trial

WORLD = World(gain={("sequential", 1): (-0.02, 0.04), ("parallel", 3): (-0.05, 0.02)})
RUN_JSON = {
  "commit": "0123abc", "hardware": "1 x <chip>", "versions": {"jax": "0.10"}
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A tuned ladder, two more weights at one size, and a trial that is not finished."""
  root = write_ladder(tmp_path_factory.mktemp("runs"), WORLD)
  for weight in (0.1, 1.0):
    for seed in (0, 1):
      config = trial_config(16, "sequential", 1, seed, overrides={"mtp.weight": weight})
      write_trial(root, WORLD, config, run_json=RUN_JSON)
      config = trial_config(16, "sequential", 2, seed, overrides={"mtp.weight": weight})
      write_trial(root, WORLD, config)
  write_trial(
    root, WORLD, trial_config(32, "parallel", 3, 9), name="late one", finished=False
  )
  return root


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
  output = tmp_path_factory.mktemp("report")
  return write_report(folder, output, "python -m launch.report x"), output


@pytest.mark.slow
def test_every_figure_has_its_numbers(written):
  result, output = written
  names = {path.name for path in result.paths}
  for plot in figures.PLOTS:
    assert {f"{plot.stem}.png", f"{plot.stem}.csv"} <= names
    assert (output / f"{plot.stem}.png").read_bytes().startswith(b"\x89PNG")
    assert len(pd.read_csv(output / f"{plot.stem}.csv"))
  assert names == {path.name for path in output.iterdir()}


@pytest.mark.slow
def test_tables_hold_the_analysis(folder, written):
  _, output = written
  gains = analyse(load(folder)).gains
  read = pd.read_csv(output / "all_gains.csv", keep_default_na=False)
  np.testing.assert_allclose(read["mean"].astype(float), gains["mean"])
  main = gains[gains["metric"] == "main_loss"]
  figure = pd.read_csv(output / "gain_vs_size.csv")
  np.testing.assert_allclose(figure["mean"], main["mean"])
  np.testing.assert_allclose(figure["low"], main["low"])


@pytest.mark.slow
def test_the_page_stands_alone(written):
  result, _ = written
  text = result.paths[0].read_text()
  sources = re.findall(r'(?:src|href)="([^"]{0,30})', text)
  assert len(sources) == len(figures.PLOTS) + 1
  assert text.startswith("<!doctype html>")
  assert all(source.startswith("data:image/png;base64,") for source in sources)
  assert not re.search(r"<script|<link|@import|url\(", text)


@pytest.mark.slow
def test_the_page_says_what_a_reader_needs(written):
  result, _ = written
  text = result.paths[0].read_text()
  for words in (
    "This ladder counts as evidence about size.",
    "gain grows",
    "late one (step 50 of 100)",
    "0123abc",
    "1 x &lt;chip&gt;",
    "jax 0.10",
    "(0, 0), (1, 1), (2, 2), (9, 9)",
    "What speaks against this ladder",
    "python -m launch.report x",
    "is not used: its learning rate",
    "lacks seed 2 (data 2)",
  ):
    assert words in text, words


@pytest.mark.slow
def test_the_page_begins_with_a_sentence_a_figure_and_a_table(written):
  """Everything else is folded away; the Markdown has the same parts as the HTML."""
  _, output = written
  text = (output / "report.md").read_text()
  first = text[: text.index("<details>")]
  places = [first.index(x) for x in ("**On text at", "](tax_and_gain.png)", "| ")]
  assert places == sorted(places)
  assert first.count("](") == 1 and len(first.splitlines()) < 50
  assert text.count("<details>") == text.count("</details>") >= 6
  page = (output / "report.html").read_text()
  assert page.count("<details>") == text.count("<details>")
  assert page.count("<table>") >= 5 and "nan" not in re.sub(r'src="[^"]*"', "", page)
  # What is the same for several methods stands once.
  assert first.count("no effect found at") <= 1


@pytest.mark.slow
def test_sweeps_show_what_varies(written):
  _, output = written
  weights = pd.read_csv(output / "weight_sweep.csv")
  assert set(weights["family"]) == {"sequential D=1", "sequential D=2"}
  one = weights[(weights["family"] == "sequential D=1") & (weights["size"] < 20_000)]
  assert sorted(one["weight"].unique()) == [0.1, 0.3, 1.0]
  depths = pd.read_csv(output / "depth_sweep.csv")
  assert set(depths["family"]) == {"sequential λ=0.1", "sequential λ=1"}
  assert set(depths["depth"]) == {1, 2}
  assert depths["mean"].between(-0.1, 0.1).all()


@pytest.mark.slow
def test_losses_that_are_not_finite_are_named_and_print_no_nan(tmp_path, one_figure):
  for kind, depth in (("none", 0), ("sequential", 1)):
    run = write_trial(tmp_path, WORLD, trial_config(16, kind, depth), name=kind)
    evaluation = json.loads((run / "eval.json").read_text())
    evaluation["main_loss"] = {"mean": None, "stderr": None}
    (run / "eval.json").write_text(json.dumps(evaluation))
  text = write_report(tmp_path, tmp_path / "out").text
  assert "none ended with a loss that is not a number and is left out." in text
  page = (tmp_path / "out" / "report.md").read_text()
  assert "n/a (not finite)" in page and not re.search(r"\bnan\b", text + page)


def test_a_clock_of_different_machines_is_not_to_be_used(tmp_path, one_figure):
  for kind, depth, chip in (("none", 0, "A"), ("sequential", 1, "B")):
    for seed in (0, 1):
      config = trial_config(16, kind, depth, seed)
      write_trial(tmp_path, WORLD, config, run_json=RUN_JSON | {"hardware": chip})
  text = write_report(tmp_path, tmp_path / "out").text
  assert "Wall clock compares different hardware (`A`; `B`): do not use it." in text
  assert "intervals of gains are computed. If nothing had any effect, about" in text


SIBLINGS = {
  "data.source": "siblings", "tokenizer.kind": "symbols", "tokenizer.vocab_size": 544,
  "data.seq_len": 14, "task.num_train": 1000, "mtp.weight": 1.0,
}


def write_siblings(root, gain=0.05):
  """Trials whose test loss is best at step 50; each method has its own decay."""
  for width, seed, depth in itertools.product((16, 32), (0, 1, 2), (0, 1)):
    values = SIBLINGS | {"optimizer.weight_decay": 1.0 - 0.5 * depth}
    config = trial_config(
      width, "parallel" if depth else "none", depth, seed, overrides=values
    )
    name = f"siblings-w{width}-d{depth}-s{seed}"
    run = write_trial(root, WORLD, config, name=name)
    rng = np.random.default_rng([width, seed, depth])
    lines = [
      {"kind": split, "step": step, "tokens": step, "seconds": 1.0,
       "loss": [3.0 + abs(step - 50) / 50 - gain * depth + rng.normal(0, 1e-3)],
       "bits_per_byte": 1.0, "task_accuracy": 0.5}
      for step in (25, 50, 100) for split in ("validation", "test")
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


@pytest.mark.parametrize("parts", [
  ("text", "siblings"),
  pytest.param(("text",), marks=pytest.mark.slow),
  pytest.param(("siblings",), marks=pytest.mark.slow),
])
def test_a_folder_of_a_task_and_of_text_makes_one_page(
  tmp_path, parts, capsys, one_figure
):
  """One sentence, figure and table for both kinds of trials, or for one of them."""
  root = tmp_path / "runs"
  if "text" in parts:
    write_ladder(root, WORLD, widths=(16, 32), rates=(), arms=("added",))
  if "siblings" in parts:
    write_siblings(root)
  assert run_report(workdir=str(root)) == 0
  shown = capsys.readouterr().out
  *_, sentence, picture, last = shown.splitlines()
  assert last == f"Open: {root}/report/report.html"
  assert picture == f"Picture: {root}/report/tax_and_gain.png"
  assert run_report(workdir=str(root), brief=True) == 0
  assert capsys.readouterr().out == f"{sentence}\n{picture}\n{last}\n" != shown
  text = (root / "report" / "report.md").read_text()
  first = text[: text.index("<details>")]
  assert first.count("](") == first.count("](tax_and_gain.png)") == 1
  assert f"**{sentence}**" in first and len(first.splitlines()) < 40
  numbers = pd.read_csv(root / "report" / "tax_and_gain.csv")
  assert set(numbers["shown"]) == {
    {"text": "tax", "siblings": "siblings"}[part] for part in parts
  }
  names = {path.name for path in (root / "report").iterdir()}
  if "siblings" in parts:
    assert "n = 2 on repeated examples lowered the next-token loss by 0.05" in sentence
    assert "| n = 2, 1,000 examples" in first and "better" in first
    assert "siblings.png" in names and "gain_vs_size_2.png" not in names
  if "text" in parts:
    assert "n text at 13k to 49k parameters parallel D=3 " in sentence
    assert "gain_vs_size.png" in names
    tax = numbers[numbers["series"] == "parallel D=3"].set_index("size")["mean"]
    assert tax.iloc[0] == pytest.approx(0.05, abs=0.005)  # The gain is -0.05.
  for path in (root / "report").glob("*.png"):
    assert Image.open(path).width <= 1200


@pytest.fixture
def one_figure(monkeypatch):
  monkeypatch.setattr(figures, "PLOTS", figures.PLOTS[:1])


def test_command_prints_the_verdict_and_what_it_wrote(tmp_path, capsys, one_figure):
  """One seed, one size, nothing but what a first try leaves."""
  for kind, depth in (("none", 0), ("sequential", 1)):
    write_trial(tmp_path, WORLD, trial_config(16, kind, depth))
  assert run_report(workdir=str(tmp_path)) == 0
  out = capsys.readouterr().out
  assert re.search(
    r"On text at 13k parameters sequential D=1 (raised|lowered) the next-token loss by "
    r"[\d.e-]+ nats \(one seed, so without an interval\)\.", out
  )
  assert "n/a (needs two pairs of seeds)" in out and "nan" not in out
  assert out.splitlines()[-1] == f"Open: {tmp_path}/report/report.html"
  assert "2 of 2 trials below the folder are finished" in out
  assert run_report(workdir=str(tmp_path)) == 0  # Its own output is not taken for runs.


@pytest.mark.slow
def test_ladders_that_cannot_be_compared_stand_apart(tmp_path, one_figure):
  for source in ("stdlib", "site_packages"):
    for kind, depth in (("none", 0), ("sequential", 1)):
      config = trial_config(16, kind, depth, overrides={"data.source": source})
      write_trial(tmp_path, WORLD, config, name=f"{source}-{kind}")
  result = write_report(tmp_path, tmp_path / "out")
  page = (tmp_path / "out" / "report.md").read_text()
  for source in ("site_packages", "stdlib"):
    assert f"\n## data.source={source}\n" in page
    assert f"| {source} " in result.text  # One table for both.
  names = {path.name for path in result.paths}
  assert {"gain_vs_size_1.png", "gain_vs_size_2.png"} <= names


def test_nothing_finished_is_said_and_still_a_report(tmp_path):
  write_trial(tmp_path, WORLD, trial_config(16), name="only", finished=False)
  result = write_report(tmp_path, tmp_path / "out")
  text = result.text
  assert result.sentence == "No trial is finished: there is nothing to compare."
  assert "Not finished: only (step 50 of 100)." in text


def test_bad_input_is_refused(tmp_path, capsys):
  assert run_report(workdir=str(tmp_path / "nowhere")) == cli.BAD_INPUT
  assert "nowhere: no such folder" in capsys.readouterr().err
  run = write_trial(tmp_path, WORLD, trial_config(16), name="damaged")
  (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\nnonsense\n')
  assert run_report(workdir=str(tmp_path)) == cli.BAD_INPUT
  assert f"error: {run}/metrics.jsonl, line 2: not a record" in capsys.readouterr().err
  assert not (tmp_path / "report").exists()
