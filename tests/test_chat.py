"""Chats: tokens and masks are those of transformers, whatever row they are packed into.

The oracle is `apply_chat_template(..., return_assistant_tokens_mask=True)`.
"""

import json

import numpy as np
import pytest

from mtp_jax.data import chat, formats, prepare
from mtp_jax.data import tokenizers as tokenizers_lib
from mtp_jax.data.pipeline import TrainLoader, load_corpus
from mtp_jax.data.sources import DataError
from mtp_jax.targets import future_targets
from tests.corpora import data_config, some_texts
from tests.test_pipeline import assert_same, take

pytest.importorskip("jinja2")

NAMES = "<|im_start|>", "<|im_end|>"
# With tags; without; and one that changes the text of earlier messages.
TAGGED = (
  "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
  "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
  "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# The same span as without tags: the end of the line belongs to the message.
WHOLE = (
  TAGGED.replace("+ '<|im_end|>' }}{% endgeneration %}",
                 "+ '<|im_end|>\n' }}{% endgeneration %}")
  .replace("{% else %}{{ m.content + '<|im_end|>' }}",
           "{% else %}{{ m.content + '<|im_end|>\n' }}")
  .replace("{{ '\n' }}{% endfor %}", "{% endfor %}")
)


def conversations(count):
  texts = iter(some_texts(4 * count))
  found = []
  for number in range(count):
    turns = [("system", next(texts)[:20])] if number % 3 == 0 else []
    for _ in range(1 + number % 2):
      turns += [("user", next(texts)[:90]), ("assistant", next(texts)[:70])]
    if number % 5 == 0:
      turns += [("user", "no answer yet é")]
    found.append([{"role": role, "content": text} for role, text in turns])
  return found


CHATS = conversations(120)


def model_folder(folder, template):
  """A tokenizer with two special tokens, and a chat template beside it."""
  section = data_config("stdlib", tokenizer__kind="bpe", tokenizer__vocab_size=300)
  tokenizer = tokenizers_lib.make_tokenizer(section.tokenizer, some_texts(40))
  model = tokenizer._model
  model.add_special_tokens([*NAMES])
  model.save(str(folder / "tokenizer.json"))
  values = {"bos_token": "<|bos|>", "eos_token": {"content": "<|im_end|>"}}
  (folder / "tokenizer_config.json").write_text(json.dumps(values))
  (folder / "chat_template.jinja").write_text(template)
  return folder


def write(file, chats):
  file.write_text("".join(json.dumps({"messages": x}) + "\n" for x in chats))
  return file


def config_of(folder, path, source="jsonl", **changes):
  given = {
    "data__text_field": "messages", "data__seq_len": 48, "data__batch_size": 4,
    "tokenizer__kind": "file", "tokenizer__path": str(folder / "tokenizer.json"),
    "tokenizer__vocab_size": 320,
  }
  if source == "array_record":
    del given["data__text_field"]
  return data_config(source, path, **(given | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = model_folder(tmp_path_factory.mktemp("chat"), TAGGED)
  write(folder / "chats.jsonl", CHATS)
  return folder


def oracle(folder, template, messages):
  """Returns `(ids, mask)` by transformers."""
  transformers = pytest.importorskip("transformers")
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|bos|>",
    eos_token="<|im_end|>", chat_template=template,
  )
  found = tokenizer.apply_chat_template(
    messages, return_dict=True, return_assistant_tokens_mask=True
  )
  return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize(
  "template, of_oracle", [(TAGGED, TAGGED), (PLAIN, WHOLE)], ids=["tags", "no tags"]
)
def test_tokens_and_masks_are_those_of_transformers(tmp_path, template, of_oracle):
  folder = model_folder(tmp_path, template)
  tokenizer = tokenizers_lib.load_tokenizer(folder / "tokenizer.json")
  file = write(tmp_path / "a.jsonl", CHATS[:30])
  pieces = list(formats.read_jsonl(str(file), "messages", tokenizer))
  assert len(pieces) == 30
  for piece, messages in zip(pieces, CHATS, strict=False):
    ids, mask = oracle(folder, of_oracle, messages)
    assert np.where(piece.ids < 0, ~piece.ids, piece.ids).tolist() == ids
    assert (piece.ids >= 0).astype(int).tolist() == mask
    assert 0 < sum(mask) < len(mask)


def test_only_tokens_of_the_assistant_are_targets_at_every_depth(folder):
  """Every target of every depth is looked up in the chat that it is from."""
  corpus = load_corpus(config_of(folder, folder / "chats.jsonl"))
  known = {}
  for messages in CHATS:
    ids, mask = oracle(folder, TAGGED, messages)
    known[tuple(ids)] = mask
  stored = [
    corpus.store.read(i, 0, int(n)) for i, n in enumerate(corpus.store.lengths_N)
  ]
  order = corpus.documents("train", corpus.config.data.seed)
  marked = [np.where(x < 0, ~x, x) for x in stored]
  stream = np.concatenate([marked[i] for i in order])
  is_target = np.concatenate([known[tuple(marked[i].tolist())] for i in order])
  owner = np.repeat(order, [len(marked[i]) for i in order])
  rows, depth, T = corpus.train_rows(3), 2, 48
  batch = rows.read(np.arange(len(rows) - 1))
  targets_MBT, mask_MBT = map(np.asarray, future_targets(batch, depth))
  for m in range(1 + depth):
    for b in range(len(batch.tokens)):
      for t in range(T):
        here, there = b * T + t, b * T + t + 1 + m
        expected = is_target[there] and owner[here] == owner[there]
        assert mask_MBT[m, b, t] == expected
        if expected:
          assert targets_MBT[m, b, t] == stream[there]
  assert np.all(batch.tokens >= 0) and 0.1 < mask_MBT.mean() < 0.9


def test_held_out_rows_have_the_mask_too(folder):
  corpus = load_corpus(config_of(folder, folder / "chats.jsonl", eval__split="test"))
  batch, owners = next(corpus.eval_batches(2))
  document = int(corpus.documents("test")[owners[0]])
  tokens = corpus.store.read(document, 0, 48)
  np.testing.assert_array_equal(batch.scored[0][: len(tokens)], tokens >= 0)
  ids = np.where(tokens < 0, ~tokens, tokens)
  np.testing.assert_array_equal(batch.tokens[0][: len(tokens)], ids)
  assert not batch.scored[owners < 0].any()
  assert NAMES[0] not in corpus.texts("test")[0]  # Special tokens are no text.


@pytest.mark.parametrize("source", ["parquet", "array_record"])
def test_other_formats_and_resumed_runs_have_the_same_batches(folder, tmp_path, source):
  config = config_of(folder, folder / "chats.jsonl")
  loader = TrainLoader(load_corpus(config).train_rows(2), batch_size=4, seed=0)
  take(loader, 5)
  state, expected = json.loads(json.dumps(loader.get_state())), take(loader, 5)
  assert expected[0].scored is not None
  if source == "parquet":
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"messages": CHATS})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
  else:
    path = tmp_path / "prepared"
    prepare.prepare_folder(config, path, num_workers=1, shard_size=1 << 20)
  again = TrainLoader(
    load_corpus(config_of(folder, path, source)).train_rows(2), batch_size=4, seed=0
  )
  again.set_state(state)
  assert_same(take(again, 5), expected)


def test_a_saved_tokenizer_keeps_its_chat_format(folder, tmp_path):
  tokenizer = tokenizers_lib.load_tokenizer(folder / "tokenizer.json")
  tokenizers_lib.save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
  again = tokenizers_lib.load_tokenizer(tmp_path / "tokenizer.json")
  assert again.chat == tokenizer.chat == chat.ChatFormat(
    TAGGED, "<|bos|>", "<|im_end|>"
  )


def test_chats_and_texts_mix(folder, tmp_path):
  texts = write_texts(tmp_path / "b.jsonl")
  path = f"1 jsonl {folder}/chats.jsonl; 1 jsonl {texts}"
  rows = load_corpus(config_of(folder, path, "mixture")).train_rows(1)
  batch = rows.read(rows.order(0, 0, 64))
  shares = batch.scored.mean(axis=1)
  # The parts take turns; of a text every token is a target.
  assert np.all(shares[1::2] == 1) and 0.1 < shares[::2].mean() < 0.8


def write_texts(file):
  file.write_text("".join(json.dumps({"messages": x}) + "\n" for x in some_texts(120)))
  return file


@pytest.mark.parametrize(
  "messages, message",
  [
    ([{"content": "x"}], "every message must have a role"), (["x"], "must have a role"),
    ([], "every message must have a role"),
    ([{"role": "user"}], "messages that the chat template accepts"),
  ],
)
def test_bad_messages_are_refused_by_line(folder, tmp_path, messages, message):
  file = write(tmp_path / "a.jsonl", [CHATS[0], messages])
  with pytest.raises(DataError, match=rf"a\.jsonl:2: data\.text_field.*{message}"):
    load_corpus(config_of(folder, file))


def test_templates_that_hide_the_answer_are_refused(tmp_path):
  folder = model_folder(tmp_path, PLAIN.replace("m.role +", "messages[-1].role +"))
  file = write(tmp_path / "a.jsonl", CHATS[:3])
  with pytest.raises(DataError, match=r"a\.jsonl:1: .*must extend the text with every"):
    load_corpus(config_of(folder, file))


def test_a_template_with_a_syntax_error_is_refused(tmp_path):
  folder = model_folder(tmp_path, "{% for m in messages %}{{ m.content }")
  file = write(tmp_path / "a.jsonl", CHATS[:3])
  with pytest.raises(DataError, match=r"tokenizer\.path must have a chat template"):
    load_corpus(config_of(folder, file))


def test_chats_without_an_answer_are_refused(folder, tmp_path):
  file = write(tmp_path / "a.jsonl", [chat[:1] for chat in CHATS if len(chat) % 2 == 0])
  with pytest.raises(DataError, match="must hold text of an assistant in the train"):
    load_corpus(config_of(folder, file))


def test_chats_need_a_template(folder, tmp_path):
  (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
  for changes in ({}, {"tokenizer__kind": "bytes", "tokenizer__path": ""}):
    config = config_of(tmp_path, folder / "chats.jsonl", **changes)
    with pytest.raises(DataError, match=r"holds messages.*beside a chat_template"):
      load_corpus(config)
