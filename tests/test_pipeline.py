"""Corpus and loader: whose rows, in which order, and from where a run goes on."""

import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_jax.batch import Batch
from mtp_jax.config import ConfigError
from mtp_jax.data import packing, pipeline, sources
from mtp_jax.data.pipeline import TrainLoader, load_corpus
from mtp_jax.data.sources import DataError
from tests.corpora import (
  ListStore,
  data_config,
  numbered_documents,
  some_texts,
  write_jsonl,
)

LENGTHS = [5, 9, 2, 7, 11, 3]  # 37 tokens: 9 rows of 4, and one left over.
SEQ_LEN = 4


def make_rows(num_extra: int = 2, name: str = "lists") -> packing.PackedRows:
  store = ListStore(numbered_documents(LENGTHS), name)
  return packing.PackedRows(store, np.arange(len(LENGTHS)), SEQ_LEN, num_extra)


def take(loader: TrainLoader, count: int) -> list[Batch]:
  return [next(loader) for _ in range(count)]


def assert_same(actual: list[Batch], expected: list[Batch]) -> None:
  assert len(actual) == len(expected)
  for a, b in zip(actual, expected, strict=True):
    for x, y in zip(a, b, strict=True):
      np.testing.assert_array_equal(x, y)


def starts(batches: list[Batch]) -> list[int]:
  """Returns the first token of every row, which tells rows of an epoch apart."""
  return np.concatenate([batch.tokens[:, 0] for batch in batches]).tolist()


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
  file = tmp_path_factory.mktemp("corpus") / "a.jsonl"
  return write_jsonl(file, [*some_texts(60), some_texts(1)[0], " "])


def test_every_epoch_has_each_row_once_in_another_order():
  rows = make_rows()
  num_rows = len(rows)
  batches = take(TrainLoader(rows, batch_size=3, seed=0), 4 * num_rows // 3)
  found = starts(batches)
  orders = []
  for epoch in range(4):
    expected = [
      int(rows[epoch * num_rows + r].tokens[0]) for r in range(num_rows)
    ]  # The token left over moves the cuts of the next epoch.
    part = found[epoch * num_rows : (epoch + 1) * num_rows]
    assert sorted(part) == sorted(expected)
    orders.append([expected.index(token) for token in part])
  assert len({tuple(order) for order in orders}) == 4
  assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("num_rows", [1, 7, 1000, 1 << 30])
@pytest.mark.parametrize("seed", [0, 5, 1 << 40])
def test_the_order_is_that_of_grain(num_rows, seed):
  """Saved runs go on in the order that they had when grain itself computed it."""
  order = grain.MapDataset.range(num_rows).seed(seed).shuffle().repeat()
  begin, end = 3, min(3 * num_rows, 2000) + 3
  places = range(begin, end)
  expected = [place // num_rows * num_rows + order[place] for place in places]
  assert packing.shuffled_rows(num_rows, seed, begin, end).tolist() == expected


def test_batches_hold_whole_rows():
  rows = make_rows()
  by_start = {
    (int(row.tokens[0]), int(row.next_tokens[1])): row
    for row in (rows[r] for r in range(3 * len(rows)))
  }
  batches = take(TrainLoader(rows, batch_size=9, seed=0), 3)
  for batch in batches:
    assert batch.tokens.shape == (9, SEQ_LEN) and batch.next_tokens.shape == (9, 2)
    for i in range(9):
      row = by_start[int(batch.tokens[i, 0]), int(batch.next_tokens[i, 1])]
      ours = jax.tree.map(lambda x: x[i], batch)  # noqa: B023
      jax.tree.map(np.testing.assert_array_equal, ours, row)


@pytest.mark.parametrize("num_hosts", [2, 3, 6])
def test_hosts_share_the_batch_of_one_host(num_hosts):
  """Put one below the other, their rows are the global batch; also across epochs."""
  rows = make_rows()
  whole = take(TrainLoader(rows, batch_size=6, seed=3), 7)
  shares = [
    take(TrainLoader(rows, batch_size=6, seed=3, host_index=h, num_hosts=num_hosts), 7)
    for h in range(num_hosts)
  ]
  joined = [
    packing.map_fields(np.concatenate, *parts) for parts in zip(*shares, strict=True)
  ]
  assert_same(joined, whole)


def test_hosts_must_divide_the_batch():
  message = r"data\.batch_size must be divisible by .*\(4\), got 6"
  with pytest.raises(ValueError, match=message):
    TrainLoader(make_rows(), batch_size=6, seed=0, num_hosts=4)


def test_order_follows_the_data_seed():
  first, again, other = (
    starts(take(TrainLoader(make_rows(), batch_size=3, seed=seed), 6))
    for seed in (0, 0, 1)
  )
  assert first == again != other


def test_order_ignores_the_model_seed_and_the_depth(corpus_file):
  taken = []
  for changes in ({}, {"seed": 7}, {"mtp__kind": "sequential", "mtp__depth": 3}):
    config = data_config("jsonl", corpus_file, data__seq_len=32, **changes)
    rows = load_corpus(config).train_rows(1 + config.mtp.depth)
    loader = TrainLoader(rows, batch_size=4, seed=config.data.seed)
    taken.append(take(loader, 2 * len(rows) // 4))
  assert_same(taken[1], taken[0])
  for shallow, deep in zip(taken[0], taken[2], strict=True):
    for field in ("tokens", "segment_ids", "positions"):
      np.testing.assert_array_equal(getattr(shallow, field), getattr(deep, field))
    np.testing.assert_array_equal(shallow.next_tokens, deep.next_tokens[:, :1])


@settings(max_examples=8, deadline=None)
@given(stops=st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_stopped_anywhere_it_goes_on_the_same(stops):
  rows = make_rows()
  expected = take(TrainLoader(rows, batch_size=2, seed=0), sum(stops) + 2)
  loader, found = TrainLoader(rows, batch_size=2, seed=0), []
  for count in stops:
    found += take(loader, count)
    state = json.loads(json.dumps(loader.get_state()))  # As a checkpoint holds it.
    take(loader, 1)  # What was fetched after the save is fetched again.
    loader.close()
    loader = TrainLoader(rows, batch_size=2, seed=0)
    loader.set_state(state)
  assert_same(found + take(loader, 2), expected)


def test_state_moves_to_another_number_of_hosts():
  one = TrainLoader(make_rows(), batch_size=4, seed=0)
  take(one, 5)
  state, expected = one.get_state(), take(one, 3)
  halves = []
  for host in range(2):
    loader = TrainLoader(
      make_rows(), batch_size=4, seed=0, host_index=host, num_hosts=2
    )
    loader.set_state(state)
    halves.append(take(loader, 3))
  for i, batch in enumerate(expected):
    both = np.concatenate([halves[0][i].tokens, halves[1][i].tokens])
    np.testing.assert_array_equal(both, batch.tokens)


def test_a_loader_can_be_set_back_and_closed():
  loader = TrainLoader(make_rows(), batch_size=2, seed=0)
  begin, first = loader.get_state(), take(loader, 4)
  loader.set_state(begin)
  assert_same(take(loader, 4), first)
  loader.close()
  loader.close()
  loader.set_state(begin)
  assert_same(take(loader, 4), first)


@pytest.mark.parametrize(
  "key, other",
  [
    ("manifest", lambda: TrainLoader(make_rows(name="other"), batch_size=2, seed=0)),
    ("batch_size", lambda: TrainLoader(make_rows(), batch_size=4, seed=0)),
    ("seed", lambda: TrainLoader(make_rows(), batch_size=2, seed=1)),
  ],
)
def test_state_of_another_run_is_refused(key, other):
  state = TrainLoader(make_rows(), batch_size=2, seed=0).get_state()
  with pytest.raises(DataError, match=rf"corpus of the saved run .* {key}: .* there"):
    other().set_state(state)


class BackendReporter(ListStore):
  """Every token is 1 where a JAX backend was started in the process, else 0."""

  def read(self, document: int, begin: int, end: int) -> np.ndarray:
    bridge = sys.modules.get("jax._src.xla_bridge")
    started = bridge is not None and bridge.backends_are_initialized()
    return np.full(end - begin, started, np.int32)


@pytest.mark.slow
def test_workers_give_the_same_batches_and_start_no_backend():
  rows = make_rows()
  alone = TrainLoader(rows, batch_size=2, seed=0)
  expected = take(alone, 9)
  shared = TrainLoader(rows, batch_size=2, seed=0, num_workers=2)
  try:
    assert_same(take(shared, 5), expected[:5])
    state = shared.get_state()
  finally:
    shared.close()
  alone.set_state(state)  # Written with two workers, read with none.
  assert_same(take(alone, 4), expected[5:])

  store = BackendReporter([[1] * 50])
  jax.devices()
  assert store.read(0, 0, 1).all()  # Here there is one.
  reporting = TrainLoader(
    packing.PackedRows(store, np.array([0]), SEQ_LEN, 1),
    batch_size=2,
    seed=0,
    num_workers=1,
  )
  try:
    assert not next(reporting).tokens.any()
  finally:
    reporting.close()


LOADING = """
import os, signal, sys
from tests.test_pipeline import make_rows, take
from mtp_jax.data.pipeline import TrainLoader

if __name__ == "__main__":
  received = []
  signal.signal(signal.SIGTERM, lambda *_: received.append(1))
  loader = TrainLoader(make_rows(), batch_size=2, seed=0, num_workers=1)
  take(loader, 2)
  os.killpg(0, signal.SIGTERM)  # As a cluster does it: to every process of the job.
  take(loader, 20)
  assert received
  print("loaded", flush=True)
  take(loader, 10**9)
"""


@pytest.mark.slow
def test_workers_outlive_sigterm_and_not_their_parent(tmp_path):
  """A signal to all processes leaves time to save; a kill leaves nothing behind."""
  script = tmp_path / "loading.py"
  script.write_text(textwrap.dedent(LOADING))
  process = subprocess.Popen(
    [sys.executable, script],
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    stdout=subprocess.PIPE,
    start_new_session=True,
  )
  try:
    assert process.stdout.readline() == b"loaded\n"
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
      while time.monotonic() < deadline:
        os.killpg(process.pid, 0)
        time.sleep(0.05)
  finally:
    process.stdout.close()
    try:
      os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass


def first_evaluated(corpus: pipeline.Corpus) -> str:
  batch, owners = next(corpus.eval_batches(1))
  assert owners[0] == 0
  inside = batch.segment_ids[0] == 1
  # A row may cut the last character in two.
  return corpus.tokenizer.decode(batch.tokens[0][inside]).rstrip("\ufffd")


def test_corpus_of_a_source(corpus_file):
  config = data_config(
    "jsonl", corpus_file, data__validation_fraction=0.3, data__test_fraction=0.2
  )
  corpus = load_corpus(config)
  texts = {name: list(corpus.texts(name)) for name in sources.SPLITS}
  assert sorted(itertools.chain(*texts.values())) == sorted(some_texts(60))
  counts = {name: len(found) for name, found in texts.items()}
  assert min(counts.values()) > 0
  assert {n: x["documents"] for n, x in corpus.stats["splits"].items()} == counts
  for name, found in texts.items():
    num_tokens = sum(len(text.encode()) + 2 for text in found)
    assert corpus.stats["splits"][name]["tokens"] == num_tokens
  assert (corpus.stats["num_duplicates"], corpus.stats["num_empty"]) == (1, 1)
  json.dumps(corpus.stats)

  # Training sees the train split, whole and alone; evaluation the asked for one.
  rows = corpus.train_rows(2)
  train_tokens = sum(len(text.encode()) + 2 for text in texts["train"])
  assert rows.num_tokens == train_tokens
  stream = np.concatenate([row.tokens for row in rows])
  decoded = corpus.tokenizer.decode(stream)
  whole = [text for text in texts["train"] if text in decoded]
  assert len(whole) >= len(texts["train"]) - 1  # The last row may cut a document.
  assert sorted(whole, key=decoded.index) != whole  # Shuffled by data.seed.
  assert not any(text in decoded for text in texts["validation"] + texts["test"])
  assert texts["validation"][0].startswith(first_evaluated(corpus))


def test_evaluated_split_follows_the_config(corpus_file):
  fractions = {"data__validation_fraction": 0.3, "data__test_fraction": 0.2}
  config = data_config("jsonl", corpus_file, eval__split="test", **fractions)
  corpus = load_corpus(config)
  assert corpus.texts("test")[0].startswith(first_evaluated(corpus))


def test_bpe_learns_from_the_train_split_alone(corpus_file):
  fractions = {"data__validation_fraction": 0.3, "data__test_fraction": 0.2}
  bpe = {"tokenizer__kind": "bpe", "tokenizer__vocab_size": 280}
  corpus = load_corpus(data_config("jsonl", corpus_file, **fractions, **bpe))
  alone = pipeline.tokenizers_lib.make_tokenizer(
    corpus.config.tokenizer, corpus.texts("train")
  )
  assert corpus.tokenizer.to_json() == alone.to_json()
  everything = pipeline.tokenizers_lib.make_tokenizer(
    corpus.config.tokenizer, some_texts(60)
  )
  assert corpus.tokenizer.to_json() != everything.to_json()


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("kind, size", [("bytes", 264), ("bpe", 280)])
def test_few_texts_are_cut_with_a_gap_of_a_row(tmp_path, count, kind, size):
  rng = np.random.default_rng(0)
  texts = [
    f"{i} é " + "".join(rng.choice(list("abc \n"), 5000)) for i in range(count)
  ]
  for i, text in enumerate(texts):
    (tmp_path / f"{i}.txt").write_text(text)
  config = data_config(
    "files", tmp_path, data__seq_len=64, data__validation_fraction=0.01,
    data__test_fraction=0.01, tokenizer__kind=kind, tokenizer__vocab_size=size,
  )
  corpus = load_corpus(config)
  assert corpus.stats["is_cut"] and corpus.stats["num_documents"] == count
  assert [x["documents"] for x in corpus.stats["splits"].values()] == [count] * 3
  found = [list(corpus.texts(name)) for name in sources.SPLITS]
  for text in texts:
    (train,), (validation,), (test,) = (
      [part for part in parts if part in text] for parts in found
    )
    assert text.endswith(validation + test)
    for part in (validation, test):
      assert len(part) == pytest.approx(0.01 * len(text), abs=1)
    assert text.startswith(train)
    between = text[len(train) : -len(validation + test)]
    # A row of tokens, as they are without the text around them.
    assert len(corpus.tokenizer.encode(between)) == pytest.approx(64, abs=2)
  # Documents begin with bos and end with eos where the texts do, and only there.
  read = lambda i: corpus.store.read(i, 0, int(corpus.store.lengths_N[i]))  # noqa: E731
  for i, split in enumerate(corpus.split_N):
    assert (read(i)[0] == corpus.tokenizer.bos_id) == (split == 0)
    assert (read(i)[-1] == corpus.tokenizer.eos_id) == (split == 2)
  if kind == "bpe":  # It has seen no held-out text.
    begins = [text[: round(0.98 * len(text))] for text in texts]
    alone = pipeline.tokenizers_lib.make_tokenizer(config.tokenizer, begins)
    assert corpus.tokenizer.to_json() == alone.to_json()


def test_texts_that_fill_every_split_are_not_cut(tmp_path):
  file = write_jsonl(tmp_path / "a.jsonl", some_texts(60))
  fractions = {"data__validation_fraction": 0.3, "data__test_fraction": 0.2}
  whole = load_corpus(data_config("jsonl", file, **fractions))
  assert not whole.stats["is_cut"] and whole.stats["num_documents"] == 60
  assert sum(x["documents"] for x in whole.stats["splits"].values()) == 60


def test_too_little_text_to_cut(tmp_path):
  (tmp_path / "a.txt").write_text("too short for a row")
  with pytest.raises(DataError) as caught:
    load_corpus(data_config("files", tmp_path / "a.txt"))
  assert str(caught.value) == (
    f"{tmp_path / 'a.txt'} has too little text: 1 document(s) (19 bytes) are cut into "
    "train, validation and test with a gap of data.seq_len (128) tokens, and none is "
    "left for 'train'. Give more text, lower data.seq_len, or change "
    "data.validation_fraction (0.05) and data.test_fraction (0.05)."
  )


def test_corpora_that_cannot_be_used(corpus_file):
  with pytest.raises(ConfigError, match=r"tokenizer\.vocab_size must be at least 258"):
    load_corpus(data_config("jsonl", corpus_file, tokenizer__vocab_size=100))
  message = r"data\.test_fraction must leave at least one of the 60 .* the test split"
  with pytest.raises(DataError, match=message):
    load_corpus(
      data_config("jsonl", corpus_file, eval__split="test", data__test_fraction=0.0)
    )
  message = r"data\.validation_fraction must leave .* for the train split"
  with pytest.raises(DataError, match=message):
    load_corpus(data_config("jsonl", corpus_file, data__validation_fraction=1.0))
