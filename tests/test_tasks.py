"""Tasks as data sources: what is drawn, what is scored, what counts as right."""

import collections
import copy
import dataclasses
import hashlib
import itertools
import time

import numpy as np
import pytest

from experiments import base
from mtp_jax import config as config_lib
from mtp_jax import config_rules, generative_metrics
from mtp_jax.config import TASKS, ConfigError
from mtp_jax.data import sources
from mtp_jax.data.pipeline import TrainLoader, load_corpus
from mtp_jax.data.tasks import corpus as corpus_lib
from mtp_jax.data.tasks import countdown, polynomial
from mtp_jax.data.tasks.corpus import Examples, TaskCorpus, make_task
from mtp_jax.data.tokenizers import SymbolTokenizer, tokenizer_from_json
from mtp_jax.decode.generate import Completion
from mtp_jax.targets import future_targets

SMALL = {
  "task.star_graph.arms": 3,
  "task.star_graph.length": 4,
  "task.sat.num_variables": 4,
  "task.sat.num_clauses": 6,
  "task.countdown.num_inputs": 3,
  "task.countdown.num_pauses": 2,
  "task.polynomial.max_operators": 2,
  "task.polynomial.held_out_operators": 3,
  "task.induction.num_sentences": 4,
  "task.induction.num_halves": 6,
  "task.induction.num_names": 12,
  "task.siblings.num_parents": 3,
  "task.siblings.num_children": 5,
  "task.siblings.prefix_length": 4,
}


# No fraction of the prompts is held out: their examples are made apart for each split.
UNSPLIT = ("siblings", "induction")


def config_of(source: str, **overrides) -> config_lib.Config:
  own = ("task.num_train", f"task.{source}.")
  values = SMALL | {
    "data.source": source,
    "tokenizer.kind": "symbols",
    "data.seq_len": 128,
    "data.batch_size": 4,
    "data.validation_fraction": 0.2,
    "data.test_fraction": 0.1,
    "eval.num_rows": 5,
    "eval.batch_size": 2,
  }
  values |= {key.replace("__", "."): value for key, value in overrides.items()}
  values = {  # The settings of another task have no effect, and are refused.
    k: x for k, x in values.items() if not k.startswith("task.") or k.startswith(own)
  }
  default = config_lib.from_config_dict(base.get_config())
  if source in UNSPLIT:
    values = {k: x for k, x in values.items() if not k.endswith("_fraction")}
  config = config_lib.with_overrides(default, values)
  config_rules.validate(config)
  return config


def corpus_of(source: str, **overrides) -> TaskCorpus:
  return load_corpus(config_of(source, **overrides))


def examples_of(source: str, split: str, count: int, seed: int = 0) -> list:
  config = config_of(source)
  task = make_task(source, config.task)
  examples = Examples(task, config.data, split, seed)
  return [examples[number] for number in range(count)]


@pytest.mark.parametrize("source", TASKS)
def test_examples_keep_what_the_task_promises(source):
  config = config_of(source)
  task = make_task(source, config.task)
  for split in ("train", "validation", "test"):
    for prompt, answer in examples_of(source, split, 60):
      assert {*prompt, *answer} <= set(task.symbols)
      assert len(prompt) + len(answer) <= task.max_tokens
      if split != "train":
        assert len(prompt) <= task.max_prompt
        assert len(answer) <= task.max_answer
      if split != "train" or task.splits_by_prompt:
        assert task.is_correct(prompt, answer)
        assert not task.is_correct(prompt, ())
        assert not task.is_correct(prompt, answer[:-1])
        assert not task.is_correct(prompt, (*answer, answer[-1]))
  assert len(set(task.symbols)) == len(task.symbols)


@pytest.mark.parametrize("source", TASKS)
def test_the_nth_example_depends_on_seed_split_and_number_alone(source):
  first = examples_of(source, "train", 20)
  assert first == examples_of(source, "train", 20)
  assert first[::-1] == examples_of(source, "train", 20)[::-1]
  for other in (
    examples_of(source, "train", 20, seed=1), examples_of(source, "test", 20)
  ):
    assert sum(a == b for a, b in zip(first, other, strict=True)) <= 1
  assert len(set(first)) > 15


@pytest.mark.parametrize("source", ["star_graph", "sat", "countdown", "polynomial"])
def test_no_held_out_prompt_is_ever_trained_on(source):
  # A space so small that the splits would meet if the hash did not keep them apart.
  tiny = {
    "task__star_graph__arms": 2, "task__star_graph__length": 2,
    "task__star_graph__num_labels": 4, "task__sat__num_clauses": 1,
    "task__countdown__num_inputs": 2, "task__polynomial__held_out_operators": 1,
    "task__polynomial__max_operators": 1, "task__countdown__largest": 12,
  }
  config = config_of(source, **tiny)
  task = make_task(source, config.task)
  prompts = {}
  for split in ("train", "validation", "test"):
    examples = Examples(task, config.data, split, 0)
    prompts[split] = collections.Counter(examples[n].prompt for n in range(300))
  if source != "polynomial":
    assert len(prompts["train"]) < 290  # It is that small.
  for a, b in itertools.combinations(prompts.values(), 2):
    assert not a.keys() & b.keys()


def test_star_graphs_are_stars_and_every_arm_is_likely():
  goal_position = collections.Counter()
  for prompt, answer in examples_of("star_graph", "train", 600):
    text = " ".join(prompt)
    edges_text, question = text.removesuffix(" =").split(" / ")
    edges = [tuple(edge.split()) for edge in edges_text.split(" | ")]
    source, goal = question.split()
    assert len(edges) == 9
    children = collections.Counter(a for a, _ in edges)
    assert children.pop(source) == 3
    assert set(children.values()) == {1}
    assert len({b for _, b in edges}) == 9
    assert (answer[0], answer[-1]) == (source, goal)
    assert all(edge in edges for edge in itertools.pairwise(answer))
    assert len(answer) == 4
    firsts = [b for a, b in edges if a == source]
    goal_position[firsts.index(answer[1])] += 1
  # The right arm is no likelier first, second or third among the edges: 200 +- 4 sd.
  assert all(abs(count - 200) < 46 for count in goal_position.values())


def test_star_graph_of_the_page_and_reversed():
  prompt = tuple("4 1 | 2 7 | 1 9 | 4 2 / 4 7 =".split())
  for is_reversed, answer in ((False, "4 2 7"), (True, "7 2 4")):
    config = config_of(
      "star_graph", task__star_graph__arms=2, task__star_graph__length=3,
      task__star_graph__reversed=is_reversed,
    )
    task = make_task("star_graph", config.task)
    assert task.is_correct(prompt, tuple(answer.split()))
    for wrong in ("4 1 7", "4 1 9", "2 7", "7 4 2", "4 2 7 9"):
      assert not task.is_correct(prompt, tuple(wrong.split()))
    drawn = Examples(task, config.data, "train", 0)[0]
    end = drawn.prompt[-3:-1]
    assert (drawn.answer[0], drawn.answer[-1]) == (end[::-1] if is_reversed else end)


def test_sat_agrees_with_trying_every_assignment():
  config = config_of("sat")
  task = make_task("sat", config.task)
  for prompt, _ in examples_of("sat", "train", 30):
    clauses = " ".join(prompt).removesuffix(" =").split(" , ")
    assert len(clauses) == 6
    assert all(len({x[1:] for x in clause.split()}) == 3 for clause in clauses)
    for signs in itertools.product("+-", repeat=4):
      answer = tuple(f"{sign}{i}" for i, sign in enumerate(signs, start=1))
      holds = all(any(x in answer for x in clause.split()) for clause in clauses)
      assert task.is_correct(prompt, answer) == holds
  assert not task.is_correct(prompt, ("+2", "+1", "+3", "+4"))


def solutions(prompt: tuple[str, ...], num_variables: int) -> list[tuple[str, ...]]:
  """An oracle of its own: every assignment that satisfies a formula."""
  clauses = " ".join(prompt).removesuffix(" =").split(" , ")
  every = itertools.product(*((f"+{i}", f"-{i}") for i in range(1, 1 + num_variables)))
  return [x for x in every if all(set(clause.split()) & {*x} for clause in clauses)]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_unique_formulas_have_one_solution(split):
  many = {"task__sat__num_variables": 5, "task__sat__num_clauses": 20}
  counts = []
  for unique in (False, True):
    config = config_of("sat", task__sat__unique=unique, **many)
    task = make_task("sat", config.task)
    examples = Examples(task, config.data, split, 0)
    found = [(x, solutions(x.prompt, 5)) for x in (examples[n] for n in range(40))]
    assert all(answer in right for (_, answer), right in found)
    counts.append([len(right) for _, right in found])
  assert sum(x == 1 for x in counts[0]) < 20  # 11 % of all formulas.
  assert counts[1] == [1] * 40


def test_sat_draws_every_clause_alike():
  config = config_of("sat", task__sat__num_variables=5, task__sat__num_clauses=1)
  task = make_task("sat", config.task)
  words = np.random.default_rng(0).integers(2**64, size=(33_600, 9), dtype=np.uint64)
  symbols, is_valid = task.draw(words)
  assert is_valid.all()
  texts = np.array(task.symbols)[symbols].tolist()
  clauses = collections.Counter(tuple(text[:3]) for text in texts)
  assert len(clauses) == 5 * 4 * 3 * 8  # Ordered variables, and signs.
  assert all(abs(count - 70) < 42 for count in clauses.values())  # 5 sd.
  # Which literals are true: all but none of them, alike.
  patterns = collections.Counter(
    tuple(literal in text[4:] for literal in text[:3]) for text in texts
  )
  assert len(patterns) == 7
  assert all(abs(count - 4800) < 325 for count in patterns.values())


def test_sat_baselines_of_one_formula_and_of_many():
  task = make_task("sat", config_of("sat", task__sat__num_variables=3).task)
  right = tuple("+1 +2 -3 , +1 -2 -3 , -1 +2 -3 =".split())
  # More often +1, +2 (twice each) and -3.
  assert task.baselines([right]) == {"majority": 1.0, "coin": 5 / 8}
  wrong = tuple("-1 -2 +3 , +1 +2 -3 , +1 -2 -3 , +1 +2 -3 , -1 +2 -3 =".split())
  assert len(solutions(wrong, 3)) == 4
  assert task.baselines([wrong]) == {"majority": 0.0, "coin": 4 / 8}
  tie = tuple("+1 +2 +3 , -1 -2 -3 =".split())  # Ties are +: the second clause fails.
  assert task.baselines([tie]) == {"majority": 0.0, "coin": 6 / 8}
  two = [(*tie[:4], *tie[:4], *tie[4:]), right]  # +1 +2 +3 twice.
  assert task.baselines(two) == {"majority": 0.5, "coin": (6 / 8 + 5 / 8) / 2}
  # 5 variables, 15 clauses: what the rules solved in a simulation of another program.
  config = config_of(
    "sat", task__sat__num_variables=5, task__sat__num_clauses=15,
    eval__task_examples=1500,
  )
  corpus = load_corpus(config)
  prompts = [x.prompt for x in corpus.held_out(1500)]
  found = corpus.task.baselines(prompts)
  assert found["majority"] == pytest.approx(0.523, abs=0.05)
  assert found["coin"] == pytest.approx(5.2 / 32, abs=0.02)
  assert found["coin"] == pytest.approx(
    np.mean([len(solutions(prompt, 5)) / 32 for prompt in prompts[:1500]])
  )
  large = make_task("sat", config_of("sat", task__sat__num_variables=11).task)
  assert set(large.baselines([right])) == {"majority"}


def test_countdown_checks_every_step():
  task = make_task("countdown", config_of("countdown").task)
  prompt = (*"25,4,7|93=", "<pause>", "<pause>")
  right = ("25*4=100,100-7=93", "25*4=100,100-7=93")
  for answer in right:
    assert task.is_correct(prompt, tuple(answer))
  for wrong in (
    "25*4=100,100-7=94", "25*4=101,101-7=94", "25*4=100", "100-7=93", "25*4=100,,",
    "25*4=100,100-7=93,93/1=93", "25*4=0100,100-7=93", "4*25=100,7-100=93", "",
    "25+4=29,100-7=93", "25/4=6,6*7=42", "25*4=100,100-7=", "=", "1-2-3=4", "7/0=1",
    "25*4=" + "9" * 5000,
  ):
    assert not task.is_correct(prompt, tuple(wrong))
  assert not task.is_correct(prompt, ("<pause>",))


def test_countdown_answers_reach_the_target_from_the_inputs():
  for prompt, answer in examples_of("countdown", "train", 100):
    inputs, target = "".join(prompt[:-2]).removesuffix("=").split("|")
    values = [int(x) for x in inputs.split(",")]
    assert prompt[-2:] == ("<pause>",) * 2
    assert len(values) == 3
    assert 10 <= int(target) <= 100
    assert "".join(answer).endswith(f"={target}")
    assert reachable(values, int(target))


def reachable(values: list[int], target: int) -> bool:
  """An oracle of its own: whether any expression of all values gives the target."""
  if len(values) == 1:
    return values[0] == target
  for i, j in itertools.permutations(range(len(values)), 2):
    rest = [x for k, x in enumerate(values) if k not in (i, j)]
    a, b = values[i], values[j]
    results = [a + b, a * b] + [a - b] * (a > b) + [a // b] * (a % b == 0)
    if any(reachable([*rest, x], target) for x in results):
      return True
  return False


def test_polynomials_agree_with_numpy_and_with_values():
  rng = np.random.default_rng(0)
  for _ in range(50):
    a, b = rng.integers(7, size=(2, 5))
    p, q = np.polynomial.Polynomial(a), np.polynomial.Polynomial(b)

    def coefficients(x):
      whole = np.zeros(20, int)
      whole[: len(x.coef)] = np.rint(x.coef)
      return (whole[:5] % 7).tolist()

    assert polynomial.add(a, b).tolist() == coefficients(p + q)
    assert polynomial.multiply(a, b).tolist() == coefficients(p * q)
    assert polynomial.compose(a, b).tolist() == coefficients(p(q))
    assert polynomial.add(a, polynomial.negate(a)).tolist() == [0] * 5


def test_polynomial_of_the_page_and_its_groups():
  task = make_task("polynomial", config_of("polynomial").task)
  prompt = tuple("( ( n 3 0 0 6 1 ) * 1 2 0 0 0 ) =".split())
  # (-3 - 6 x^3 - x^4) (1 + 2 x) = -3 - 6 x - 6 x^3 - 13 x^4 + ...
  assert task.is_correct(prompt, tuple("41011"))
  assert not task.is_correct(prompt, tuple("41010"))
  assert task.group(prompt) == "operators=2"
  groups = {
    split: collections.Counter(
      task.group(x.prompt) for x in examples_of("polynomial", split, 300)
    )
    for split in ("train", "test")
  }
  assert set(groups["train"]) == {"operators=1", "operators=2"}
  assert set(groups["test"]) == {f"operators={n}" for n in (1, 2, 3)}
  # Uniform: 100 of 300 each, 5 standard deviations.
  assert all(abs(count - 100) < 41 for count in groups["test"].values())


def test_siblings_share_a_parent():
  task = make_task("siblings", config_of("siblings").task)
  for prompt, answer in examples_of("siblings", "train", 100):
    assert len(prompt) == 5
    first, second, parent = answer
    assert first != second
    assert task.is_correct(prompt, answer)
    assert task.is_correct(prompt, (second, first, parent))
    for wrong in (
      (first, first, parent), (first, parent, second), (first, second, ":"),
      (first, second, f"p{(int(parent[1:]) + 1) % 3}"),
    ):
      assert not task.is_correct(prompt, wrong)


def test_induction_asks_for_new_names_of_known_words():
  stories = examples_of("induction", "train", 800)
  words = {word for x in stories for word in x.answer}
  pairs = {
    pair
    for x in stories
    for pair in itertools.pairwise(x.answer)
    if pair[0].startswith("first")
  }
  assert len(pairs) <= 12
  task = make_task("induction", config_of("induction").task)
  assert all(x.prompt == ("<story>",) for x in stories)
  assert {f"{x}{i}" for x in ("first", "second") for i in range(6)} <= words
  for prompt, answer in examples_of("induction", "validation", 200):
    name = (prompt[-1], *answer)
    assert name not in pairs
    assert prompt[-1].startswith("first")
    assert name in set(itertools.pairwise(prompt))
    assert {*prompt[1:], *answer} <= set(task.symbols)


def names_of(examples: list) -> list[list[tuple[str, str]]]:
  """Returns the different names of each story."""
  return [
    sorted({
      pair
      for pair in itertools.pairwise((*example.prompt, *example.answer))
      if pair[0].startswith("first")
    })
    for example in examples
  ]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_stories_has_fresh_names(share):
  config = config_of(
    "induction", task__induction__num_halves=20, task__induction__num_names=40,
    task__induction__fresh_share=share,
  )
  task = make_task("induction", config.task)

  def stories(split, count):
    examples = Examples(task, config.data, split, 0)
    return names_of([examples[number] for number in range(count)])

  train, held_out = stories("train", 2000), stories("test", 400)
  shift = lambda x: (int(x[1][6:]) - int(x[0][5:])) % 20  # noqa: E731
  assert all(len({first for first, _ in names}) == len(names) for names in train)
  trained = {name for names in train for name in names}
  tested = {name for names in held_out for name in names}
  assert not trained & tested
  # 40 names are 2 of 20 shifts. Of the 18 others, 1 is held out, or all without fresh.
  assert {shift(x) for x in tested} == ({19} if share else set(range(2, 20)))
  assert len({x[0] for x in tested}) == 20
  assert {shift(x) for x in trained} == (set(range(19)) if share else {0, 1})
  # A story with fresh names seldom has none but names of the list: (2 / 19)^2.
  fresh = np.mean([any(shift(x) > 1 for x in names) for names in train])
  assert fresh == pytest.approx(share * (1 - (2 / 19) ** 2), abs=0.06)
  if share == 1:  # All alike, the names of the list too.
    counts = collections.Counter(x for names in train for x in names)
    assert len(counts) > 370
    assert max(counts.values()) < 30


def test_stories_without_fresh_names_are_what_they_were():
  digests = [
    hashlib.sha256(repr(examples_of("induction", split, 50)).encode()).hexdigest()[:16]
    for split in ("train", "validation")
  ]
  assert digests == ["00627eb262351007", "86c50d858d0c3faa"]


@pytest.mark.parametrize("source", TASKS)
def test_many_examples_at_once_are_those_drawn_alone(source, monkeypatch):
  corpus = corpus_of(source, data__validation_fraction=0.5)
  numbers = np.array([3, 0, 41, 3, 2**40, 7, *range(100, 130)])

  def alone(examples):
    return [corpus.encode(examples[number]) for number in numbers.tolist()]

  def at_once(examples):
    rows = zip(*examples.encoded(numbers), strict=True)
    return [(tokens[:length], first) for tokens, length, first in rows]

  for split in ("train", "test"):  # Of "test" most draws are of another split.
    examples = Examples(corpus.task, corpus.config.data, split, seed=5)
    expected = alone(examples)
    for most in (4096, 7):
      monkeypatch.setattr(corpus_lib, "_MOST_DRAWS", most)
      for (ids, first), (expected_ids, expected_first) in zip(
        at_once(examples), expected, strict=True
      ):
        assert ids.tolist() == expected_ids.tolist()
        assert ids.dtype == np.int32
        assert first == expected_first


def test_drawn_examples_are_the_same_on_every_machine():
  """Literal values: another NumPy or processor would draw them too."""
  golden = 0x9E3779B97F4A7C15
  counts = np.array([golden, 2 * golden % 2**64], np.uint64)
  # The first outputs of SplitMix64 from seed 0, as published.
  assert sources.mix(counts).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
  star, siblings = (
    examples_of(source, "train", 1)[0] for source in ("star_graph", "siblings")
  )
  assert " ".join(star.prompt + star.answer) == (
    "20 21 | 15 13 | 24 15 | 13 18 | 25 29 | 26 20 | 24 25 | 29 9 | 24 26 "
    "/ 24 18 = 24 15 13 18"
  )
  assert " ".join(siblings.prompt + siblings.answer) == "n i d i : c4 c10 p1"


def test_siblings_are_drawn_uniformly():
  drawn = collections.Counter(x.answer for x in examples_of("siblings", "train", 6000))
  assert len(drawn) == 3 * 5 * 4  # Ordered pairs of every parent.
  assert all(abs(count - 100) < 50 for count in drawn.values())  # 5 sd.
  letters = collections.Counter(
    x for example in examples_of("siblings", "train", 650) for x in example.prompt[:-1]
  )
  assert len(letters) == 26
  assert all(abs(count - 100) < 50 for count in letters.values())


def test_hosts_share_the_examples_of_one_host():
  rows = corpus_of("star_graph").train_rows(1)

  def batches(**hosts):
    loader = TrainLoader(rows, batch_size=4, seed=0, **hosts)
    taken = [next(loader).tokens for _ in range(3)]
    loader.close()
    return taken

  parts = [batches(host_index=i, num_hosts=2) for i in range(2)]
  for alone, *together in zip(batches(), *parts, strict=True):
    assert alone.tolist() == np.concatenate(together).tolist()


def test_every_epoch_has_every_example_once_in_an_order_of_its_own():
  rows = corpus_of("siblings", task__num_train=10, data__seq_len=10).train_rows(1)
  assert len(rows) == 10  # One example to a row.
  loader = TrainLoader(rows, batch_size=4, seed=0)
  seen = np.concatenate([next(loader).tokens for _ in range(10)])  # Four epochs.
  loader.close()
  expected = sorted(rows.read(np.arange(10)).tokens.tolist())
  epochs = [epoch.tolist() for epoch in np.split(seen, 4)]
  assert all(sorted(epoch) == expected for epoch in epochs)
  assert len({str(epoch) for epoch in epochs}) == 4
  orders = [rows.order(seed, 0, 40).tolist() for seed in (0, 0, 1)]
  assert orders[0] == orders[1] != orders[2]
  assert orders[0][13:17] == rows.order(0, 13, 17).tolist()


def test_a_small_training_set_is_in_order_at_once():
  """The loader's own shuffle takes 0.1 ms for each of 300 rows: half of a step."""
  rows = corpus_of("siblings", task__num_train=300, data__seq_len=10).train_rows(1)
  rows.read(rows.order(0, 0, 64))
  begin = time.process_time()
  for step in range(50):
    rows.order(0, 64 * step, 64 * step + 64)
  assert time.process_time() - begin < 50 * 0.001  # 50 * 0.008 before.


@pytest.mark.parametrize("source", ["star_graph", "siblings", "sat"])
def test_a_run_on_examples_that_were_drawn_otherwise_does_not_resume(source):
  loader = TrainLoader(corpus_of(source).train_rows(1), batch_size=4, seed=0)
  state = copy.deepcopy(loader.get_state())
  del state["identity"]["draws"]  # As it was before examples were drawn together.
  with pytest.raises(sources.DataError, match="draws: None there, 'splitmix64' now"):
    loader.set_state(state)


@pytest.mark.parametrize("source", ["star_graph", "polynomial"])
def test_rows_hold_whole_examples_and_score_answers_only(source):
  corpus = corpus_of(source)
  row = corpus.train_rows(4)[7]
  assert corpus.per_row >= 2
  tokens = np.concatenate([row.tokens, row.next_tokens])
  segments = np.concatenate([row.segment_ids, row.next_segment_ids])
  scored = np.concatenate([row.scored, row.next_scored])
  assert len(tokens) == 132
  for i in range(corpus.per_row):
    example = corpus.train_examples[7 * corpus.per_row + i]
    here = segments == i + 1
    ids = tokens[here]
    assert (ids[0], ids[-1]) == (corpus.tokenizer.bos_id, corpus.tokenizer.eos_id)
    assert corpus.tokenizer.decode_symbols(ids) == example.prompt + example.answer
    assert row.positions[here[:128]].tolist() == list(range(here.sum()))
    expected = np.arange(len(ids)) >= 1 + len(example.prompt)
    assert scored[here].tolist() == expected.tolist()
  assert not scored[segments == 0].any()
  assert segments.max() == corpus.per_row
  # And padding behind them, which attention takes for another document.
  assert corpus.train_rows(0).most_documents == corpus.per_row + 1


def test_targets_are_the_answers_and_never_cross_an_example():
  """Every target of every depth, by a double loop over what the examples say."""
  corpus = corpus_of("countdown")
  loader = TrainLoader(corpus.train_rows(4), batch_size=3, seed=0)
  batch = next(loader)
  loader.close()
  targets_MBT, mask_MBT = (np.asarray(x) for x in future_targets(batch, 3))
  total = 0
  for m, b, i in itertools.product(range(4), range(3), range(128)):
    j = i + 1 + m
    tokens = [*batch.tokens[b], *batch.next_tokens[b]]
    segments = [*batch.segment_ids[b], *batch.next_segment_ids[b]]
    # What comes after the last pause of an example, its end included.
    pause = corpus.tokenizer.encode("<pause>")[0]
    own = [k for k, s in enumerate(segments) if s == segments[i] != 0]
    pauses = [k for k in own if tokens[k] == pause]
    is_target = j in own and j > max(pauses)
    assert mask_MBT[m, b, i] == is_target
    if is_target:
      assert targets_MBT[m, b, i] == tokens[j]
      total += 1
  assert total > 100


def test_the_tasks_with_new_answers_are_named():
  tasks = {x: make_task(x, config_of(x).task) for x in TASKS}
  expected = {x for x, task in tasks.items() if not task.splits_by_prompt}
  assert set(config_lib.TASKS_WITH_NEW) == expected


def test_a_training_set_with_an_end_is_repeated_whole():
  corpus = corpus_of("star_graph", task__num_train=10, data__seq_len=64)
  rows = corpus.train_rows(1)
  assert corpus.per_row == 1
  assert len(rows) == 10
  seen = [rows[number].tokens.tobytes() for number in range(20)]
  assert len(set(seen)) == 10
  assert seen[:10] == seen[10:]
  endless = corpus_of("star_graph", data__seq_len=64).train_rows(1)
  assert len(endless) > 1e9
  assert endless[0].tokens.tobytes() == seen[0]


def test_a_loader_goes_on_with_the_next_examples():
  rows = corpus_of("sat").train_rows(1)
  loader = TrainLoader(rows, batch_size=4, seed=0)
  first = [next(loader) for _ in range(3)]
  state = loader.get_state()
  following = next(loader)
  again = TrainLoader(rows, batch_size=4, seed=0)
  again.set_state(state)
  assert next(again).tokens.tolist() == following.tokens.tolist()
  loader.close()
  again.close()
  everything = np.concatenate([x.tokens for x in (*first, following)])
  assert len({row.tobytes() for row in everything}) == 16


def test_evaluation_has_one_example_a_row():
  corpus = corpus_of("star_graph")
  batches = list(corpus.eval_batches(2))
  owners = np.concatenate([owners for _, owners in batches])
  assert owners.tolist() == [0, 1, 2, 3, 4, -1]
  assert not batches[-1][0].segment_ids[1].any()
  # All trials are examined alike, whatever they are trained on.
  other = list(corpus_of("star_graph", data__seed=5).eval_batches(2))
  for (a, _), (b, _) in zip(batches, other, strict=True):
    assert a.tokens.tolist() == b.tokens.tolist()
  assert corpus.identity != corpus_of("star_graph", data__seed=5).identity


def test_symbols_go_to_ids_and_back():
  tokenizer = SymbolTokenizer(("a", "b", "|"))
  assert tokenizer.encode("b | a").tolist() == [3, 4, 2]
  assert tokenizer.decode([0, 3, 4, 1, 99]) == "b |"
  again = tokenizer_from_json(tokenizer.to_json())
  assert isinstance(again, SymbolTokenizer)
  assert again.encode("b | a").tolist() == [3, 4, 2]
  assert again.to_json() == tokenizer.to_json()
  for unknown in ("a c", "<|eos|>"):
    with pytest.raises(ValueError, match=r"text must be symbols of the task.* is none"):
      tokenizer.encode(unknown)
  with pytest.raises(ValueError, match="must be different"):
    SymbolTokenizer(("a", "a"))


def test_what_cannot_be_drawn_is_refused():
  for key, value, message in (
    ("task__star_graph__num_labels", 9, r"task.star_graph.num_labels must be at least"),
    ("task__star_graph__length", 1, r"task.star_graph.length must be at least 2"),
    ("task__sat__num_variables", 2, r"task.sat.num_variables must be at least 3"),
    ("task__sat__unique", True, r"task.sat.num_clauses must be at least 3 \* .*\(12\)"),
    ("task__countdown__largest", 9, r"task.countdown.largest must be at least 10"),
    ("task__countdown__num_inputs", 1, r"task.countdown.num_inputs must be at least 2"),
    ("task__siblings__num_children", 1, r"task.siblings.num_children must be at"),
    ("task__induction__num_names", 5, r"task.induction.num_names must be from"),
    ("task__induction__fresh_share", 1.5, r"task.induction.fresh_share must be in \["),
    ("task__induction__num_names", 31, r"task.induction.num_names must be from"),
    ("tokenizer__kind", "bytes", r"tokenizer.kind must be 'symbols' for a task"),
  ):
    with pytest.raises(ConfigError, match=message):
      config_of(key.split("__")[1] if "task" in key else "sat", **{key: value})
  with pytest.raises(ConfigError, match=r"num_names must be at most .* \(24\) with"):
    config_of(
      "induction", task__induction__num_names=25, task__induction__fresh_share=0.1
    )
  many = {"task__sat__num_variables": 11, "task__sat__num_clauses": 33}
  with pytest.raises(ConfigError, match=r"task.sat.num_variables must be at most 10"):
    config_of("sat", task__sat__unique=True, **many)
  with pytest.raises(ConfigError, match=r"data.seq_len must be at least 36.*got 35"):
    corpus_of("star_graph", data__seq_len=35)
  with pytest.raises(ConfigError, match=r"tokenizer.vocab_size must be at least 35"):
    corpus_of("star_graph", tokenizer__vocab_size=34)
  with pytest.raises(ConfigError, match="for nothing else"):
    config_of("stdlib")


def scripted(monkeypatch, answers: list[tuple[np.ndarray, bool]]) -> None:
  """Makes `generate` answer so: (tokens, whether the end was reached)."""

  def generate(config, weights, prompts, **keywords):
    del config, weights
    assert keywords["max_new_tokens"] >= max(len(tokens) for tokens, _ in answers)
    zeros = np.zeros(0, int)
    return [
      Completion(tokens, zeros, is_stopped, len(tokens), zeros, zeros, zeros)
      for (tokens, is_stopped), _ in zip(answers, prompts, strict=True)
    ]

  monkeypatch.setattr(generative_metrics, "generate", generate)
  monkeypatch.setattr(generative_metrics, "unstack", lambda params, shape: params)


def test_accuracy_counts_whole_answers_by_group(monkeypatch):
  corpus = corpus_of("polynomial", eval__task_examples=12)
  eos = [corpus.tokenizer.eos_id]
  examples = corpus.held_out(12)
  answers, right = [], 0
  for i, example in enumerate(examples):
    ids = corpus.tokenizer.encode_symbols(example.answer)
    if i % 3 == 0:  # Right.
      answers.append((np.concatenate([ids, eos]), True))
      right += 1
    elif i % 3 == 1:  # Right so far, but it goes on.
      answers.append((np.concatenate([ids, ids[:1]]), False))
    else:  # One symbol off.
      other = ids.copy()
      other[2] = 2 + (ids[2] - 1) % 7
      answers.append((np.concatenate([other, eos]), True))
  scripted(monkeypatch, answers)
  found = generative_metrics.task_metrics(corpus.config, {}, corpus)
  assert found["task_accuracy"] == {
    "mean": right / 12, "stderr": pytest.approx((1 / 3 * 2 / 3 / 12) ** 0.5),
    "count": 12,
  }
  groups = found["task_accuracy_groups"]
  assert sum(x["count"] for x in groups.values()) == 12
  assert sum(x["mean"] * x["count"] for x in groups.values()) == pytest.approx(right)
  assert found["task_new"] is None
  assert found["task_baselines"] == {}


@pytest.mark.parametrize("source", ["sat", "star_graph"])
def test_accuracy_stands_beside_trivial_rules_on_the_same_examples(source, monkeypatch):
  corpus = corpus_of(source, eval__task_examples=9)
  eos = np.array([corpus.tokenizer.eos_id])
  scripted(monkeypatch, [(eos, True)] * 9)
  found = generative_metrics.task_metrics(corpus.config, {}, corpus)
  prompts = [x.prompt for x in corpus.held_out(9)]
  expected = {
    "sat": {"majority", "coin"}, "star_graph": {"random arm"}
  }
  assert set(found["task_baselines"]) == expected[source]
  assert found["task_baselines"] == corpus.task.baselines(prompts)
  if source == "star_graph":
    assert found["task_baselines"] == {"random arm": 1 / 3}


def test_an_answer_that_text_goes_on_after_is_what_comes_first(monkeypatch):
  corpus = corpus_of("induction", eval__task_examples=4, eval__num_rows=4)
  right = [corpus.tokenizer.encode_symbols(x.answer) for x in corpus.held_out(4)]
  eos = np.array([corpus.tokenizer.eos_id])
  wrong = corpus.tokenizer.encode_symbols(("first0",))
  scripted(
    monkeypatch, [(right[0], False), (right[1], False), (wrong, False), (eos, True)]
  )
  found = generative_metrics.task_metrics(corpus.config, {}, corpus)
  assert found["task_accuracy"]["mean"] == pytest.approx(2 / 4)
  scored = [np.sum(batch.scored) for batch, _ in corpus.eval_batches(1)]
  assert sum(scored) == 4  # One token an example, and no end.


def test_new_siblings_are_counted_once_and_not_from_the_training_set(monkeypatch):
  corpus = corpus_of("siblings", task__num_train=2, eval__task_examples=8)
  encode = corpus.tokenizer.encode
  rows = [
    [0, *encode("a b c d : c0 c3 p0"), 1], [0, *encode("e f g h : c1 c4 p1"), 1]
  ]
  known = corpus_lib.Encoded(np.array(rows), np.full(2, 10), np.full(2, 6))
  monkeypatch.setattr(corpus_lib, "_train_set", lambda data, config: known)
  answers = [  # (text, whether eos came, right, new)
    ("c0 c3 p0", True, True, False),  # It was trained on.
    ("c3 c0 p0", True, True, True),
    ("c3 c0 p0", True, True, False),  # It was given before.
    ("c0 c1 p0", True, False, False),
    ("c2 c5 p2", True, True, True),
    ("c2 c2 p2", True, False, False),
    ("c1 c7 p1 p1", False, False, False),  # It goes on.
    ("c1 c7 p1", True, True, True),
  ]
  scripted(
    monkeypatch,
    [
      (np.array([*encode(text), *[corpus.tokenizer.eos_id] * ends]), ends)
      for text, ends, *_ in answers
    ],
  )
  found = generative_metrics.task_metrics(corpus.config, {}, corpus)
  assert found["task_accuracy"]["mean"] == sum(right for *_, right, _ in answers) / 8
  assert found["task_new"]["mean"] == sum(new for *_, new in answers) / 8
  assert found["task_baselines"] == {}


@pytest.mark.parametrize("children", [40, 300])
def test_siblings_of_the_sizes_that_leave_something_to_find(children):
  corpus = corpus_of(
    "siblings", task__siblings__num_parents=5, task__siblings__num_children=children,
    task__siblings__prefix_length=0, task__num_train=10_000, data__seq_len=6,
    tokenizer__vocab_size=34 + 5 * children,
  )
  triples = {tuple(x) for x in corpus.train_set.tokens_NL[:, 2:5].tolist()}
  possible = 5 * children * (children - 1)
  # So many of 10,000 draws differ on average; 5 standard deviations or more.
  expected = possible * (1 - (1 - 1 / possible) ** 10_000)
  assert len(triples) == pytest.approx(expected, abs=5 * possible**0.5 / 2)
  few = corpus_of("siblings", task__num_train=300).train_set.tokens_NL
  many = corpus_of("siblings", task__num_train=1000).train_set.tokens_NL
  assert few.tolist() == many[:300].tolist()  # A larger set has the smaller one.


def test_intermediate_results_stay_small():
  task = countdown.Countdown(
    dataclasses.replace(config_of("countdown").task.countdown, largest=20)
  )
  for number in range(100):
    rng = np.random.Generator(np.random.Philox(key=[0, number]))
    _, answer = task.sample(rng, is_held_out=False)
    results = [int(x.split("=")[1]) for x in "".join(answer).split(",")]
    assert max(results) <= 20
