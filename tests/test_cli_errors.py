"""Bad input ends in one clear message and exit code 2, before anything is started."""

import pytest

pytest_plugins = ("tests.commands",)

BASE = "--config=experiments/base.py"
LADDER = "experiments/gains_with_scale.py"

CONFIGS = {
  "unknown key": (
    [BASE, "--config.mtp.dept=2"],
    "mtp.dept: unknown key; did you mean 'mtp.depth'?",
  ),
  "unknown section": (
    [BASE, "--config.mpt.depth=2"],
    "mpt.depth: unknown key; did you mean 'mtp.depth'?",
  ),
  "unknown key of a flag without dashes": (
    [BASE, "-config.sed", "2"], "sed: unknown key; did you mean 'seed'?"
  ),
  "section": (
    [BASE, "--config.mtp={}"],
    "mtp is a section; set one of its keys (--config.mtp.depth=2).",
  ),
  "wrong type": (
    [BASE, "--config.mtp.depth=two"], "mtp.depth must be of type int, got 'two'."
  ),
  "float for int": (
    [BASE, "--config.data.seq_len", "64.0"],
    "data.seq_len must be of type int, got '64.0'.",
  ),
  "not a bool": (
    [BASE, "--config.mtp.share_modules=maybe"],
    "mtp.share_modules must be of type bool, got 'maybe'.",
  ),
  "not a sequence of numbers": (
    [BASE, "--config.mtp.depth_weights=(1,'x')"],
    "mtp.depth_weights[1] must be of type float, got 'x'.",
  ),
  "choice": (
    [BASE, "--config.mtp.kind=eagle2"],
    "mtp.kind must be one of 'none', 'parallel', 'sequential', 'linear', 'medusa', "
    "'eagle', 'eagle3', 'peagle', 'dflash', 'top', got 'eagle2'.",
  ),
  "heads": (
    [BASE, "--config.trunk.num_heads=3", "--config.trunk.num_kv_heads=3"],
    "trunk.embed_dim must be divisible by trunk.num_heads (3), got 128.",
  ),
  "short rows": (
    [BASE, "--config.mtp.kind=linear", "--config.mtp.depth=8",
     "--config.data.seq_len=8", "--config.eval.max_new_tokens=4"],
    "mtp.depth must be less than data.seq_len (8), got 8.",
  ),
  "negative lambda": (
    [BASE, "--config.mtp.weight=-1"],
    "mtp.weight must be finite and not negative, got -1.0.",
  ),
  "lambda is NaN": (
    [BASE, "--config.mtp.weight=nan"],
    "--config.mtp.weight must be finite, got nan.",
  ),
  "own text that is not read": (
    [BASE, "--config.data.path=my/text"],
    "data.path must be '' unless data.source is one of 'files', 'jsonl', 'parquet', "
    "'hf', 'token_bin', 'array_record', 'mixture' (it is 'stdlib'), got 'my/text'.\n",
  ),
  "a weight of nothing": (
    [BASE, "--config.mtp.weight=1"],
    "mtp.weight must be 0.3 unless mtp.depth is positive (it is 0), got 1.0.\n",
  ),
  "a kind of nothing": (
    [BASE, "--config.mtp.kind=sequential"],
    "mtp.kind must be 'none' unless mtp.depth is positive (it is 0), got "
    "'sequential'.\n",
  ),
  "a batch of terabytes": (
    [BASE, "--config.data.batch_size=2000000000"],
    "data.batch_size must be such that it fits into memory: a row of 128 tokens takes "
    "at least 1,536 bytes, and there are ",
  ),
  "two rules": (
    [BASE, "--config.mtp.weight=-1", "--config.seed=-1"],
    "mtp.weight must be finite and not negative, got -1.0.\n"
    "seed must be in [0, 2^31), got -1.",
  ),
  "no such experiment": (
    ["--config=experiments/smok.py"],
    "--config must name an experiment file, got 'experiments/smok.py'; did you mean "
    "'experiments/smoke.py'?",
  ),
  "no such name": (
    ["smok"], "--config must name an experiment file, got 'smok'; did you mean 'smoke'?"
  ),
  "unknown key of a short override": (
    ["base", "mtp.dept=2"], "mtp.dept: unknown key; did you mean 'mtp.depth'?"
  ),
  "wrong type of a short override": (
    ["base", "mtp.depth=two"], "mtp.depth must be of type int, got 'two'."
  ),
  "no Python": (
    ["--config=README.md"],
    "--config must name an experiment file (Python), got 'README.md': ",
  ),
  "no get_config": (
    ["--config", "tests/corpora.py"],
    "--config must name a file with a function get_config, got 'tests/corpora.py'.",
  ),
  "no config": ([], "--config is required: "),
  "no presets": (
    [f"{BASE}:cpu"], "--config: experiments/base.py has no presets, got 'cpu'."
  ),
  "unknown preset": (
    [f"--config={LADDER}:tpu"],
    f"--config={LADDER}:tpu: preset must be one of cpu, gpu, cluster, got 'tpu'.",
  ),
  "unknown flag": ([BASE, "--workdri=x"], "Unknown command line flag 'workdri'."),
  "no flag": ([BASE, "smoke"], "'smoke': arguments must be flags (--name=value)."),
}
FILES = {
  "missing folder": (
    ["--config.data.source=files", "--config.data.path=no/such/folder"],
    "data.path must be a folder, file or glob that names at least one file for "
    "data.source 'files'; looked in 'no/such/folder' and found none.",
  ),
  "missing tokenizer": (
    ["--config.tokenizer.kind=file", "--config.tokenizer.path=no.json"],
    "tokenizer.path must be a readable tokenizer.json, got 'no.json'",
  ),
  "missing text of a model": (
    ["--config.data.train_on=no.jsonl"],
    "data.train_on must be a JSONL file, got 'no.jsonl', which does not exist.",
  ),
  "missing prepared text": (
    ["--config.data.source=array_record", "--config.data.path=no/such"],
    "data.path must be a folder written by `python -m launch.prepare`; 'no/such'",
  ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_bad_configs(command, name, tmp_path):
  arguments, message = CONFIGS[name]
  result = command("launch.train", f"--workdir={tmp_path / 'run'}", *arguments)
  assert result.output.startswith(f"error: {message}")
  assert "Traceback" not in result.output
  assert result.code == 2
  assert not result.touched_backend
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("module", ["launch.train", "launch.sweep"])
def test_missing_files(command, module, name, tmp_path):
  arguments, message = FILES[name]
  result = command(module, BASE, f"--workdir={tmp_path / 'run'}", *arguments)
  prefix = "base: " if module == "launch.sweep" else ""
  assert result.output.startswith(f"error: {prefix}{message}")
  assert result.code == 2
  assert not result.touched_backend
  assert not (tmp_path / "run").exists()


def test_mesh_that_does_not_fit_the_devices(command, tmp_path):
  result = command(
    "launch.train", BASE, f"--workdir={tmp_path / 'run'}", "--config.mesh.fsdp=2"
  )
  assert result.output == (
    "error: mesh must be such that fsdp * expert * tensor * context divides the number "
    "of devices (1), got {'data': -1, 'fsdp': 2, 'expert': 1, 'tensor': 1, 'context': "
    "1}.\n"
  )
  assert result.code == 2
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module, more", [
  ("launch.train", [BASE]), ("launch.sweep", [BASE]), ("launch.evaluate", []),
  ("launch.generate", ["--prompt=a"]),
])
@pytest.mark.parametrize("workdir, message", [
  ("", "--workdir must name a folder, got ''."),
  ("README.md", "--workdir must name a folder, got 'README.md', which is a file."),
  ("README.md/run", "--workdir must name a folder, got 'README.md/run': Not a dir"),
  ("x" * 300, "--workdir must name a folder, got 'xxxxxx"),
])
def test_bad_workdirs(command, module, more, workdir, message):
  result = command(module, f"--workdir={workdir}", *more)
  assert result.output.startswith(f"error: {message}")
  assert len(result.output.splitlines()) == 1
  assert result.code == 2
  assert not result.touched_backend


def test_a_workdir_that_cannot_be_written(command):
  result = command("launch.train", BASE, "--workdir=/proc/run")
  assert result.output.startswith("error: /proc/run must be a folder that can be ")
  assert result.code == 2


@pytest.mark.parametrize("content, reason", [
  ("x = 1 / 0\ndef get_config(): pass\n", "ZeroDivisionError: division by zero"),
  ("def get_config(): raise KeyError('a')\n", "KeyError: 'a'"),
  ("import no_such_module\ndef get_config(): pass\n",
   "ModuleNotFoundError: No module named 'no_such_module'"),
  ("def get_config(): raise ValueError('no size')\n", "no size"),
])
def test_an_experiment_that_raises(command, tmp_path, content, reason):
  file = tmp_path / "it.py"
  file.write_text(content)
  result = command("launch.train", f"--config={file}", f"--workdir={tmp_path / 'run'}")
  assert result.output.splitlines()[0] == f"error: --config={file}: {reason}"
  assert (result.code, "Traceback" in result.output) == (2, False)


@pytest.mark.parametrize("more", [[], ["--config.seed=1"]])
def test_an_experiment_that_returns_nothing(command, tmp_path, more):
  file = tmp_path / "it.py"
  file.write_text("def get_config(): pass\n")
  result = command("launch.sweep", f"--config={file}", "--dry_run", *more)
  message = f"error: --config={file}: get_config() must return a config, got None."
  assert message in result.output.splitlines()
  assert (result.code, "Traceback" in result.output) == (2, False)


@pytest.mark.parametrize("body, reason", [
  ("raise RuntimeError('no points')", "RuntimeError: no points"),
  ("raise ValueError('no such size')", "no such size"),
  ("pass", "TypeError: 'NoneType' object is not iterable"),
  ("return [5]", "must yield dicts of overrides, got 5."),
])
@pytest.mark.parametrize("name", ["sweep", "sweep_seed"])
def test_a_sweep_that_raises(command, tmp_path, name, body, reason):
  file = tmp_path / "it.py"
  file.write_text(
    f"from experiments.base import get_config\ndef {name}(): {body}\n"
  )
  result = command("launch.sweep", f"--config={file}", "--dry_run")
  assert result.output.startswith(f"error: --config: {name}()")
  assert reason in result.output
  assert (result.code, "Traceback" in result.output) == (2, False)


@pytest.mark.parametrize("module, flag, message", [
  ("launch.sweep", "--watch_seconds=nan", "--watch_seconds must be finite, got nan."),
  ("launch.sweep", "--watch_seconds=1e300", "flag --watch_seconds=1e300: "),
  ("launch.sweep", "--max_attempts=9223372036854775808",
   "--max_attempts must be less than 2^63, got 9223372036854775808."),
  ("launch.sweep", "--parallel=0", "--parallel must be from 1 to the number of CPU"),
  ("launch.sweep", "--parallel=-1", "--parallel must be from 1 to the number of CPU"),
  ("launch.train", "--start_seconds=99999999999", "flag --start_seconds=99999999999: "),
  ("launch.train", "--heartbeat_seconds=99999999999", "flag --heartbeat_seconds=9"),
  ("launch.train", "--stall_seconds=99999999999", "flag --stall_seconds=99999999999: "),
  ("launch.prepare", "--workers=99999999999", "flag --workers=99999999999: "),
  ("launch.prepare", "--output=", "--output must name a folder, got ''."),
  ("launch.prepare", "--output=README.md", "--output must name a folder, got 'READ"),
])
def test_numbers_and_folders_of_others(command, tmp_path, module, flag, message):
  more = {
    "launch.sweep": ["--dry_run"],
    "launch.train": [f"--workdir={tmp_path / 'run'}"],
    "launch.prepare": [] if "output" in flag else [f"--output={tmp_path / 'run'}"],
  }[module]
  result = command(module, BASE, *more, flag)
  assert result.output.startswith(f"error: {message}")
  assert result.code == 2
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag, message", [
  ("--seed=-1", "flag --seed=-1: "),
  ("--seed=4294967296", "flag --seed=4294967296: "),
  ("--max_new_tokens=0", "flag --max_new_tokens=0: "),
  ("--drafts=100000", "flag --drafts=100000: "),
  ("--prompt_file=README.md", "one of --prompt and --prompt_file is required, got bo"),
])
def test_numbers_out_of_range(command, flag, message):
  result = command("launch.generate", "--workdir=x", "--prompt=a", flag)
  assert result.output.startswith(f"error: {message}")
  assert result.code == 2
  assert not result.touched_backend


def test_a_kernel_of_another_platform(command, tmp_path):
  result = command(
    "launch.train", BASE, f"--workdir={tmp_path / 'run'}",
    "--config.trunk.attention=cudnn",
  )
  assert result.output == (
    "error: trunk.attention must be 'auto', 'xla' or 'blocked' on platform 'cpu': "
    "cuDNN is of NVIDIA GPUs, got 'cudnn'.\n"
  )
  assert result.code == 2
  assert not (tmp_path / "run").exists()


SWEEPS = {
  "bad trial": (
    ["--config=experiments/depth_sweep.py", "--config.data.seq_len=4",
     "--config.eval.max_new_tokens=2"],
    "depth=4,seed=0 and 2 more: mtp.depth must be less than data.seq_len (4), got 4.",
  ),
  "unknown sweep": (
    ["--config=experiments/depth_sweep.py", "--sweep=width"],
    "--sweep must name some of depth, seed, got 'width'.",
  ),
  "set twice": (
    ["--config=experiments/depth_sweep.py", "--config.seed=1"],
    "depth=0,seed=0 and 14 more: seed: set by the sweep; choose what varies with "
    "--sweep.",
  ),
  "no match": (
    ["--config=experiments/ntp_baseline.py", "--only=seed=9"],
    "--only: no trial matches 'seed=9'; there are\n  seed=0\n",
  ),
  "too many workers": (
    ["--config=experiments/ntp_baseline.py", "--parallel=100000"],
    "--parallel must be from 1 to the number of CPU cores",
  ),
  "bad preset": (
    [f"--config={LADDER}:tpu"], f"--config={LADDER}:tpu: preset must be one of cpu"
  ),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_bad_sweeps(command, name, tmp_path):
  arguments, message = SWEEPS[name]
  result = command("launch.sweep", f"--workdir={tmp_path / 'runs'}", *arguments)
  assert result.output.startswith(f"error: {message}")
  assert result.code == 2
  assert not result.touched_backend
  assert not (tmp_path / "runs").exists()


def test_train_needs_an_experiment_or_a_run(command):
  result = command("launch.train")
  assert result.output.startswith("error: --config is required: an experiment (smoke, ")
  assert result.code == 2 and not result.touched_backend


@pytest.mark.parametrize("arguments, message", [
  (["--workdir=no/such/run"], "--workdir must be a run folder, got 'no/such/run'"),
  ([], "--workdir is required."),
  (["--workdir=x", "--split=train"], "flag --split=train: value should be one of"),
])
def test_bad_evaluations(command, arguments, message):
  result = command("launch.evaluate", *arguments)
  assert result.output.startswith(f"error: {message}")
  assert result.code == 2
  assert not result.touched_backend


LONG = "x" * 300
EXPORT = ("launch.export", "--workdir=x", "--layout=llama")
WRITE = ("launch.write_corpus", "--workdir=x", "--documents=2")
PLAN = ("launch.plan", BASE, "--topology=v5p")
TRAIN = ("launch.benchmark", "train")
DECODE = ("launch.benchmark", "decode")
GENERATE = ("launch.generate", "--workdir=x", "--prompt=a")
TREE = ("launch.tree", "--workdir=x")


@pytest.mark.parametrize("words, message", [
  ((*EXPORT,), "--output is required with --layout."),
  ((*EXPORT, "--output="), "--output must name a folder, got ''."),
  ((*EXPORT, "--output= "), "--output must name a folder, got ' '."),
  ((*EXPORT, "--output=README.md"), "--output must name a folder, got 'README.md', "),
  ((*EXPORT, "--output=README.md/x"), "--output must name a folder, got 'README.md/x'"),
  ((*EXPORT, f"--output={LONG}"), f"--output must name a folder, got '{LONG[:79]}: "),
  ((*EXPORT, "--output=tests"), "--output must name a new or empty folder, got 'te"),
  (
    ("launch.export", "--workdir=x", "--layout=medusa", "--output=y", "--base_model="),
    "--base_model is required with --layout=medusa.",
  ),
  ((*EXPORT, "--output=y", "--step=-1"), "flag --step=-1: "),
  ((*WRITE, "--output="), "--output must end in .jsonl, got ''."),
  ((*WRITE, "--output=.jsonl"), "--output must end in .jsonl, got '.jsonl'."),
  ((*WRITE, "--output=README.md/x.jsonl"), "--output must name a folder, got 'README"),
  ((*WRITE, f"--output={LONG}.jsonl"), f"--output must name a file, got '{LONG[:79]}:"),
  ((*WRITE, "--output=x.jsonl", "--excerpt_tokens=0"), "flag --excerpt_tokens=0: "),
  ((*WRITE, "--output=x.jsonl", "--documents=0"), "flag --documents=0: "),
  ((*WRITE, "--output=x.jsonl", "--top_k=0"), "flag --top_k=0: "),
  ((*GENERATE, "--top_k=-1"), "flag --top_k=-1: "),
  ((*GENERATE, "--top_k=2147483648"), "flag --top_k=2147483648: "),
  ((*GENERATE, "--top_p=1.5"), "flag --top_p=1.5: "),
  ((*GENERATE, "--min_p=-0.1"), "flag --min_p=-0.1: "),
  ((*GENERATE, "--temperature=-1"), "flag --temperature=-1: "),
  ((*GENERATE, "--top_p=nan"), "--top_p must be finite, got nan."),
  ((*TREE, "--nodes=0"), "flag --nodes=0: "),
  ((*TREE, "--ranks=0"), "flag --ranks=0: "),
  ((*PLAN, "--output="), "--output must name a folder, got ''."),
  ((*PLAN, "--output=README.md"), "--output must name a folder, got 'README.md', "),
  ((*PLAN, "--mfu=0"), "--mfu must be in (0, 1], got 0.0."),
  ((*PLAN, "--mfu=nan"), "--mfu must be finite, got nan."),
  ((*PLAN, "--topology="), "--topology must have at least one value, got ''."),
  ((*PLAN, "--topology=v5p:"), "--topology must have sizes after the colon, "),
  ((*PLAN, "--only=zzz"), "--only: no trial matches 'zzz'; there are"),
  ((*TRAIN, "--output="), "--output must name a folder, got ''."),
  ((*TRAIN, "--output=README.md"), "--output must name a folder, got 'README.md', "),
  ((*TRAIN, "--name=a/b"), "--name must be 1 to 200 letters, digits or any of "),
  ((*TRAIN, "--name="), "--name must be 1 to 200 letters, digits or any of "),
  ((*TRAIN, "--output=README.md"), "--output must name a folder, got 'README.md', "),
  ((*TRAIN, "--depths="), "flag --depths=: must be numbers from 0 up, separated"),
  ((*TRAIN, "--models="), "flag --models=: must be of tiny, 0.3M, 1M, 3M, 5M, 10M"),
  ((*TRAIN, "--contestants="), "flag --contestants=: must be of ours, torch eager"),
  ((*DECODE, "--drafts=", "--runs=x"), "--drafts must have at least one value, got ''"),
  (("launch.sweep", BASE, "--sweep="), "--sweep must have at least one value, got ''."),
  (
    ("launch.train", BASE, "--workdir=x", "--local_device_ids="),
    "--local_device_ids must have at least one value, got ''.",
  ),
  (
    ("launch.train", BASE, "--workdir=x", "--profile=9:501"),
    "--profile must be FIRST:LAST, two steps from 1 to train.num_steps (500) in their",
  ),
  ((*DECODE, "--seed=-1"), "flag --seed=-1: "),
  ((*DECODE, "--least_seconds=-1"), "flag --least_seconds=-1: -1.0 is not number >= "),
  ((*DECODE, "--drafts=-1", "--runs=x"), "--drafts must be whole numbers, got -1."),
  ((*DECODE, "--drafts=2"), "--drafts is for trained models: it needs --runs."),
  ((*DECODE, "--trees=own"), "--trees is for trained models: it needs --runs."),
  ((*DECODE, "--runs="), "--runs must name run folders, '.' is none."),
])
def test_garbage_is_refused_before_any_work(command, words, message):
  result = command(*words)
  assert result.output.startswith(f"error: {message}"), result.output
  assert result.code == 2 and not result.touched_backend
  assert len(result.output.splitlines()) <= 3
