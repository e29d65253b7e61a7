"""One corpus in every format gives the same rows; damaged files are refused by name."""

import json
import sys

import numpy as np
import pytest

from mtp_jax.config import ConfigError, with_overrides
from mtp_jax.config_rules import validate
from mtp_jax.data import formats, prepare, sources
from mtp_jax.data import tokenizers as tokenizers_lib
from mtp_jax.data.pipeline import TrainLoader, load_corpus
from mtp_jax.data.sources import DataError
from tests.corpora import data_config, some_texts, write_jsonl
from tests.test_pipeline import assert_same, take

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = some_texts(120)
BPE = {"tokenizer__kind": "bpe", "tokenizer__vocab_size": 300}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """One corpus as JSONL, parquet and shards of tokens, and its tokenizer."""
  folder = tmp_path_factory.mktemp("formats")
  write_jsonl(folder / "a.jsonl", TEXTS)
  table = folder / "table"
  table.mkdir()
  columns = {"id": list(range(120)), "text": TEXTS}
  for name, begin, end in (("a", 0, 70), ("b", 70, 120)):
    part = pyarrow.table({key: x[begin:end] for key, x in columns.items()})
    parquet.write_table(part, table / f"{name}.parquet", row_group_size=16)
  tokenizer = tokenizers_lib.make_tokenizer(
    data_config("stdlib", **BPE).tokenizer, TEXTS
  )
  tokenizers_lib.save_tokenizer(tokenizer, folder / "tokenizer.json")
  for name, dtype, header in SHARDS:
    for number, part in enumerate((TEXTS[:70], TEXTS[70:])):
      write_tokens(folder / f"{name}_{number}.bin", part, tokenizer, dtype, header)
  return folder


# Name, type of a token, and number that begins llm.c's header.
SHARDS = (
  ("gpt2", "<u2", 20240520), ("llama3", "<u4", 20240801),
  ("nanogpt", "<u2", None), ("wide", "<u4", None),
)


def write_tokens(file, texts, tokenizer, dtype, magic):
  """As llm.c does it: every document begins with the token that ends documents."""
  marked = [[tokenizer.eos_id, *tokenizer.encode(text)] for text in texts]
  tokens = np.concatenate(marked).astype(dtype)
  header = np.zeros(256, "<i4")
  header[:3] = magic or 0, 7 if magic == 20240801 else 1, len(tokens)
  file.write_bytes((header.tobytes() if magic else b"") + tokens.tobytes())


def config_of(folder, source, path, **changes):
  given = {
    "tokenizer__kind": "file", "tokenizer__path": str(folder / "tokenizer.json"),
    "tokenizer__vocab_size": 300, "data__seq_len": 32, "data__batch_size": 4,
  }
  return data_config(source, folder / path, **(given | changes))


def batches(config, count=40):
  corpus = load_corpus(config)
  rows = corpus.train_rows(3)
  loader = TrainLoader(rows, batch_size=config.data.batch_size, seed=0)
  return take(loader, count), list(corpus.eval_batches(3))


@pytest.mark.parametrize(
  "source, path",
  [("parquet", "table/*.parquet"), ("hf", "table")]
  + [("token_bin", f"{name}_*.bin") for name, _, _ in SHARDS],
)
def test_one_corpus_has_the_same_rows_in_every_format(folder, source, path):
  if source == "hf":
    pytest.importorskip("datasets")
  expected, held_out = batches(config_of(folder, "jsonl", "a.jsonl"))
  found, of_eval = batches(config_of(folder, source, path))
  assert_same(found, expected)
  assert_same([x for x, _ in of_eval], [x for x, _ in held_out])
  corpora = [
    load_corpus(config_of(folder, *x)) for x in (("jsonl", "a.jsonl"), (source, path))
  ]
  assert corpora[0].store.identity == corpora[1].store.identity
  assert corpora[0].stats["num_bytes"] == corpora[1].stats["num_bytes"]
  assert list(corpora[0].texts("test")) == list(corpora[1].texts("test"))


@pytest.mark.parametrize(
  "source, path", [("parquet", "table/*"), ("hf", "table"), ("token_bin", "gpt2_*")]
)
def test_a_run_resumes_in_the_middle_of_an_epoch(folder, source, path):
  config = config_of(folder, source, path)
  rows = load_corpus(config).train_rows(2)
  loader = TrainLoader(rows, batch_size=4, seed=0)
  take(loader, 7)
  state, expected = json.loads(json.dumps(loader.get_state())), take(loader, 5)
  again = TrainLoader(load_corpus(config).train_rows(2), batch_size=4, seed=0)
  again.set_state(state)
  assert_same(take(again, 5), expected)


@pytest.mark.parametrize(
  "source, path", [("parquet", "table/*"), ("hf", "table"), ("token_bin", "gpt2_*")]
)
def test_prepared_folders_have_the_rows_of_the_files(folder, tmp_path, source, path):
  config, seen = config_of(folder, source, path), []
  prepare.prepare_folder(
    config, tmp_path, num_workers=2, shard_size=4000,
    progress=lambda phase, done, total: seen.append((done, total)),
  )
  again = config_of(folder, "array_record", tmp_path)
  assert_same(batches(again)[0], batches(config)[0])
  done = [x for x, _ in seen]
  assert done == sorted(done) and len(set(done)) > 3
  assert done[-1] == seen[-1][1] > 0 or (source == "hf" and seen[-1][1] == 0)


def test_tokens_stay_as_they_are(folder, tmp_path):
  """Another segmentation of the text, and a special token within, are kept."""
  tokenizer = tokenizers_lib.load_tokenizer(folder / "tokenizer.json")
  text = "the same text as one token for each byte. " * 20
  ids = np.concatenate([tokenizer.encode(x) for x in text])
  assert len(ids) > len(tokenizer.encode(text))
  eos, bos = tokenizer.eos_id, tokenizer.bos_id
  stream = np.array([bos, *ids, eos, *tokenizer.encode("two")], "<u2")
  (tmp_path / "a.bin").write_bytes(stream.tobytes())
  pieces = list(formats.read_tokens(str(tmp_path / "a.bin"), tokenizer))
  assert [x.ids.tolist() for x in pieces] == [
    ids.tolist(), tokenizer.encode("two").tolist()
  ]
  assert [x.data for x in pieces] == [text.encode(), b"two"]
  assert pieces[-1].done == stream.nbytes


def test_a_stream_without_documents_is_cut_into_splits(folder, tmp_path):
  """nanoGPT's Shakespeare: one file of tokens, no end of document in it."""
  tokenizer = tokenizers_lib.load_tokenizer(folder / "tokenizer.json")
  ids = tokenizer.encode("".join(TEXTS))
  (tmp_path / "train.bin").write_bytes(ids.astype("<u2").tobytes())
  corpus = load_corpus(config_of(folder, "token_bin", tmp_path / "train.bin"))
  assert corpus.stats["is_cut"] and corpus.stats["num_documents"] == 1
  lengths = corpus.store.lengths_N.tolist()
  parts = [corpus.store.read(i, 0, n) for i, n in enumerate(lengths)]
  assert [len(parts), parts[0][0]] == [3, tokenizer.bos_id]
  assert parts[2][-1] == tokenizer.eos_id
  np.testing.assert_array_equal(
    parts[0][1:], ids[: len(parts[0]) - 1]  # The gap before the next part is left out.
  )
  np.testing.assert_array_equal(
    np.concatenate([parts[1], parts[2][:-1]]), ids[round(0.9 * len(ids)) :]
  )


@pytest.mark.parametrize(
  "content, message",
  [
    (np.array([20240520, 1, 9, *[0] * 253], "<i4").tobytes() + b"1234",
     r"must hold 9 tokens of 2 bytes as in its header, it has 4 bytes after the "),
    *((np.array([magic, version, 2, *[0] * 253], "<i4").tobytes() + b"1234" * 2,
       f"must have version {right} in its header, .* {magic}, it has {version}")
      for magic, version, right in ((20240520, 2, 1), (20240801, 1, 7))),
    (np.array([70, 300], "<u2").tobytes(), "must hold tokens below 300, .* holds 300"),
    (b"12345", "must hold whole tokens of 2 bytes, it has 5 bytes"),
    (b"", r"data\.path must lead to documents, .*a\.bin: 1 file\(s\)"),
  ],
  ids=["cut", "version of 2 bytes", "of 4", "token", "half", "empty"],
)  # fmt: skip
def test_bad_shards_are_refused(folder, tmp_path, content, message):
  (tmp_path / "a.bin").write_bytes(content)
  with pytest.raises(DataError, match=message):
    load_corpus(config_of(folder, "token_bin", tmp_path / "a.bin"))


def test_bad_tables_are_refused(folder, tmp_path):
  (tmp_path / "text.parquet").write_text("no table")
  message = r"text\.parquet: not a whole parquet file \("
  with pytest.raises(DataError, match=message):
    load_corpus(config_of(folder, "parquet", tmp_path / "text.parquet"))
  whole = (folder / "table" / "a.parquet").read_bytes()
  (tmp_path / "cut.parquet").write_bytes(whole[:-100])
  with pytest.raises(DataError, match=r"cut\.parquet: not a whole parquet file \("):
    load_corpus(config_of(folder, "parquet", tmp_path / "cut.parquet"))
  message = r"a\.parquet: data.text_field 'body' is not a column .* \['id', 'text'\]"
  with pytest.raises(DataError, match=message):
    load_corpus(config_of(folder, "parquet", "table/*", data__text_field="body"))
  message = r"a\.parquet:1: data.text_field 'id' must hold a string or .*, got int"
  with pytest.raises(DataError, match=message):
    load_corpus(config_of(folder, "parquet", "table/*", data__text_field="id"))


def test_bad_datasets_are_refused(folder, monkeypatch):
  pytest.importorskip("datasets")
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  for path in ("table::nowhere", "nowhere"):
    message = r"data\.path must name a dataset .* as NAME\[:CONF.*nowhere"
    with pytest.raises(DataError, match=message):
      load_corpus(config_of(folder, "hf", path))
  with pytest.raises(DataError, match=r"table:1: data.text_field 'body' is not a key"):
    load_corpus(config_of(folder, "hf", "table", data__text_field="body"))


def test_a_missing_package_is_named(folder, monkeypatch):
  for package, source, path in (
    ("pyarrow.parquet", "parquet", "table/*"), ("datasets", "hf", "table")
  ):
    monkeypatch.setitem(sys.modules, package, None)
    name = package.partition(".")[0]
    with pytest.raises(DataError, match=rf"data.source '{source}' needs .* {name}, "):
      sources.DocumentReader(source, str(folder / path), "text")


def test_tokens_need_their_tokenizer(folder):
  shards = folder / "gpt2_*"
  for source, path in (("token_bin", shards), ("mixture", f"1 token_bin {shards}")):
    for kind in ("bpe", "bytes"):
      values = {"data.path": str(path), "tokenizer.kind": kind, "tokenizer.path": ""}
      config = with_overrides(config_of(folder, source, ""), values)
      with pytest.raises(ConfigError, match=r"tokenizer\.kind must be 'file' for data"):
        validate(config)
