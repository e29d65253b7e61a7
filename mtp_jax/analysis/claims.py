"""Claims about multi-token prediction, each with the rule that decides it.

A rule is written before the results of its experiment are read, unless it says
otherwise; what is expected is in the experiment's file, from before the run.

A claim belongs to an experiment (`experiments/NAME.py:PRESET`), whose results are kept
in the folder `NAME_PRESET`. Nothing measured stands here: `claim_tests.py` computes it.
Published figures are those that could be checked in the paper itself; where there is
none, that is said.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from mtp_jax.analysis import claim_figures as figures
from mtp_jax.analysis import claim_tests as tests
from mtp_jax.analysis import drafter_claims as drafters
from mtp_jax.analysis import results as results_lib
from mtp_jax.analysis.published import STAR_GRAPHS, published_gains
from mtp_jax.analysis.rules import Finding

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
AS_EXPECTED = "as expected"
NOT_AS_EXPECTED = "not as expected"
UNDECIDABLE = "not decidable at this scale"
NOT_RUN = "not yet run"

PRESETS = ("cpu", "gpu", "cluster")
EASIER = "cpu_8_labels"  # Of the star graph: NTP and n = 2 alone.
NO_FIGURE = "no figure that we could check"
GLOECKLE = "Gloeckle et al. 2024, arXiv 2404.19737"
TOP = "TOP, arXiv 2508.19228"
DEEPSEEK = "DeepSeek-V3, arXiv 2412.19437"
AYNETDINOV = "Aynetdinov and Akbik 2025, arXiv 2505.22757"
SHARE_RULE = (
  "the 95 % Wilson interval of the share of such seeds: above 1/2 it is reproduced, "
  "below 1/2 it is not, else it is not decidable"
)
PAIRED_RULE = (
  "paired by seed; the whole 95 % t interval over seeds lies above 0: it holds; below "
  "0: it does not; else not decidable"
)


@dataclasses.dataclass(frozen=True)
class Claim:
  """One sentence that results can contradict.

  key:       unique within the experiment.
  published: the published figure, or that there is none.
  rule:      in words, what `test` computes and when the claim holds.
  is_published: False for questions of our own, which are expected, not reproduced.
  """

  key: str
  statement: str
  source: str
  published: str
  rule: str
  test: Callable[[Any], Finding]
  is_published: bool = True

  def verdict(self, finding: Finding | None) -> str:
    """Returns the verdict on what was found; None is an experiment without results."""
    if finding is None or finding.seeds == 0:
      return NOT_RUN
    if finding.holds is None:
      return UNDECIDABLE
    if self.is_published:
      return REPRODUCED if finding.holds else NOT_REPRODUCED
    return AS_EXPECTED if finding.holds else NOT_AS_EXPECTED


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The claims that one preset of an experiment decides.

  read: reads its results folder. draw: returns its figure and the numbers in it.
  table: returns what the page also shows as a table, if anything.
  """

  name: str
  preset: str
  title: str
  caption: str
  claims: tuple[Claim, ...]
  draw: Callable[[Any], tuple[Figure, pd.DataFrame]]
  read: Callable[[Path], Any] = results_lib.read
  table: Callable[[Any], pd.DataFrame] | None = None

  @property
  def folder(self) -> str:
    return f"{self.name}_{self.preset}"

  @property
  def command(self) -> str:
    """The command that runs it; results carry the one that did."""
    return (
      f"python -m launch.sweep --config=experiments/{self.name}.py:{self.preset} "
      f"--workdir=runs/{self.folder}"
    )


def experiments() -> tuple[Experiment, ...]:
  """Returns every experiment in every preset."""
  of_presets = tuple(
    make(preset)
    for make in (
      _star_graph, _sat, _countdown, _polynomial, _induction, _acceptance, _schedules,
      _bytes_or_bpe, _data_repetition, _hidden_source, _drafters, _gains_with_scale,
    )
    for preset in PRESETS
    if (make, preset) != (_drafters, "cluster")
  )
  return (of_presets[0], _star_graph(EASIER), *of_presets[1:])


def _star_graph(preset: str) -> Experiment:
  graphs = ((2, 3),) if preset in ("cpu", EASIER) else tuple(STAR_GRAPHS)
  return Experiment(
    "star_graph", preset, "The path of a star graph",
    "Exact paths, decoded freely: one dot a seed above, one line a seed during "
    "training below. Dashed: chance, one over the arms.",
    tuple(claim for graph in graphs for claim in _star_graph_claims(*graph))[
      : 2 if preset == EASIER else None
    ],
    figures.draw_star_graph,
  )


def _star_graph_claims(arms: int, length: int) -> Iterator[Claim]:
  # The table has no G(2,3): of its graphs G(3,3) is the smallest.
  cells = STAR_GRAPHS.get((arms, length), STAR_GRAPHS[3, 3])
  of = "" if (arms, length) in STAR_GRAPHS else "G(3,3): "
  graph = f"G({arms},{length})"
  on_graph = {"task.star_graph.arms": arms, "task.star_graph.length": length}
  forward = on_graph | {"task.star_graph.reversed": False}
  for (kind, depth), percent in cells.items():
    method = figures.method_label(kind, depth)
    where = forward | {"mtp.kind": kind, "mtp.depth": depth}
    if kind == "none" and percent > 1:
      outcome, says = tests.is_at_chance, "stays at chance"
      rule = f"a seed is at chance within {tests.AT_CHANCE:g} of 1/{arms}"
    elif percent > 100 * tests.SOLVED:
      outcome, says = tests.is_solved, "solves it"
      rule = f"a seed solves it from {tests.SOLVED:g} of exact paths"
    else:
      outcome, says = tests.is_unsolved, "fails"
      rule = f"a seed fails below {tests.SOLVED:g} of exact paths"
    yield Claim(
      f"{kind}{depth}_{arms}_{length}",
      f"{graph}: {method} {says}",
      f"Bachmann and Nagarajan 2024, arXiv 2403.06963; {TOP}, table 5",
      f"{of}{percent:g} % exact paths (one run)",
      f"{rule}; {SHARE_RULE}",
      functools.partial(tests.share_of_seeds, where=where, outcome=outcome),
    )
  yield Claim(
    f"reversed_{arms}_{length}",
    f"{graph}: NTP solves the reversed path",
    "Bachmann and Nagarajan 2024, arXiv 2403.06963",
    NO_FIGURE,
    f"a control of few seeds: all reach {tests.SOLVED:g} of exact paths: reproduced; "
    f"none: not reproduced; else not decidable",
    functools.partial(
      tests.every_seed_solves,
      where=on_graph | tests.NTP | {"task.star_graph.reversed": True},
    ),
  )


def _floor_rule(floor: float) -> str:
  return f"{PAIRED_RULE}, nor if no arm's mean accuracy reaches {floor:g}"


def _rises_with_n(
  name: str, title: str, source: str, floor: float, preset: str
) -> Experiment:
  """A task whose accuracy is said to rise with the number of predicted tokens."""
  return Experiment(
    name, preset, title,
    "Accuracy of each seed, with mean and 95 % t interval over seeds.",
    (
      Claim(
        "rises_with_n", f"{title}: accuracy rises with n", source, NO_FIGURE,
        f"task accuracy of the most parallel heads minus NTP's, {_floor_rule(floor)}",
        functools.partial(tests.gains_on_task, floor=floor),
      ),
    ),
    figures.draw_accuracy,
  )


_sat = functools.partial(
  _rises_with_n, "sat", "3-SAT", "Huang et al. 2026, arXiv 2604.11912", 0.1
)
_countdown = functools.partial(
  _rises_with_n, "countdown", "Countdown",
  "task of Gandhi et al. 2024; NextLat, arXiv 2511.05963", 0.02,
)


def _polynomial(preset: str) -> Experiment:
  return Experiment(
    "polynomial", preset, "Polynomial arithmetic",
    "Accuracy by number of operations, mean and 95 % t interval over seeds; right of "
    "the dotted line are more operations than were trained on.",
    (
      Claim(
        "beats_ntp", "Polynomials: n = 2 beats NTP in domain",
        f"{GLOECKLE}, section 4.2", NO_FIGURE,
        "accuracy of n = 2 minus NTP's on as many operations as were trained on, "
        f"{_floor_rule(0.02)}",
        functools.partial(
          tests.gains_on_task, floor=0.02, n=2, rows=tests.in_domain_rows
        ),
      ),
    ),
    figures.draw_polynomial,
  )


def _induction(preset: str) -> Experiment:
  source = f"{GLOECKLE}, section 4.1"
  return Experiment(
    "induction", preset, "Induction: names of two tokens",
    "Accuracy against the width of the model, mean and 95 % t interval over seeds.",
    (
      Claim(
        "small_models_gain", "Induction: n = 2 beats n = 1 in the smallest model",
        source, NO_FIGURE,
        f"task accuracy of n = 2 minus NTP's at the smallest width, {_floor_rule(0.1)}",
        functools.partial(tests.induction_gain, floor=0.1),
      ),
      Claim(
        "gain_shrinks", "Induction: the gain shrinks with size", source, NO_FIGURE,
        "that difference at the smallest width minus at the largest, "
        f"{_floor_rule(0.1)}",
        functools.partial(tests.induction_gain_shrinks, floor=0.1),
      ),
    ),
    figures.draw_induction,
  )


def _acceptance(preset: str) -> Experiment:
  over = "differences averaged over widths and texts within a seed"
  falls = "sampled conditional acceptance at depth 1 minus at depth 2"
  table6 = f"{TOP}, table 6"
  return Experiment(
    "acceptance_by_depth", preset, "Acceptance by depth",
    "Share of drafts accepted, of those that were reached; sampled at temperature 1; "
    "mean and 95 % t interval over seeds.",
    (
      *(
        Claim(
          f"{kind}_falls", f"Acceptance falls from depth 1 to 2: {kind}",
          source, published, f"{falls}, {over}, {PAIRED_RULE}",
          functools.partial(tests.acceptance_falls, kind=kind),
        )
        for kind, source, published in (
          ("parallel", f"{GLOECKLE}, table S2",
           "tokens per forward on Wikipedia with 2 / 3 / 4 heads, 7B, greedy: 1.88 / "
           "2.57 / 3.12"),
          ("sequential", f"{DEEPSEEK}, section 5.4.3",
           "depth 1 only: 85 to 90 %, sampling not described"),
        )
      ),
      Claim(
        "sequential_more", "Sequential modules accept more than parallel heads",
        table6,
        "accepted tokens per pass on Wikipedia, 4 heads, 340M / 1.8B / 7B: parallel "
        "2.15 / 2.27 / 2.39, sequential 2.81 / 2.96 / 3.03",
        f"sequential minus parallel at depth 2 and at depth 3, {over}, {PAIRED_RULE}; "
        "both must hold",
        tests.sequential_accepts_more,
      ),
      Claim(
        "rises_with_width", "Acceptance rises with size", table6,
        "accepted tokens per pass on Wikipedia, 340M / 1.8B / 7B: parallel 2.15 / 2.27 "
        "/ 2.39, sequential 2.81 / 2.96 / 3.03",
        "largest width minus smallest, differences averaged over texts and depths "
        f"within a seed, {PAIRED_RULE}; both kinds must hold",
        tests.acceptance_rises,
      ),
    ),
    figures.draw_acceptance,
  )


def _schedules(preset: str) -> Experiment:
  return Experiment(
    "schedules", preset, "Schedules of lambda",
    "What a schedule costs in next-token loss against the tokens per round that it "
    "keeps; mean and 95 % t interval over seeds.",
    (
      *(
        Claim(
          f"{arm}_closes_half", f"Half of the next-token penalty is closed by {arm}",
          AYNETDINOV, NO_FIGURE,
          "parallel n = 4; penalty of the schedule minus half of the constant "
          "lambda's, paired by seed; the whole 95 % t interval lies below 0: "
          "reproduced; above 0: not; else, or if the constant's own penalty is not "
          "above 0, not decidable",
          functools.partial(tests.closes_half_of_penalty, arm=arm),
        )
        for arm in ("anneal", "reverse")
      ),
      Claim(
        "forward_keeps_drafts", "Of the curricula only forward keeps the drafts",
        AYNETDINOV, NO_FIGURE,
        "parallel n = 4; sampled tokens per round over those of the constant lambda, "
        f"by seed; the 95 % t interval lies above {tests.KEEPS_DRAFTS:g} for forward "
        "and below it for anneal and reverse; all must hold",
        tests.forward_keeps_drafts,
      ),
    ),
    figures.draw_schedules,
  )


def _bytes_or_bpe(preset: str) -> Experiment:
  return Experiment(
    "bytes_or_bpe", preset, "Bytes or BPE",
    "Bits per byte more than NTP's, mean and 95 % t interval over seeds.",
    tuple(
      Claim(
        f"bytes_pay_less_{n}", f"Bytes pay less for n = {n} than BPE",
        f"{AYNETDINOV}; {GLOECKLE}, table 1", published,
        f"penalty of n = {n} in bits per byte on BPE minus on bytes, {PAIRED_RULE}",
        functools.partial(tests.bytes_pay_less, n=n),
      )
      for n, published in (
        (4, NO_FIGURE),
        (8, "pass rates only, 7B, n = 1 and 8, MBPP pass@1: bytes 19.3 and 32.3 %, "
            "subwords 30.0 and 30.7 %"),
      )
    ),
    figures.draw_bytes,
  )


def _data_repetition(preset: str) -> Experiment:
  return Experiment(
    "data_repetition", preset, "Repeated text",
    "Gain in next-token loss against the share of documents that was held out of "
    "training (the more, the more epochs); mean and 95 % t interval over seeds.",
    tuple(
      Claim(
        f"shrinks_{n}", f"Repetition shrinks the gain of n = {n}",
        f"{GLOECKLE}, table 1", published,
        "NTP's main loss minus that of the parallel heads, with the most documents "
        f"minus with the fewest (most epochs), {PAIRED_RULE}",
        functools.partial(tests.repetition_shrinks_gain, n=n),
      )
      for n, published in (
        (2, NO_FIGURE),
        (4, "pass rates only, 7B, gain in MBPP pass@1: +3.8 points at 0.8 epochs "
            "(200B tokens), +2.4 at 4 epochs (1T tokens)"),
      )
    ),
    figures.draw_repetition,
  )


def _hidden_source(preset: str) -> Experiment:
  source, published = "our own question", "nothing"
  rule = "sequential D = 2; sampled conditional acceptance"
  return Experiment(
    "hidden_source", preset, "What a sequential module is fed",
    "Acceptance by depth and next-token loss; one dot a seed, mean and 95 % t "
    "interval.",
    (
      Claim(
        "chained_more", "A chained state drafts the second token better", source,
        published, f"{rule} at depth 2, chained minus trunk, {PAIRED_RULE}",
        tests.chained_accepts_more, is_published=False,
      ),
      Claim(
        "embedding_helps", "Without the embedding the first draft is worse", source,
        published, f"{rule} at depth 1, fed true minus fed none, {PAIRED_RULE}",
        tests.embedding_helps, is_published=False,
      ),
      Claim(
        "norm_is_neutral", "The norm before or after makes no difference to the loss",
        source, published,
        "main loss, hidden_norm before minus after, averaged over chained and trunk "
        "within a seed; the 95 % t interval over seeds contains 0: as expected; else "
        "not as expected",
        tests.norm_does_not_matter, is_published=False,
      ),
    ),
    figures.draw_hidden,
  )


def _drafters(preset: str) -> Experiment:
  own, nothing = "our own question", "nothing"
  of = "sampled tokens per round of {}, averaged over widths within a seed"
  minus = f"{of.format('the first minus the second')}, {PAIRED_RULE}"

  def more(
    key: str, statement: str, *arms: str, source: str = own, published: str = nothing,
    by: float = 0.0, side: str = "above",
  ) -> Claim:
    rule = minus
    if by:
      rule = (
        f"{of.format('the first minus the second')}; the 95 % t interval over seeds "
        f"lies {side} {by:g}"
      )
    return Claim(
      key, statement, source, published, f"{' against '.join(arms)}: {rule}",
      functools.partial(drafters.brings_more, more=arms[0], less=arms[1], by=by,
                        side=side),
      is_published=source != own,
    )

  return Experiment(
    "drafters", preset, "Drafters trained after the fact and jointly",
    "Mean and 95 % t interval over seeds. All draft three tokens a round; those "
    "without 'joint' were trained on the frozen trunk of an NTP run.",
    (
      Claim(
        "keeps_of_joint", "Modules trained after the fact draft about as well", own,
        nothing,
        f"{of.format('modules on a frozen trunk over that of joint ones')}; the 95 % "
        f"t interval over seeds lies above {drafters.NEAR:g}",
        drafters.keeps_of_joint, is_published=False,
      ),
      Claim(
        "medusa_few", f"Medusa brings at most {drafters.FEW_TOKENS:g} tokens a round",
        own, nothing,
        f"{of.format('Medusa on a frozen trunk')}; the 95 % t interval over seeds lies "
        f"below {drafters.FEW_TOKENS:g}",
        drafters.medusa_brings_little, is_published=False,
      ),
      more("modules_more", "Modules draft better than Medusa", "modules", "medusa"),
      more(
        "medusa_jointly", "Training Medusa jointly adds little", "medusa, joint",
        "medusa", by=drafters.LITTLE, side="below",
      ),
      Claim(
        "price", "Joint modules and Medusa cost the trunk little, heads more", own,
        nothing,
        "main loss minus NTP's, averaged over widths within a seed; the 95 % t "
        "intervals over seeds lie "
        + ", ".join(
          f"{'above' if 'parallel' in arm else 'below'} {bound:g} for {arm}"
          for arm, bound in drafters.PRICES.items()
        ),
        drafters.price_of_joint, is_published=False,
      ),
      more(
        "eagle3_more", "EAGLE-3 drafts better than EAGLE-1", "eagle3", "eagle",
        source="Li et al. 2025, arXiv 2503.01840", published=NO_FIGURE,
      ),
      more(
        "eagle3_is_module", "EAGLE-3 drafts no better than one module trained on KL",
        "eagle3", "module, KL", by=0.05, side="below",
      ),
      more("kl_more", "KL to the trunk drafts better than cross-entropy", "module, KL",
           "module"),
      more(
        "lk_more", "LK losses draft better than KL", "module, LK", "module, KL",
        source="arXiv 2602.23881",
        published="up to 8 to 10 % more accepted length, 8B to 685B",
      ),
      more(
        "written_more", "Text that the trunk wrote is better to learn from",
        drafters.WRITTEN, "module, KL",
      ),
    ),
    drafters.draw, table=drafters.table,
  )


def _gains_with_scale(preset: str) -> Experiment:
  late = " (a rule that was written after this run)" if preset == "cpu" else ""
  slope = (
    "slope of the gain (NTP minus MTP main loss at equal tokens) per decade of "
    "parameters, one line a seed; the whole 95 % t interval over seeds lies above 0: "
    f"reproduced; below 0: not reproduced; else not decidable{late}"
  )
  lambada = "LAMBADA perplexity, 340M / 1.8B / 7B: NTP 30.34 / 11.38 / 7.97"
  return Experiment(
    "gains_with_scale", preset, "Gains with size",
    "Gain over NTP at equal tokens in nats per token, mean and 95 % t interval over "
    "seeds.",
    (
      Claim(
        "heads_cost", "Parallel heads of weight 1 cost next-token loss",
        f"{TOP}, table 2", f"{lambada}, parallel n = 4 35.31 / 13.69 / 8.99",
        "gain at equal tokens of D = 1 and D = 3, paired by seed; the 95 % t interval "
        "over seeds lies below 0 at every size: reproduced; above 0 at one: not "
        f"reproduced; else not decidable{late}",
        tests.heads_cost_loss,
      ),
      Claim(
        "more_heads_cost_more", "More parallel heads cost more next-token loss",
        "NextLat, arXiv 2511.05963, table 2", NO_FIGURE,
        "gain of D = 3 minus gain of D = 1, paired by seed; the 95 % t interval over "
        "seeds lies below 0 at every size: reproduced; above 0 at one: not "
        f"reproduced; else not decidable{late}",
        tests.more_heads_cost_more,
      ),
      *(
        Claim(
          f"{kind}{depth}_grows", f"Gains grow with size: {kind} D={depth}",
          source, published, slope,
          functools.partial(tests.gain_grows_with_size, kind=kind, depth=depth),
        )
        for kind, depth, source, published in (
          ("parallel", 1, f"{GLOECKLE}, table S7", _pass_rates(2)),
          ("parallel", 3, f"{GLOECKLE}, table S7", _pass_rates(4)),
          ("sequential", 1, f"{DEEPSEEK}, table 4",
           "bits per byte on the Pile, without and with D = 1: 0.729 and 0.729 (15.7B "
           "parameters), 0.658 and 0.657 (228.7B)"),
          ("sequential", 3, f"{TOP}, table 2",
           f"{lambada}, sequential D = 3 of weight 1 40.99 / 13.32 / 8.52"),
        )
      ),
    ),
    figures.draw_gains,
    results_lib.read_ladder,
  )


def _pass_rates(n: int) -> str:
  """The ends of the published ladder."""
  rows = published_gains()
  rows = rows[(rows["n"] == n) & (rows["benchmark"] == "MBPP@1")].set_index("size")
  ends = ", ".join(
    f"{rows['gain'][size]:+.1f} at {size / 1e9:g}B"
    for size in (rows.index.min(), rows.index.max())
  )
  return f"pass rates only, gain of n = {n} in points of MBPP pass@1: {ends}"
