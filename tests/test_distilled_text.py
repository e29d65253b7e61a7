"""Texts of a file to train on: their tokens, what stays of the source, what is refused.
"""

import gzip
import json

import numpy as np
import pytest

from mtp_jax import checkpoint
from mtp_jax.config import with_overrides
from mtp_jax.data import distilled_text, prepare
from mtp_jax.data.pipeline import TrainLoader, load_corpus
from mtp_jax.data.sources import DataError
from tests.corpora import data_config, some_texts, write_jsonl

BOS, EOS = 256, 257
HELD_OUT = {"data__validation_fraction": 0.3, "data__test_fraction": 0.2}
LINES = [
  {"text": "whole é"},
  {"text": "a beginning", "bos": True, "eos": False, "number": 3},
  {"text": "middle", "bos": False, "eos": False},
  {"text": "middle", "bos": False, "eos": False},
  {"text": "end\n", "bos": False, "eos": True},
]


def write_lines(file, lines):
  file.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return file


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory):
  return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", some_texts(60))


@pytest.fixture
def file(tmp_path):
  return write_lines(tmp_path / "written.jsonl", LINES)


def documents_of(rows):
  """Returns the token lists between the cuts of the first epoch's stream, sorted."""
  stream, segments = [], []
  for row in rows:  # Rows of one token: no document is cut.
    stream += row.tokens.tolist()
    segments.append(int(row.next_segment_ids[0]) == 1)  # The next token's is the same.
  documents, current = [], []
  for token, goes_on in zip(stream, segments, strict=True):
    current.append(token)
    if not goes_on:
      documents.append(current)
      current = []
  assert not current
  return sorted(documents)


def test_documents_begin_and_end_where_their_lines_say(corpus_file, file):
  config = data_config("jsonl", corpus_file, data__train_on=str(file), data__seq_len=1)
  rows = load_corpus(config).train_rows(1)
  assert documents_of(rows) == sorted([
    [BOS, *"whole é".encode(), EOS],
    [BOS, *b"a beginning"],
    [*b"middle"],
    [*b"middle"],
    [*b"end\n", EOS],
  ])


def test_held_out_text_and_tokenizer_are_those_of_the_source(corpus_file, file):
  bpe = {"tokenizer__kind": "bpe", "tokenizer__vocab_size": 280} | HELD_OUT
  plain = load_corpus(data_config("jsonl", corpus_file, **bpe))
  config = data_config("jsonl", corpus_file, data__train_on=str(file), **bpe)
  corpus = load_corpus(config)
  assert corpus.tokenizer.to_json() == plain.tokenizer.to_json()
  assert list(corpus.texts("test")) == list(plain.texts("test"))
  pairs = zip(corpus.eval_batches(2), plain.eval_batches(2), strict=True)
  for (ours, owner_B), (theirs, owners_B) in pairs:
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(owner_B, owners_B)
  text = corpus.tokenizer.decode(next(iter(corpus.train_rows(1))).tokens)
  assert "middle" in text and not any(x in text for x in plain.texts("train"))

  assert plain.stats["train_on"] is None
  found = corpus.stats.pop("train_on")
  assert corpus.stats.items() <= plain.stats.items()
  assert (found["where"], found["num_documents"]) == (str(file), len(LINES))
  assert found["num_bytes"] == sum(len(line["text"].encode()) for line in LINES)
  assert found["num_tokens"] == corpus.train_rows(1).num_tokens


def test_a_prepared_corpus_may_be_trained_on_other_text(corpus_file, file, tmp_path):
  config = data_config("jsonl", corpus_file, **HELD_OUT)
  prepare.prepare_folder(config, tmp_path / "it", num_workers=1, shard_size=1 << 20)
  values = {"data__train_on": str(file)} | HELD_OUT
  folder = load_corpus(data_config("array_record", tmp_path / "it", **values))
  text = load_corpus(data_config("jsonl", corpus_file, **values))
  for a, b in zip(folder.train_rows(1), text.train_rows(1), strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
  assert folder.train_rows(1).store.identity == text.train_rows(1).store.identity


def loader(corpus_file, train_on):
  config = data_config("jsonl", corpus_file, data__train_on=str(train_on), **HELD_OUT)
  rows = load_corpus(config).train_rows(1)
  return TrainLoader(rows, batch_size=2, seed=0)


@pytest.mark.parametrize("change", ["text", "edge", "fewer", "corpus", "without"])
def test_a_run_goes_on_with_the_same_text_alone(corpus_file, file, tmp_path, change):
  saved = loader(corpus_file, file).get_state()
  lines, train_on = [dict(line) for line in LINES], tmp_path / "other.jsonl"
  moved = write_lines(tmp_path / "moved.jsonl", [*lines[1:], lines[0]])
  loader(corpus_file, moved).set_state(saved)  # Moved, in another order: the same.
  if change == "text":
    lines[2]["text"] = "muddle"
  elif change == "edge":
    lines[2]["bos"] = True
    lines[1]["bos"] = False  # As many tokens as before.
  elif change == "fewer":
    del lines[2]
  write_lines(train_on, lines)
  if change == "corpus":
    corpus_file = write_jsonl(tmp_path / "b.jsonl", some_texts(61))
  other = loader(corpus_file, "" if change == "without" else train_on)
  key = "manifest" if change == "corpus" else "train_on"
  message = rf"must be the corpus of the saved run .*\b{key}: "
  with pytest.raises(DataError, match=message):
    other.set_state(saved)


def test_a_run_may_name_the_moved_file():
  config = data_config("stdlib", data__train_on="a.jsonl")
  moved = with_overrides(config, {"data.train_on": "b.jsonl"})
  checkpoint.check_resumable(config, moved)


def test_the_order_follows_the_data_seed(corpus_file, tmp_path):
  file = write_jsonl(tmp_path / "many.jsonl", some_texts(20, seed=1))
  streams = [
    np.concatenate([row.tokens for row in load_corpus(config).train_rows(1)]).tolist()
    for seed in (0, 0, 1)
    for config in [
      data_config("jsonl", corpus_file, data__train_on=str(file), data__seed=seed)
    ]
  ]
  assert streams[0] == streams[1] != streams[2]


def test_a_compressed_file_is_the_same(file, tmp_path):
  packed = tmp_path / "written.jsonl.gz"
  packed.write_bytes(gzip.compress(file.read_bytes()))
  plain, found = distilled_text.load(str(file)), distilled_text.load(str(packed))
  assert found.texts == plain.texts
  assert found.stats.manifest == plain.stats.manifest


def test_blank_lines_and_byte_order_marks_are_passed_over(file, tmp_path):
  plain, copy = distilled_text.load(str(file)), tmp_path / "copy.jsonl"
  lines = [*LINES[:2], {"text": "\ufeffmiddle", "bos": False, "eos": False}, *LINES[3:]]
  text = "\n\n".join(map(json.dumps, lines))
  copy.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\n\r\n")
  found = distilled_text.load(str(copy))
  assert found.texts == plain.texts
  assert found.stats.manifest == plain.stats.manifest
  names = [document.name for document in found.documents]
  assert names == [f"{copy}:{number}" for number in (1, 3, 5, 7, 9)]


@pytest.mark.parametrize("content, message", [
  (None, "data.train_on must be a JSONL file, got 'FILE', which does not exist."),
  ("", "data.train_on must have at least one text, got 'FILE', which is empty."),
  ('{"text": "a"}\n{"txt": "b"}\n',
   "FILE:2: every line of data.train_on must have a key 'text', its keys are ['txt']."),
  ('{"text": ""}', "FILE:1: every line of data.train_on must have a text in 'text', "
   "got ''."),
  ('{"text": 3}', "FILE:1: every line of data.train_on must have a text in 'text', "
   "got 3."),
  ('{"text": "\\ud800"}', "FILE:1: every line of data.train_on must have a text in "),
  ('{"text": "a", "eos": 1}',
   "FILE:1: every line of data.train_on must have true or false in 'eos', got 1."),
  ('["a"]', "FILE:1: must be a JSON object, got list."),
  ("\n \r\n", "data.train_on must have at least one text, got 'FILE', which is empty."),
  ('{"text": "a"}\n\n{"text"', "FILE:3: not valid JSON ("),
  ('{"text": "\\ufeff"}', "FILE:1: every line of data.train_on must have a text in "),
  (b'{"text": "\xff"}', "FILE:1: every line of data.train_on must be UTF-8 ("),
])
def test_what_cannot_be_trained_on(tmp_path, content, message):
  path = tmp_path / "it.jsonl"
  if content is not None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
  with pytest.raises(DataError) as caught:
    distilled_text.load(str(path))
  assert str(caught.value).startswith(message.replace("FILE", str(path)))


def test_a_folder_is_no_file(tmp_path):
  with pytest.raises(DataError, match=r"be a JSONL file, got .*, which is no file\."):
    distilled_text.check_file(str(tmp_path))
