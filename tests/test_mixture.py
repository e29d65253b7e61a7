"""Mixtures: shares of rows by weight, every part as it is alone, resumed exactly."""

import json

import numpy as np
import pytest

from mtp_jax.config import ConfigError
from mtp_jax.config_rules import validate
from mtp_jax.data import mixture, prepare, sources
from mtp_jax.data.packing import token_counts
from mtp_jax.data.pipeline import TrainLoader, load_corpus
from mtp_jax.data.sources import DataError
from tests.corpora import data_config, some_texts, write_jsonl
from tests.test_pipeline import assert_same, take

FRACTIONS = {"data__validation_fraction": 0.2, "data__test_fraction": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two files, of which the second one is also a prepared folder."""
  folder = tmp_path_factory.mktemp("mixture")
  for seed, name in ((0, "a"), (1, "b")):
    write_jsonl(folder / f"{name}.jsonl", some_texts(120, seed))
  prepare.prepare_folder(
    data_config("jsonl", folder / "b.jsonl", **FRACTIONS), folder / "b",
    num_workers=1, shard_size=1 << 20,
  )
  return folder


def mixed(folder, path="3 jsonl {}/a.jsonl; 1 array_record {}/b", **changes):
  values = FRACTIONS | {"data__seq_len": 32} | changes
  return data_config("mixture", path.replace("{}", str(folder)), **values)


def alone(folder, name):
  values = FRACTIONS | {"data__seq_len": 32}
  return load_corpus(data_config("jsonl", folder / f"{name}.jsonl", **values))


def loader(config, **where):
  return TrainLoader(load_corpus(config).train_rows(2), batch_size=8, seed=0, **where)


def test_rows_of_each_part_are_its_own_in_its_own_order(folder):
  """Taken apart again, the mixture is what each part gives alone: three rows to one."""
  batches = take(loader(mixed(folder)), 60)
  rows = [batch_row(batch, i) for batch in batches for i in range(8)]
  found = {"a": [], "b": []}
  expected = {}
  for name, count in (("a", 360), ("b", 120)):
    rows_of = TrainLoader(alone(folder, name).train_rows(2), batch_size=1, seed=0)
    expected[name] = [batch_row(x, 0) for x in take(rows_of, count)]
  for row in rows:  # Every row is the next row of one of the parts.
    (name,) = (n for n in "ab" if expected[n][len(found[n]) :][:1] == [row])
    found[name].append(row)
  assert {name: len(x) for name, x in found.items()} == {"a": 360, "b": 120}
  assert {len([r for r in rows[i : i + 4] if r in expected["b"]]) for i in
          range(0, 480, 4)} == {1}  # Interleaved, not one part after the other.


def batch_row(batch, i):
  return [x[i].tolist() for x in batch if x is not None]


def test_a_mixture_resumes_and_is_shared_by_hosts_and_workers(folder):
  config = mixed(folder)
  whole = loader(config)
  take(whole, 5)
  state, expected = json.loads(json.dumps(whole.get_state())), take(whole, 4)
  again = loader(config, num_workers=1)
  again.set_state(state)
  try:
    assert_same(take(again, 4), expected)
  finally:
    again.close()
  shares = []
  for host in range(2):
    half = loader(config, host_index=host, num_hosts=2)
    half.set_state(state)
    shares.append(take(half, 4))
  for batch, *halves in zip(expected, *shares, strict=True):
    both = np.concatenate([x.tokens for x in halves])
    np.testing.assert_array_equal(batch.tokens, both)


@pytest.mark.parametrize(
  "path", ["2 jsonl {}/a.jsonl; 1 array_record {}/b", "1 jsonl {}/a.jsonl; 1 stories"]
)
def test_a_run_resumes_with_its_own_mixture_alone(folder, path):
  state = loader(mixed(folder)).get_state()
  with pytest.raises(DataError, match=r"corpus of the saved run .* manifest: "):
    loader(mixed(folder, path)).set_state(state)


def test_held_out_texts_are_those_of_all_parts(folder):
  corpus, parts = load_corpus(mixed(folder)), [alone(folder, x) for x in "ab"]
  for name in sources.SPLITS:
    texts = [text for part in parts for text in part.texts(name)]
    assert sorted(corpus.texts(name)) == sorted(texts)
    counts = [part.stats["splits"][name] for part in parts]
    assert corpus.stats["splits"][name] == {
      key: sum(x[key] for x in counts) for key in ("documents", "tokens")
    }
  held_out = [x.tokens for x, _ in corpus.eval_batches(1)]
  assert len(held_out) > 1
  assert corpus.stats["num_documents"] == 240
  assert "240 documents" in sources.describe(corpus.stats)
  json.dumps(corpus.stats)


def test_counts_of_tokens_follow_the_weights(folder):
  """Parts of different tokens: the share of each is that of its rows."""
  (folder / "x.txt").write_text("x" * 40_000)
  (folder / "y.txt").write_text("y" * 10_000)
  config = mixed(folder, "1 files {}/x.txt; 4 files {}/y.txt")
  counts = token_counts(load_corpus(config).train_rows(1), 264)
  assert counts[ord("y")] / counts[ord("x")] == pytest.approx(4, rel=0.02)


def test_trained_on_other_texts_a_mixture_is_what_is_held_out(folder):
  config = mixed(folder, data__train_on=str(folder / "a.jsonl"))
  corpus = load_corpus(config)
  assert corpus.train_rows(1).num_tokens == corpus.stats["train_on"]["num_tokens"]
  assert len(corpus.texts("test")) == len(load_corpus(mixed(folder)).texts("test"))


@pytest.mark.parametrize(
  "path, part",
  [
    ("jsonl {}/a.jsonl", "jsonl .*"), ("1 jsonl {}/a.jsonl; 0 stories", "0 stories"),
    ("1 stories;;", ""), ("nan stories", "nan stories"), ("1 sat", "1 sat"),
    ("1 mixture a", "1 mixture a"), ("inf stories", "inf stories"),
  ],
)
def test_parts_that_are_none_are_refused(folder, path, part):
  message = rf"data\.path must be parts divided by ';'.*\('{part}' is none\), got '"
  with pytest.raises(ConfigError, match=message):
    validate(mixed(folder, path))


def test_the_last_part_may_end_as_the_others_do(folder):
  data = mixed(folder, "1 stories; 3 stdlib ; ").data
  assert [(x.weight, x.data.source) for x in mixture.parts(data)] == [
    (1, "stories"), (3, "stdlib")
  ]


def test_what_parts_cannot_have_is_refused(folder):
  with pytest.raises(ConfigError, match=r"tokenizer\.kind must be 'file' or 'bytes'"):
    validate(mixed(folder, tokenizer__kind="bpe"))
  with pytest.raises(DataError, match=r"looked in .*nowhere' and found none"):
    load_corpus(mixed(folder, "1 stories; 1 jsonl {}/nowhere"))
  with pytest.raises(DataError, match=r"data\.source must be one of .* got 'mixture'"):
    prepare.prepare_folder(
      mixed(folder), folder / "new", num_workers=1, shard_size=1 << 20
    )
