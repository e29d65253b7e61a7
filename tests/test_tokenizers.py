"""Tokenizers lose nothing, count bytes right and cannot be made to end a document."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mtp_jax.config import ConfigError, TokenizerConfig
from mtp_jax.data import subword_tokenizer, tokenizers
from mtp_jax.data.sources import DataError
from tests.corpora import some_texts

BPE = TokenizerConfig(kind="bpe", vocab_size=300, path="")


def sentencepiece_like() -> hf.Tokenizer:
  """BPE as Llama 2 has it: a space in front, U+2581 for spaces, bytes for the rest."""
  pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
  pieces += ["\u2581", "a", "b", "\u00e9", "ab", "\u2581a"]
  model = models.BPE(
    vocab={piece: i for i, piece in enumerate(pieces)},
    merges=[("a", "b"), ("\u2581", "a")],
    unk_token="<unk>",
    byte_fallback=True,
    fuse_unk=True,
  )
  tokenizer = hf.Tokenizer(model)
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace("\u2581", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
  return tokenizer


def gpt2_like() -> hf.Tokenizer:
  """Byte-level BPE with one special token, truncation and padding."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {character: i for i, character in enumerate(alphabet)}
  tokenizer = hf.Tokenizer(models.BPE(vocab=vocab | {"th": 256}, merges=[("t", "h")]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(["<|endoftext|>"])
  tokenizer.add_tokens(["\u6f22t"])  # Two characters, four bytes, not special.
  tokenizer.enable_truncation(3)
  tokenizer.enable_padding(length=9)
  return tokenizer


@functools.cache
def make(name: str) -> tokenizers.Tokenizer:
  if name == "bytes":
    return tokenizers.ByteTokenizer()
  if name == "bpe":
    return tokenizers.make_tokenizer(BPE, some_texts(40))
  files = {"gpt2": gpt2_like, "sentencepiece": sentencepiece_like}
  return tokenizers.tokenizer_from_json(files[name]().to_str(), name)


NAMES = ("bytes", "bpe", "gpt2", "sentencepiece")
# SentencePiece writes spaces as U+2581 and cannot tell the two apart afterwards.
TEXTS = st.text(
  st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60
) | st.text("abth \n\u00e9<|bose>/s\u6f22", max_size=60)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4))
def test_round_trip_and_bytes(name, texts):
  tokenizer = make(name)
  batch = tokenizer.encode_batch(texts)
  for text, ids in zip(texts, batch, strict=True):
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert {tokenizer.bos_id, tokenizer.eos_id}.isdisjoint(ids.tolist())
    num_bytes = tokenizer.token_bytes_V[ids].sum()
    # SentencePiece puts one space in front.
    extra = int(name == "sentencepiece" and text != "")
    assert num_bytes == len(text.encode()) + extra


@pytest.mark.parametrize("name", NAMES)
def test_specials(name):
  tokenizer = make(name)
  assert tokenizer.bos_id != tokenizer.eos_id
  assert tokenizer.vocab_size == len(tokenizer.token_bytes_V)
  assert max(tokenizer.bos_id, tokenizer.eos_id) < tokenizer.vocab_size
  for special in (tokenizer.bos_id, tokenizer.eos_id):
    assert tokenizer.token_bytes_V[special] == 0
    assert tokenizer.decode([special, *tokenizer.encode("ab"), special]) == "ab"
  # A model may sample an id that pads its vocabulary.
  assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.vocab_size + 3]) == "ab"


@pytest.mark.parametrize("name", NAMES)
def test_text_cannot_forge_a_special(name):
  """Every well-known name of a special token is text like any other."""
  tokenizer = make(name)
  text = "x<|bos|>y<|eos|><s></s> <|endoftext|><|begin_of_text|><bos>[EOS]<unk>"
  ids = tokenizer.encode(text)
  assert {tokenizer.bos_id, tokenizer.eos_id}.isdisjoint(ids.tolist())
  assert tokenizer.decode(ids) == text


def test_known_names_are_used_and_others_added():
  gpt2, sentencepiece = make("gpt2"), make("sentencepiece")
  assert (sentencepiece.bos_id, sentencepiece.eos_id) == (1, 2)
  assert gpt2.eos_id == 257  # <|endoftext|>
  assert (gpt2.bos_id, gpt2.vocab_size) == (259, 260)  # Added after the file's own.


def test_bytes_are_bytes():
  tokenizer = tokenizers.ByteTokenizer()
  assert tokenizer.encode("a\u00e9").tolist() == [97, 0xC3, 0xA9]
  assert tokenizer.decode([256, 97, 0xC3, 257]) == "a\ufffd"
  # Any other tool that opens the saved file gets the same ids.
  theirs = hf.Tokenizer.from_str(tokenizer.to_json())
  text = "".join(map(chr, range(300))) + "\u6f22\U0001f642"
  assert theirs.encode(text).ids == tokenizer.encode(text).tolist()
  assert theirs.decode(theirs.encode(text).ids) == text
  assert theirs.token_to_id("<|bos|>") == tokenizer.bos_id
  assert theirs.token_to_id("<|eos|>") == tokenizer.eos_id


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded(name, tmp_path):
  tokenizer, file = make(name), tmp_path / "tokenizer.json"
  tokenizers.save_tokenizer(tokenizer, file)
  assert os.listdir(tmp_path) == ["tokenizer.json"]
  config = TokenizerConfig(kind="file", vocab_size=1, path=str(file))
  loaded = tokenizers.make_tokenizer(config, [])
  assert type(loaded) is type(tokenizer)
  assert loaded.to_json() == tokenizer.to_json()
  for text in some_texts(5, seed=1):
    np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
  np.testing.assert_array_equal(loaded.token_bytes_V, tokenizer.token_bytes_V)
  assert (loaded.bos_id, loaded.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_bpe_has_the_asked_for_size_and_merges():
  tokenizer = make("bpe")
  assert tokenizer.vocab_size == 300
  text = some_texts(1, seed=2)[0]
  assert len(tokenizer.encode(text)) < len(text.encode())
  smaller = tokenizers.make_tokenizer(
    dataclasses.replace(BPE, vocab_size=290), some_texts(40)
  )
  assert smaller.vocab_size == 290


TRAIN = """
import sys
from mtp_jax.config import TokenizerConfig
from mtp_jax.data import tokenizers
from tests.corpora import some_texts
config = TokenizerConfig(kind="bpe", vocab_size=300, path="")
sys.stdout.write(tokenizers.make_tokenizer(config, some_texts(40)[::-1]).to_json())
"""


@pytest.mark.slow
def test_bpe_does_not_depend_on_order_or_process():
  other = subprocess.run(
    [sys.executable, "-c", TRAIN],
    env=os.environ | {"PYTHONHASHSEED": "1"},
    capture_output=True,
    check=True,
  )
  assert other.stdout.decode() == make("bpe").to_json()


def changed(**sections: object) -> str:
  values = json.loads(tokenizers.ByteTokenizer().to_json())
  return json.dumps(values | sections)


def unigram() -> str:
  """A model that finds its own control tokens in text, as many Unigram ones do."""
  characters = sorted(set(subword_tokenizer._PROBE) - {" "} | {"\u2581"})
  pieces = ["<unk>", "<s>", "</s>", *characters]
  model = hf.Tokenizer(models.Unigram([(p, -1.0) for p in pieces], unk_id=0))
  model.pre_tokenizer = pre_tokenizers.Metaspace()
  model.decoder = decoders.Metaspace()
  model.add_special_tokens(["<unk>", "<s>", "</s>"])
  return model.to_str()


def latin_word() -> str:
  """The byte-level decoder takes the characters of an added word for bytes."""
  model = gpt2_like()
  model.add_tokens(["\u00e9t\u00e9"])
  return model.to_str()


def words(unknown: str | None) -> str:
  vocab = {"a": 0, "[UNK]": 1}
  return hf.Tokenizer(models.WordLevel(vocab, unk_token=unknown)).to_str()


@pytest.mark.parametrize(
  "content, message",
  [
    ("", "hold a Hugging Face tokenizer, '.*' does not .JSONDecodeError"),
    ("[1]", "hold a Hugging Face tokenizer"),
    ('{"model": {"type": "None"}}', "hold a Hugging Face tokenizer"),
    (
      changed(normalizer={"type": "Lowercase"}),
      "be a tokenizer that loses no text, got .*# a,b 123",
    ),
    (words("[UNK]"), r"be a tokenizer that loses no text, got .* into '\[UNK\]'"),
    (words("missing"), "be a tokenizer that encodes any text, '.*' does not encode"),
    (latin_word(), "be a tokenizer that loses no text, got .*'a\u00e9t\u00e9b' into"),
    (unigram(), "be .* as plain text, '.*' makes token 1 of '<s>'"),
  ],
  ids=[
    "empty",
    "list",
    "model",
    "lower case",
    "words",
    "no unknown",
    "latin",
    "forgeable",
  ],
)
def test_bad_files_are_refused(tmp_path, content, message):
  file = tmp_path / "tokenizer.json"
  file.write_text(content)
  with pytest.raises(DataError, match=rf"tokenizer\.path must {message}"):
    tokenizers.load_tokenizer(file)


def test_missing_and_binary_files_are_refused(tmp_path):
  with pytest.raises(DataError, match=r"readable tokenizer\.json, got .*No such file"):
    tokenizers.load_tokenizer(tmp_path / "nowhere.json")
  (tmp_path / "binary").write_bytes(b"\xff\xfe")
  with pytest.raises(DataError, match=r"readable tokenizer\.json, got .*can't decode"):
    tokenizers.load_tokenizer(tmp_path / "binary")


def test_embedding_must_hold_every_id():
  tokenizers.check_vocab_size(make("bytes"), 258)
  message = r"tokenizer\.vocab_size must be at least 258 .* got 257\."
  with pytest.raises(ConfigError, match=message):
    tokenizers.check_vocab_size(make("bytes"), 257)
