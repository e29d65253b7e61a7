"""Packing against a stream that is written out token by token."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_jax.data import packing
from tests.corpora import ListStore, numbered_documents

LENGTHS = st.lists(st.integers(2, 9), min_size=1, max_size=6)


def test_rows_of_the_picture():
  # The picture in the module's docstring: a is 10.., b is 20..; T = 5, M = 2.
  store = ListStore([[10, 11, 12, 13], [20, 21, 22, 23]])
  rows = packing.PackedRows(store, np.array([0, 1]), seq_len=5, num_extra=2)
  first, second = rows[0], rows[1]
  assert first.tokens.tolist() == [10, 11, 12, 13, 20]
  assert first.segment_ids.tolist() == [1, 1, 1, 1, 2]
  assert first.positions.tolist() == [0, 1, 2, 3, 0]
  assert first.next_tokens.tolist() == [21, 22]
  assert first.next_segment_ids.tolist() == [2, 2]
  assert second.tokens.tolist() == [21, 22, 23, 10, 11]
  assert second.segment_ids.tolist() == [1, 1, 1, 2, 2]
  assert second.positions.tolist() == [0, 1, 2, 0, 1]
  assert second.next_tokens.tolist() == [12, 13]
  assert second.next_segment_ids.tolist() == [2, 2]


@settings(max_examples=150, deadline=None)
@given(
  lengths=LENGTHS,
  seq_len=st.integers(1, 12),
  num_extra=st.integers(1, 5),
  data=st.data(),
)
def test_rows_equal_the_stream_cut_by_hand(lengths, seq_len, num_extra, data):
  documents = numbered_documents(lengths)
  order = data.draw(st.permutations(range(len(documents))))
  rows = packing.PackedRows(ListStore(documents), order, seq_len, num_extra)
  num_rows = 2 * len(rows) + 2
  assert len(rows) == max(1, sum(lengths) // seq_len)

  # (token, running number of the document, position in it), over many epochs.
  running = itertools.count()
  stream = []
  while len(stream) < num_rows * seq_len + num_extra:
    for document in order:
      number = next(running)
      stream += [(token, number, i) for i, token in enumerate(documents[document])]

  # Read together, in an order of their own, rows are what they are one by one.
  together = np.array(data.draw(st.permutations(range(num_rows))))
  batch = rows.read(together)
  assert {x.dtype for x in batch if x is not None} == {np.dtype(np.int32)}

  for place, r in enumerate(together.tolist()):
    cut = stream[r * seq_len : (r + 1) * seq_len + num_extra]
    first = cut[0][1]
    tokens = [token for token, _, _ in cut]
    segments = [number - first + 1 for _, number, _ in cut]
    # A document that began before the row counts its positions from the row's start.
    positions = [i if n > first else at for at, (_, n, i) in enumerate(cut)]
    row = rows[r]
    assert row.tokens.tolist() == tokens[:seq_len]
    assert row.segment_ids.tolist() == segments[:seq_len]
    assert row.positions.tolist() == positions[:seq_len]
    assert row.next_tokens.tolist() == tokens[seq_len:]
    assert row.next_segment_ids.tolist() == segments[seq_len:]
    for one, many in zip(row, batch, strict=True):
      assert (one is None and many is None) or one.tolist() == many[place].tolist()


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 12))
def test_every_token_is_in_one_row_whatever_the_depth(lengths, seq_len):
  store, order = ListStore(numbered_documents(lengths)), np.arange(len(lengths))
  # seq_len epochs of the documents are a whole number of rows.
  num_rows = sum(lengths)
  by_depth = []
  for num_extra in (1, 2, 5):
    rows = packing.PackedRows(store, order, seq_len, num_extra)
    by_depth.append(np.concatenate([rows[r].tokens for r in range(num_rows)]))
  assert np.bincount(by_depth[0]).tolist() == [seq_len] * num_rows
  np.testing.assert_array_equal(by_depth[0], by_depth[1])
  np.testing.assert_array_equal(by_depth[0], by_depth[2])


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 12))
def test_no_row_has_more_documents_than_the_most(lengths, seq_len):
  store, order = ListStore(numbered_documents(lengths)), np.arange(len(lengths))
  rows = packing.PackedRows(store, order, seq_len, 1)
  # These rows begin at every token of the stream whose number is a whole multiple.
  read = rows.read(np.arange(sum(lengths)))
  most = max(len(np.unique(x)) for x in read.segment_ids)
  is_every_token = np.gcd(seq_len, sum(lengths)) == 1
  assert most <= rows.most_documents and (
    most == rows.most_documents or not is_every_token
  )


def test_one_epoch_by_iteration():
  store = ListStore(numbered_documents([4, 7]))
  rows = packing.PackedRows(store, np.array([1, 0]), seq_len=3, num_extra=1)
  tokens = [row.tokens.tolist() for row in rows]
  assert tokens == [[4, 5, 6], [7, 8, 9], [10, 0, 1]]
  assert rows[3].tokens.tolist() == [2, 3, 4]  # What was left over comes next.


def test_bad_arguments():
  store = ListStore([[1, 2]])
  with pytest.raises(ValueError, match="at least one document"):
    packing.PackedRows(store, np.zeros(0, int), seq_len=4, num_extra=1)
  with pytest.raises(IndexError, match="row must be at least 0, got -1"):
    packing.PackedRows(store, np.array([0]), seq_len=4, num_extra=1)[-1]


@settings(max_examples=150, deadline=None)
@given(
  lengths=LENGTHS,
  seq_len=st.integers(1, 6),
  num_extra=st.integers(1, 5),
  num_rows=st.integers(1, 30),
  rows_per_document=st.integers(1, 4),
  batch_size=st.integers(1, 5),
)
def test_eval_rows_equal_documents_cut_by_hand(
  lengths, seq_len, num_extra, num_rows, rows_per_document, batch_size
):
  documents = numbered_documents(lengths)
  given_order = np.arange(len(documents))[::-1]
  expected = []
  for owner, number in enumerate(given_order):
    document = documents[number]
    begins = [b for b in range(0, len(document), seq_len) if b < len(document) - 1]
    for begin in begins[:rows_per_document]:
      expected.append((owner, document[begin : begin + seq_len + num_extra]))
  expected = expected[:num_rows]

  batches = list(
    packing.eval_batches(
      ListStore(documents),
      given_order,
      seq_len=seq_len,
      num_extra=num_extra,
      num_rows=num_rows,
      rows_per_document=rows_per_document,
      batch_size=batch_size,
    )
  )
  assert len(batches) == -(-len(expected) // batch_size)
  found = []
  for batch, owners in batches:
    assert batch.tokens.shape == (batch_size, seq_len)
    assert batch.next_tokens.shape == (batch_size, num_extra)
    whole = np.concatenate([batch.tokens, batch.next_tokens], axis=1)
    segments = np.concatenate([batch.segment_ids, batch.next_segment_ids], axis=1)
    for tokens, segment, positions, owner in zip(
      whole, segments, batch.positions, owners, strict=True
    ):
      length = int(segment.sum())
      assert segment.tolist() == [1] * length + [0] * (len(segment) - length)
      inside = min(length, seq_len)
      assert positions[:inside].tolist() == list(range(inside))
      if owner < 0:
        assert length == 0
      else:
        found.append((int(owner), tokens[:length].tolist()))
  assert found == expected


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 6), num_extra=st.integers(1, 4))
def test_eval_rows_predict_every_token_once(lengths, seq_len, num_extra):
  """All but the first token of each document are next-token targets, once each."""
  predicted = []
  for batch, _ in packing.eval_batches(
    ListStore(numbered_documents(lengths)),
    np.arange(len(lengths)),
    seq_len=seq_len,
    num_extra=num_extra,
    num_rows=1000,
    rows_per_document=1000,
    batch_size=3,
  ):
    following = np.concatenate([batch.tokens[:, 1:], batch.next_tokens[:, :1]], axis=1)
    segments = np.concatenate(
      [batch.segment_ids[:, 1:], batch.next_segment_ids[:, :1]], axis=1
    )
    is_target = (batch.segment_ids == segments) & (segments != 0)
    predicted += following[is_target].tolist()
  firsts = {document[0] for document in numbered_documents(lengths)}
  assert sorted(predicted) == [t for t in range(sum(lengths)) if t not in firsts]
