"""launch.prepare: whatever stops it, the same command ends with the same bytes."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mtp_jax.config import Config, ConfigError
from mtp_jax.data import prepare, prepared, sources
from mtp_jax.data import tokenizers as tokenizers_lib
from mtp_jax.data.pipeline import load_corpus
from mtp_jax.data.sources import DataError
from tests.corpora import data_config, some_texts, write_jsonl

SHARD_SIZE = 4_000
BPE = {"tokenizer__kind": "bpe", "tokenizer__vocab_size": 280}


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory) -> Path:
  file = tmp_path_factory.mktemp("texts") / "a.jsonl"
  return write_jsonl(file, some_texts(120))


@pytest.fixture(scope="module")
def config(corpus_file) -> Config:
  return data_config("jsonl", corpus_file, **BPE)


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory) -> dict[str, bytes]:
  """What an undisturbed run with one worker writes."""
  output = tmp_path_factory.mktemp("reference")
  run(config, output)
  return content(output)


def run(config: Config, output: Path, **changes: object) -> prepared.PreparedFolder:
  arguments = {"num_workers": 1, "shard_size": SHARD_SIZE} | changes
  return prepare.prepare_folder(config, output, **arguments)


def content(folder: Path) -> dict[str, bytes]:
  return {file.name: file.read_bytes() for file in folder.iterdir()}


def command(output: Path, *flags: str) -> list[str]:
  program = [sys.executable, "-m", "launch.prepare"]
  return [*program, "--config=experiments/base.py", f"--output={output}", *flags]


def test_folder_holds_what_the_legend_says(reference):
  shards = sorted(name for name in reference if name.endswith(".array_record"))
  assert len(shards) > 5
  names = {shard.replace(".array_record", ".npy") for shard in shards} | set(shards)
  assert set(reference) == names | {
    "manifest.json", "settings.json", "tokenizer.json", "index.npy"
  }  # fmt: skip
  manifest = json.loads(reference["manifest.json"])
  assert manifest["settings"] == json.loads(reference["settings.json"])
  assert manifest["source"]["num_documents"] == 120
  assert [shard["name"] for shard in manifest["shards"]] == shards


def test_workers_change_nothing(config, reference, tmp_path):
  seen = []
  run(config, tmp_path, num_workers=2, progress=lambda *report: seen.append(report))
  assert content(tmp_path) == reference
  assert list(dict.fromkeys(phase for phase, _, _ in seen)) == [
    "training the tokenizer", "tokenizing"
  ]  # fmt: skip
  for phase in ("training the tokenizer", "tokenizing"):
    done = [n for name, n, _ in seen if name == phase]
    assert done == sorted(done)
  assert seen[-1][1] == seen[-1][2] == Path(config.data.path).stat().st_size


def test_finished_folder_is_left_alone(config, reference, tmp_path):
  write(tmp_path, reference)
  times = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
  run(config, tmp_path)
  assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == times


def write(folder: Path, files: dict[str, bytes]) -> None:
  for name, data in files.items():
    (folder / name).write_bytes(data)


def test_left_at_any_point_it_is_completed(config, reference, tmp_path):
  """Nothing but the settings; half of the shards; shards that lost an end or index."""
  unfinished = set(reference) - {"manifest.json"}
  shards = sorted(name for name in unfinished if name.endswith(".array_record"))
  left = {name: reference[name] for name in unfinished - {"index.npy"}}
  left[shards[0]] = left[shards[0]][:-100]
  del left[shards[1].replace(".array_record", ".npy")]
  del left[shards[2]]
  left[shards[3].replace(".array_record", ".npy")] = b"\x93NUMPY"
  left[f"{shards[1]}.tmp-1"] = b"left over"
  for number, files in enumerate(({"settings.json": reference["settings.json"]}, left)):
    folder = tmp_path / str(number)
    folder.mkdir()
    write(folder, files)
    kept = folder / shards[4]
    before = kept.stat().st_ino if kept.exists() else None
    run(config, folder)
    assert content(folder) == reference
    assert before is None or kept.stat().st_ino == before


@pytest.mark.slow
def test_killed_and_run_again(tmp_path):
  """SIGKILL in the middle: no process stays, and the rest is done by the next run."""
  corpus = write_jsonl(tmp_path / "a.jsonl", some_texts(2000))
  flags = (
    "--config.data.source=jsonl", f"--config.data.path={corpus}", "--shard_size=3000"
  )  # fmt: skip
  output, whole = tmp_path / "killed", tmp_path / "whole"
  process = subprocess.Popen(
    command(output, *flags, "--workers=2"), start_new_session=True
  )
  finished: list[Path] = []
  while len(finished) < 3:
    assert process.poll() is None, "it ended before it could be killed"
    time.sleep(0.002)
    finished = list(output.glob("shard-*.npy"))
  process.kill()
  process.wait()
  wait_until(lambda: not group_exists(process.pid))
  assert not (output / prepared.MANIFEST).exists()
  with pytest.raises(DataError, match=r"not finished: run the same launch\.prepare"):
    prepared.open_folder(output)
  inodes = [file.stat().st_ino for file in finished]

  again = subprocess.run(
    command(output, *flags, "--workers=1"), capture_output=True, text=True, check=True
  )
  assert "2,000 documents" in again.stdout
  assert [file.stat().st_ino for file in finished] == inodes
  run(data_config("jsonl", corpus), whole, shard_size=3000)
  assert content(output) == content(whole)


@pytest.mark.slow
@pytest.mark.usefixtures("sigint_raises")
def test_interrupted_from_the_terminal(tmp_path):
  """Ctrl-C goes to all processes of the group: one message, and nobody stays."""
  corpus = write_jsonl(tmp_path / "a.jsonl", some_texts(2000))
  flags = ("--config.data.source=jsonl", f"--config.data.path={corpus}")
  process = subprocess.Popen(
    command(tmp_path / "out", *flags, "--workers=2", "--shard_size=3000"),
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  wait_until(lambda: bool(list((tmp_path / "out").glob("shard-*.npy"))))
  os.killpg(process.pid, signal.SIGINT)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 130
  assert errors == "error: interrupted; the same command continues.\n"
  wait_until(lambda: not group_exists(process.pid))
  assert not (tmp_path / "out" / prepared.MANIFEST).exists()


def wait_until(condition: Callable[[], bool]) -> None:
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def group_exists(group: int) -> bool:
  try:
    os.killpg(group, 0)
  except ProcessLookupError:
    return False
  return True


@pytest.mark.parametrize(
  "changes, key",
  [
    ({"data__text_field": "body"}, "data.text_field"),
    ({"tokenizer__vocab_size": 290}, "tokenizer.vocab_size"),
    ({"data__validation_fraction": 0.1}, "data.validation_fraction"),
    ({"tokenizer__kind": "bytes"}, "tokenizer.kind"),
  ],
)
def test_other_settings_are_refused(corpus_file, reference, tmp_path, changes, key):
  write(tmp_path, reference)
  other = data_config("jsonl", corpus_file, **(BPE | changes))
  with pytest.raises(ConfigError, match=rf"other settings: {key} is .* and was "):
    run(other, tmp_path)
  assert content(tmp_path) == reference


def test_other_source_and_shard_size_are_refused(config, reference, tmp_path):
  write(tmp_path, reference)
  with pytest.raises(ConfigError, match="shard_size is 5000 now and was 4000 there"):
    run(config, tmp_path, shard_size=5000)
  message = r"data\.source is 'files' now and was 'jsonl' there; data\.path is "
  with pytest.raises(ConfigError, match=message):
    run(data_config("files", config.data.path + "*", **BPE), tmp_path)


def test_split_does_not_matter_to_bytes(corpus_file, tmp_path):
  run(data_config("jsonl", corpus_file), tmp_path)
  run(data_config("jsonl", corpus_file, data__validation_fraction=0.5), tmp_path)


def test_changed_texts_are_refused(tmp_path):
  corpus, output = tmp_path / "a.jsonl", tmp_path / "out"
  config = data_config("jsonl", write_jsonl(corpus, some_texts(40)))
  run(config, output)
  (output / prepared.MANIFEST).unlink()
  write_jsonl(corpus, some_texts(40, seed=1))
  with pytest.raises(DataError, match=r"shard-00000\.array_record was made of other"):
    run(config, output)


def test_changed_tokenizer_file_is_refused(config, tmp_path):
  given, output = tmp_path / "given.json", tmp_path / "out"
  tokenizers_lib.save_tokenizer(tokenizers_lib.ByteTokenizer(), given)
  file = {"tokenizer__kind": "file", "tokenizer__path": str(given)}
  config = data_config("jsonl", config.data.path, tokenizer__vocab_size=300, **file)
  run(config, output)
  (output / prepared.MANIFEST).unlink()
  trained = tokenizers_lib.make_tokenizer(
    data_config("stdlib", **BPE).tokenizer, some_texts(40)
  )
  tokenizers_lib.save_tokenizer(trained, given)
  with pytest.raises(ConfigError, match=r"content of tokenizer\.path .* has changed"):
    run(config, output)


def test_bad_input_is_refused_before_anything_is_written(config, tmp_path):
  output = tmp_path / "out"
  missing = data_config("jsonl", tmp_path / "nowhere*")
  with pytest.raises(
    DataError, match=rf"looked in '{tmp_path}/nowhere\*' and found no"
  ):
    run(missing, output)
  with pytest.raises(ConfigError, match=r"data\.source must .* got 'array_record'"):
    run(data_config("array_record", tmp_path), output)
  with pytest.raises(ConfigError, match="num_workers must be at least 1, got 0"):
    run(config, output, num_workers=0)
  assert not output.exists()


def test_unusable_input_leaves_no_manifest(config, corpus_file, tmp_path):
  blank = write_jsonl(tmp_path / "blank.jsonl", [" ", ""])
  message = r"^data\.path must lead .*blank\.jsonl: .* 2 empty"
  with pytest.raises(DataError, match=message):
    run(data_config("jsonl", blank), tmp_path / "blank")
  small = data_config("jsonl", corpus_file, tokenizer__vocab_size=100)
  with pytest.raises(ConfigError, match=r"vocab_size must be at least 258 .* got 100"):
    run(small, tmp_path / "small")
  for name in ("blank", "small"):
    assert not (tmp_path / name / prepared.MANIFEST).exists()


def test_folders_of_others_are_refused(config, tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(ConfigError, match=r"new or empty folder .*'thesis\.tex'"):
    run(config, tmp_path)
  assert content(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.slow
def test_one_file_is_enough_and_the_command_prints_how_it_is_split(tmp_path):
  (tmp_path / "input.txt").write_text("one long text, " * 500)
  output = tmp_path / "prepared"
  shown = subprocess.run(
    command(output, f"--config.data.path={tmp_path}/input.txt",
            "--config.data.source=files", "--workers=1"),
    capture_output=True, text=True,
  )
  assert "too few documents to be split whole: the end of each is held" in shown.stdout
  assert load_corpus(data_config("array_record", output)).stats["is_cut"]
  other = data_config("array_record", output, data__test_fraction=0.1)
  with pytest.raises(DataError, match=r"data\.test_fraction must be 0\.05, with which"):
    load_corpus(other)


def test_documents_that_were_split_whole_leave_a_split_empty(tmp_path):
  folder = tmp_path / "texts"
  folder.mkdir()
  for i, text in enumerate(some_texts(60)):
    (folder / f"{i}.txt").write_text(text)
  half = {"data__validation_fraction": 0.4, "data__test_fraction": 0.4}
  run(data_config("files", folder, **half), tmp_path / "prepared")
  message = r"for the validation split.* prepared with these fractions, fewer than 100"
  with pytest.raises(DataError, match=message):
    load_corpus(
      data_config(
        "array_record", tmp_path / "prepared", data__validation_fraction=1e-9,
        data__test_fraction=0.1,
      )
    )


def test_two_at_once_are_refused(config, tmp_path):
  descriptor = os.open(tmp_path, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="is being written by another process"):
      run(config, tmp_path)
  finally:
    os.close(descriptor)
  assert not content(tmp_path)


def test_a_full_disk_leaves_no_half_shard(config, tmp_path):
  """The file size limit stands in for the disk: writes fail in the same way."""
  documents = list(sources.DocumentReader("jsonl", config.data.path, "text"))
  tokenizer = tokenizers_lib.ByteTokenizer()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  for limit in (0, 100, 40_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
      with pytest.raises(OSError, match=r"shard-00000\.array_record could not be writ"):
        prepare.write_shard(tmp_path, 0, documents, tokenizer)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not content(tmp_path)
  prepare.write_shard(tmp_path, 0, documents, tokenizer)
  assert len(np.load(tmp_path / "shard-00000.npy")) == len(documents)


@pytest.mark.slow
def test_a_dead_worker_ends_the_run(tmp_path):
  """As when the system takes a worker's memory: a message, and no waiting for ever."""
  corpus = write_jsonl(tmp_path / "a.jsonl", some_texts(2000))
  flags = ("--config.data.source=jsonl", f"--config.data.path={corpus}")
  process = subprocess.Popen(
    command(tmp_path / "out", *flags, "--workers=2", "--shard_size=3000"),
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    wait_until(lambda: bool(list((tmp_path / "out").glob("shard-*.npy"))))
    workers = [
      pid for pid in children(process.pid) if b"spawn_main" in command_line(pid)
    ]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
  finally:
    process.kill()
  assert process.returncode == 1
  assert "a worker process died" in errors and "Traceback" not in errors


def children(parent: int) -> list[int]:
  tasks = Path(f"/proc/{parent}/task").iterdir()
  return [int(pid) for x in tasks for pid in (x / "children").read_text().split()]


def command_line(pid: int) -> bytes:
  return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.slow
def test_command_teaches():
  shown = subprocess.run(
    [sys.executable, "-m", "launch.prepare", "--help"], capture_output=True, text=True
  )
  assert shown.returncode == 0
  assert "\n  mtp-jax prepare base --output=data/mine" in shown.stdout
  for flag in ("--config:", "--output:", "--workers:", "--shard_size:"):
    assert flag in shown.stdout


PROGRESS = """
import time
import mtp_jax.progress
seconds = iter([0.0, 3.0, 6.0, 9.0, 20.0, 26.0, 30.0, 36.0])
time.monotonic = lambda: next(seconds)
progress = mtp_jax.progress.Progress("B")
for done in (1e6, 2e6, 4e6, 5e6):
  progress("tokenizing", done, 10e6)
for done in (0, 5e6):
  progress("resting", done, 10e6)
for done in (0, 5e6):
  progress("streaming", done, 0)
"""


def test_progress_estimates_from_what_this_run_did():
  """Without a terminal: a line every 5 seconds, and the rate of this phase alone."""
  shown = subprocess.run(
    [sys.executable, "-c", PROGRESS], capture_output=True, text=True, check=True
  )
  assert shown.stdout.splitlines() == [
    "tokenizing: 4 of 10 MB, 12 s left",  # 3 MB in 6 seconds.
    "resting: 5 of 10 MB, 6 s left",
    "streaming: 5 MB",
  ]


@pytest.mark.slow
def test_workers_start_no_backend():
  """A worker imports the command's module, and for its work nothing else."""
  check = "import sys, launch.prepare; bridge = sys.modules.get('jax._src.xla_bridge')"
  check += "; assert bridge is None or not bridge.backends_are_initialized()"
  subprocess.run([sys.executable, "-c", check], check=True)
  alone = "import sys, mtp_jax.data.prepare; assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", alone], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
  "flag, message",
  [
    ("--config.data.path=", "data.path must be set"),
    ("--config.data.path=nowhere.jsonl", "looked in 'nowhere.jsonl' and found none"),
    ("--config.data.text_feld=x", "did you mean 'data.text_field'"),
    ("--shard_size=0", "--shard_size"),
  ],
)
def test_command_refuses_bad_input(tmp_path, flag, message):
  source = "--config.data.source=jsonl"
  refused = subprocess.run(
    command(tmp_path / "out", source, flag), capture_output=True, text=True
  )
  assert refused.returncode == 2
  assert message in refused.stderr and "Traceback" not in refused.stderr
  assert not (tmp_path / "out").exists()
