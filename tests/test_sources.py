"""Documents out of files: counted by hand, found wherever they are, refused by name."""

import dataclasses
import gzip
import hashlib
import json
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mtp_jax.data import sources, text_files
from mtp_jax.data.sources import DataError

LINES = b'{"text": "one"}\n{"text": "two\\n2"}\n\n{"text": "one", "x": 1}\n'


def read(source: str, path: object = "", field: str = "text") -> sources.Documents:
  return sources.load_documents(source, str(path), field)


def digest(text: str) -> bytes:
  return hashlib.sha256(text.encode()).digest()


@pytest.fixture(scope="module")
def stdlib() -> sources.Documents:
  return read("stdlib")


def test_stdlib_counts_by_another_walk(stdlib):
  folder = Path(sysconfig.get_path("stdlib"))
  files = [
    file
    for file in folder.rglob("*.py")
    if not {"site-packages", "dist-packages"}.intersection(file.parts)
  ]
  texts, errors, empty = [], set(), 0
  for file in files:
    try:
      text = file.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
      errors.add(str(file.relative_to(folder)))
      continue
    if text.isspace() or not text:
      empty += 1
    else:
      texts.append(text)
  distinct, stats = set(texts), stdlib.stats
  assert stats.where == str(folder)
  assert stats.num_files == len(files) > 500
  assert stats.num_documents == len(distinct) == len(stdlib.texts)
  assert stats.num_bytes == sum(len(text.encode()) for text in distinct)
  assert stats.num_duplicates == len(texts) - len(distinct)
  assert stats.num_empty == empty > 0
  assert set(stats.encoding_errors) == errors
  assert len(errors) == len(stats.encoding_errors)
  joined = b"".join(sorted(digest(text) for text in distinct))
  assert stats.manifest == hashlib.sha256(joined).hexdigest()


def test_stdlib_hashes_belong_to_the_texts(stdlib):
  assert [row.tobytes() for row in stdlib.hashes_NX] == [
    digest(text) for text in stdlib.texts
  ]
  assert "json/decoder.py" in [document.name for document in stdlib.documents]


def test_site_packages_are_both_folders(tmp_path, monkeypatch):
  folders = {"purelib": tmp_path / "pure", "platlib": tmp_path / "plat"}
  for name, folder in folders.items():
    folder.mkdir()
    (folder / f"{name}.py").write_text(f"# {name}\n")
    (folder / "same.py").write_text("# same\n")
    (folder / "data.txt").write_text("not Python")
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folders[name]))
  found = read("site_packages")
  assert sorted(found.texts) == ["# platlib\n", "# purelib\n", "# same\n"]
  assert (found.stats.num_files, found.stats.num_duplicates) == (4, 1)
  # Where both are one folder, its files are read once.
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folders["purelib"]))
  assert read("site_packages").stats.num_files == 2


def test_site_packages_of_this_environment():
  first = next(iter(sources.DocumentReader("site_packages", "", "")))
  assert (Path(sysconfig.get_path("purelib")) / first.name).is_file()


@pytest.mark.parametrize("source", ["language_reference", "stories"])
def test_generated_texts(source):
  reader = sources.DocumentReader(source, "", "")
  documents = list(reader)
  stats = reader.stats()
  assert documents == list(sources.DocumentReader(source, "", ""))
  assert stats.num_documents == len(documents) > 50 and stats.num_files == 0
  assert reader.done_bytes == reader.total_bytes >= stats.num_bytes > 300_000
  assert source in sources.describe(dataclasses.asdict(stats))


def test_folder_file_and_glob(tmp_path):
  (tmp_path / "deep" / ".hidden").mkdir(parents=True)
  (tmp_path / "a.txt").write_text("a")
  (tmp_path / "deep" / "b.md").write_text("b")
  (tmp_path / "deep" / ".hidden" / "c.txt").write_text("c")
  (tmp_path / "[x].txt").write_text("d")
  assert sorted(read("files", tmp_path).texts) == ["a", "b", "c", "d"]
  assert sorted(read("files", tmp_path / "**" / "*.txt").texts) == ["a", "c", "d"]
  assert read("files", tmp_path / "a.txt").texts == ["a"]
  assert read("files", tmp_path / "[x].txt").texts == ["d"]  # It exists: no glob.


def test_links_are_followed_once(tmp_path):
  (tmp_path / "there").mkdir()
  (tmp_path / "there" / "a.txt").write_text("a")
  here = tmp_path / "here"
  here.mkdir()
  (here / "link").symlink_to(tmp_path / "there")
  (here / "again").symlink_to(tmp_path / "there")
  (here / "circle").symlink_to(here)
  (here / "dangling").symlink_to(tmp_path / "nowhere")
  os.mkfifo(here / "pipe")
  found = read("files", here)
  assert found.texts == ["a"]
  assert (found.stats.num_files, found.stats.num_duplicates) == (1, 0)


def test_nothing_is_left_out_in_silence(tmp_path):
  for name, content in {
    "a": b"text", "b": b"text", "c": b" \n\t", "d": b"", "e": b"\xff\xfe", "f": b"more"
  }.items():  # fmt: skip
    (tmp_path / name).write_bytes(content)
  found = read("files", tmp_path)
  assert found.stats == sources.SourceStats(
    where=str(tmp_path),
    num_files=6,
    num_documents=2,
    num_bytes=8,
    num_empty=2,
    num_duplicates=1,
    encoding_errors=("e",),
    manifest=sources.manifest_of([digest("text"), digest("more")]),
  )
  line = sources.describe(vars(found.stats))
  assert "2 documents" in line and "6 file(s)" in line
  assert "1 duplicate, 2 empty, 1 not UTF-8 (e, ...)" in line


def test_manifest_depends_on_the_content_alone(tmp_path):
  manifests = []
  for number, names in enumerate(("xy", "yx", "xz")):
    folder = tmp_path / str(number)
    folder.mkdir()
    for name, text in zip(names, ("first", "second"), strict=True):
      (folder / name).write_text(text)
    manifests.append(read("files", folder).stats.manifest)
  (tmp_path / "0" / "x").write_text("changed")
  manifests.append(read("files", tmp_path / "0").stats.manifest)
  assert manifests[0] == manifests[1] == manifests[2] != manifests[3]


def test_reading_again_starts_anew(tmp_path):
  (tmp_path / "a").write_text("text")
  reader = sources.DocumentReader("files", str(tmp_path), "")
  first = [list(reader), reader.stats()]
  assert [list(reader), reader.stats()] == first
  assert reader.done_bytes == reader.total_bytes == 4


def zstd(data: bytes, **parameters: int) -> bytes:
  chosen = zstandard.ZstdCompressionParameters(**parameters)
  stream = zstandard.ZstdCompressor(compression_params=chosen).compressobj()
  return stream.compress(data) + stream.flush()


COMPRESSED = {
  "a.jsonl": LINES,
  "no_last_newline.jsonl": LINES.rstrip(b"\n"),
  "windows.jsonl": LINES.replace(b"\n", b"\r\n"),
  "a.jsonl.gz": gzip.compress(LINES),
  "two_members.gz": gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]),
  "a.jsonl.zst": zstd(LINES),
  "two_frames.zst": zstd(LINES[:20]) + zstd(LINES[20:]),
  "skippable_frame.zst": b"\x50\x2a\x4d\x18\x02\x00\x00\x00xx" + zstd(LINES),
  "long_window.zst": zstd(LINES, window_log=31, enable_ldm=True),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_jsonl(tmp_path, name):
  (tmp_path / name).write_bytes(COMPRESSED[name])
  documents = list(sources.DocumentReader("jsonl", str(tmp_path / name), "text"))
  assert [document.text for document in documents] == ["one", "two\n2"]
  assert [document.name.rpartition(":")[2] for document in documents] == ["1", "2"]
  stats = read("jsonl", tmp_path / name).stats
  assert (stats.num_empty, stats.num_duplicates, stats.num_files) == (1, 1, 1)


def test_a_byte_order_mark_is_no_text(tmp_path):
  mark, folder = b"\xef\xbb\xbf", tmp_path / "texts"
  folder.mkdir()
  for name, content in (("a", b"one"), ("b", mark + b"one"), ("c", mark), ("d", b"a")):
    (folder / name).write_bytes(content)
  stats = read("files", folder).stats
  assert read("files", folder).texts == sorted(["one", "a"], key=digest)
  assert (stats.num_duplicates, stats.num_empty, stats.num_bytes) == (1, 1, 4)
  lines = LINES + json.dumps({"text": "\ufeffthree"}).encode()
  for name, content in (
    ("a.jsonl", mark + lines), ("b.jsonl.gz", gzip.compress(mark + lines)),
  ):
    (tmp_path / name).write_bytes(content)
    reader = sources.DocumentReader("jsonl", str(tmp_path / name), "text")
    assert [document.text for document in reader] == ["one", "two\n2", "three"]


def test_jsonl_across_read_chunks(tmp_path, monkeypatch):
  monkeypatch.setattr(text_files, "_CHUNK_BYTES", 7)
  texts = [f"line {i} é漢" for i in range(50)]
  lines = "".join(json.dumps({"t": text}, ensure_ascii=False) + "\n" for text in texts)
  (tmp_path / "a.jsonl").write_text(lines)
  (tmp_path / "b.zst").write_bytes(
    b"".join(zstd(line.encode()) for line in lines.splitlines(True))
  )
  for name in ("a.jsonl", "b.zst"):
    reader = sources.DocumentReader("jsonl", str(tmp_path / name), "t")
    assert [document.text for document in reader] == texts


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "two_frames.zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_archives_are_refused(tmp_path, name, damage):
  content = COMPRESSED[name]
  content = content[:-3] if damage == "cut" else content + b"garbage"
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match=rf"{name}: damaged or cut short \("):
    read("jsonl", tmp_path / name)


def test_jsonl_without_utf8_is_counted(tmp_path):
  file = tmp_path / "a.jsonl"
  # Latin-1, and half of a surrogate pair, which JSON can say and UTF-8 cannot.
  file.write_bytes(b'{"text": "\xe9"}\n{"text": "\\ud800"}\n{"text": "fine"}\n')
  stats = read("jsonl", file).stats
  assert stats.encoding_errors == (f"{file}:1", f"{file}:2")
  assert stats.num_documents == 1


@pytest.mark.parametrize(
  "line, message",
  [
    ('{"txt": "a", "b": 1}', r"'text' is not a key of this line; .* \['b', 'txt'\]"),
    ('["text"]', "must be a JSON object, got list"),
    ('{"text": 5}', "data.text_field 'text' must hold a string or .*, got int"),
    ('{"text": "a"', "not valid JSON"),
    (f'{{"text": {"9" * 5000}}}', "not valid JSON"),
    ("[" * 200_000, "not valid JSON"),
  ],
  ids=["missing field", "no object", "no string", "cut", "digits", "nesting"],
)
def test_bad_lines_are_refused_by_number(tmp_path, line, message):
  file = tmp_path / "a.jsonl"
  file.write_text(f'{{"text": "fine"}}\n{line}\n')
  with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{message}"):
    read("jsonl", file)


def test_sources_without_a_file_say_where_they_looked(tmp_path, monkeypatch):
  nowhere = tmp_path / "nowhere"
  for source, path in (("files", nowhere), ("files", tmp_path), ("jsonl", nowhere)):
    with pytest.raises(DataError, match=rf"{source}'; looked in '{path}' and found no"):
      sources.DocumentReader(source, str(path), "text")
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(nowhere))
  with pytest.raises(
    DataError, match=f"there must be .* 'stdlib'; looked in '{nowhere}"
  ):
    sources.DocumentReader("stdlib", "left over", "text")
  with pytest.raises(DataError, match=r"data\.source must be .* got 'array_record'"):
    sources.DocumentReader("array_record", str(tmp_path), "text")


def test_sources_without_a_document_say_where_they_looked(tmp_path):
  (tmp_path / "blank").write_text(" \n")
  (tmp_path / "latin").write_bytes(b"\xe9")
  message = (
    rf"data\.path must lead to documents, found none in {tmp_path}: 2 file\(s\), "
    "1 empty text.* 1 not UTF-8"
  )
  with pytest.raises(DataError, match=message):
    read("files", tmp_path)


def test_files_that_cannot_be_read_are_named(tmp_path):
  (tmp_path / "a.txt").write_text("a")
  reader = sources.DocumentReader("files", str(tmp_path), "")
  (tmp_path / "a.txt").unlink()
  (tmp_path / "a.txt").mkdir()
  reader.total_bytes = 0
  with pytest.raises(DataError, match=r"a\.txt: cannot be read \(Is a directory\)"):
    list(reader)


HASHES = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=30)


@given(HASHES, st.floats(0, 0.5), st.floats(0, 0.4), st.randoms())
def test_split_is_a_property_of_the_document(hashes, validation, test, random):
  """Other documents and their order change nothing; every document is in one split."""
  split = sources.split_of(sources.hash_array(hashes), validation, test)
  shuffled = list(enumerate(hashes))
  random.shuffle(shuffled)
  fewer = shuffled[: len(hashes) // 2 + 1]
  of_fewer = sources.split_of(
    sources.hash_array([x for _, x in fewer]), validation, test
  )
  assert [split[i] for i, _ in fewer] == of_fewer.tolist()
  for content_hash, number in zip(hashes, split, strict=True):
    uniform = int.from_bytes(content_hash[:8], "big") / 2**64
    held_out = uniform < validation + test
    assert number == (0 if not held_out else 1 if uniform < validation else 2)


def test_split_has_the_asked_for_sizes(stdlib):
  split = sources.split_of(stdlib.hashes_NX, 0.3, 0.2)
  shares = np.bincount(split, minlength=3) / len(split)
  error = 4 * np.sqrt(0.25 / len(split))
  np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=error)


@given(HASHES.map(lambda x: sorted(set(x))), st.integers(0, 2**31 - 1), st.randoms())
def test_order_is_a_property_of_the_set(hashes, seed, random):
  shuffled = list(hashes)
  random.shuffle(shuffled)
  for chosen in (seed, None):
    orders = []
    for given_order in (hashes, shuffled):
      order = sources.document_order(sources.hash_array(given_order), chosen)
      assert sorted(order) == list(range(len(hashes)))
      orders.append([given_order[i] for i in order])
    assert orders[0] == orders[1]
  assert orders[0] == hashes  # Without a seed: sorted by hash.


def test_order_follows_the_seed(stdlib):
  orders = [sources.document_order(stdlib.hashes_NX, seed) for seed in (0, 0, 1)]
  assert orders[0].tolist() == orders[1].tolist()
  n = len(orders[0])
  # Two independent permutations agree in one place on average.
  assert np.sum(orders[0] == orders[2]) < 10
  assert np.sum(orders[0] == np.arange(n)) < 10
