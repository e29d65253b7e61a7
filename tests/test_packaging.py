"""The package as a user installs it: requirements, wheel, sdist, commands elsewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile

import pytest
import yaml

import mtp_jax
from tests.commands import ROOT
from tests.quick_xla import xla_flags

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.mark.parametrize("file, extra", [
  ("requirements.txt", None),
  ("requirements-dev.txt", "dev"),
  ("requirements-cuda.txt", "cuda12"),
  ("requirements-cuda13.txt", "cuda13"),
  ("requirements-tpu.txt", "tpu"),
  ("requirements-plan.txt", "plan"),
])
def test_requirements_are_those_of_the_package(file, extra):
  lines = [x.strip() for x in (ROOT / file).read_text().splitlines()]
  lines = [x.replace('"', "'") for x in lines if x and not x.startswith("#")]
  if extra:
    assert lines.pop(0) == "-r requirements.txt"
  wanted = PROJECT["dependencies"] if extra is None else EXTRAS[extra]
  assert sorted(lines) == sorted(wanted)


def test_every_file_of_requirements_is_compared():
  (mark,) = test_requirements_are_those_of_the_package.pytestmark
  files = {file for file, _ in mark.args[1]}
  assert files == {path.name for path in ROOT.glob("requirements*.txt")}
  for extra in ("docs", "hub", "notebook", "text"):
    assert set(EXTRAS[extra]) <= set(EXTRAS["dev"])


def test_make_picks_the_extra():
  def wanted(*arguments):
    made = ["make", "-n", "-B", *arguments]
    return subprocess.check_output(made, cwd=ROOT, text=True)

  assert '--no-compile -e "."\n' in wanted("setup")
  for extra in set(EXTRAS) & {"cuda12", "cuda13", "tpu"}:
    assert f'-e ".[{extra}]"\n' in wanted("setup", f"ACCEL={extra}")
  assert '-e ".[dev]"\n' in wanted("setup-dev")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """Returns the sdist, and the wheel that is built from it, from the tracked files."""
  source = tmp_path_factory.mktemp("source")
  tracked = subprocess.run(
    ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
    cwd=ROOT, capture_output=True, check=True,
  )
  for name in filter(None, tracked.stdout.decode().split("\0")):
    if (ROOT / name).is_file() and not name.startswith("experiments/results"):
      (source / name).parent.mkdir(parents=True, exist_ok=True)
      (source / name).write_bytes((ROOT / name).read_bytes())
  output = tmp_path_factory.mktemp("built")
  backend = "import setuptools.build_meta as b, sys; "
  run([sys.executable, "-c", f"{backend}b.build_sdist(sys.argv[1])", output], source)
  (sdist,) = output.glob("*.tar.gz")
  with tarfile.open(sdist) as archive:
    archive.extractall(output, filter="data")
  (unpacked,) = (path for path in output.iterdir() if path.is_dir())
  run([sys.executable, "-c", f"{backend}b.build_wheel(sys.argv[1])", output], unpacked)
  (wheel,) = output.glob("*.whl")
  return sdist, wheel


def run(words, folder, **environment):
  """Runs a command, which must succeed; returns what it printed."""
  result = subprocess.run(
    list(map(str, words)), cwd=folder, capture_output=True, text=True,
    env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment,
  )
  assert result.returncode == 0, result.stdout + result.stderr
  return result.stdout


def empty_environment(folder):
  """Makes an environment; returns its Python and its folder of packages.

  It has the packages that the tests run with, instead of a download.
  """
  venv.create(folder, with_pip=False)
  (site,) = folder.glob("lib/python*/site-packages")
  ours = [path for path in sys.path if path.endswith("site-packages")]
  (site / "theirs.pth").write_text("\n".join(ours))
  return folder / "bin" / "python", site


@pytest.mark.slow
def test_the_wheel_has_all_and_no_more(built):
  sdist, wheel = built
  assert f"mtp_jax-{mtp_jax.__version__}" in wheel.name
  names = set(zipfile.ZipFile(wheel).namelist())
  tops = {name.partition("/")[0] for name in names}
  info = f"mtp_jax-{mtp_jax.__version__}.dist-info"
  assert tops == {"mtp_jax", "launch", "experiments", info}
  wanted = {
    str(path.relative_to(ROOT))
    for top in ("mtp_jax", "launch", "experiments")
    for pattern in ("*.py", "*.csv", "*.yaml", "py.typed")
    for path in (ROOT / top).rglob(pattern)
    if "results" not in path.parts and "notebooks" not in path.parts
  } | {
    str(path.relative_to(ROOT))
    for path in mtp_jax.demo_checkpoint().rglob("*") if path.is_file()
  }
  assert {name for name in names if ".dist-info/" not in name} == wanted
  with tarfile.open(sdist) as archive:
    inside = {name.partition("/")[2] for name in archive.getnames()}
  assert wanted | {"pyproject.toml", "README.md", "LICENSE"} <= inside


@pytest.mark.slow
def test_a_newcomer_installs_trains_generates_and_loads(built, tmp_path):
  """In an environment of its own, from folders that hold nothing of the clone."""
  _, wheel = built
  python, site = empty_environment(tmp_path / "env")
  run([python, "-m", "pip", "install", "--no-deps", "--no-index", wheel], tmp_path)
  run([python, "-m", "pip", "check"], tmp_path)
  quick = {
    "XLA_FLAGS": xla_flags(), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)
  }
  command = python.with_name("mtp-jax")
  shown = run([command, "demo", "--max_new_tokens=16"], tmp_path, **quick)
  assert "identical to plain decoding: yes" in shown and str(site) in shown
  here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
  here.mkdir(), elsewhere.mkdir()
  (here / "input.txt").write_text("".join(f"line {i} of it\n" for i in range(2_000)))
  assert run([command, "--version"], here).strip() == mtp_jax.__version__
  run([
    command, "train", "smoke", "data.source=files", "data.path=input.txt",
    "train.num_steps=4", "train.eval_every=0", "checkpoint.every_steps=4",
    "eval.num_rows=4", "eval.line_prompts=2", "eval.function_prompts=0",
    "train.diagnostics_every=0",
  ], here, **quick)
  folder = here / "runs" / "smoke"
  assert (folder / "DONE").is_file()
  facts = json.loads((folder / "run.json").read_text())
  assert facts["commit"] == "" and facts["data"]["is_cut"]
  text = run([
    command, "generate", folder, "--prompt=line 5", "--max_new_tokens=8", "--nocompare"
  ], elsewhere, **quick)
  assert text.startswith("line 5")
  program = (
    "import mtp_jax, sys; m = mtp_jax.load(sys.argv[1]); "
    "print(mtp_jax.__file__, m.step, m.losses('line 5 of it').shape)"
  )
  shown = run([python, "-c", program, folder], elsewhere, **quick)
  assert str(site) in shown and re.search(r" 4 \(3, \d+\)", shown)


@pytest.mark.slow
def test_an_editable_install_is_the_clone(tmp_path):
  """`pip install -e .` finds three packages and no others at the root."""
  python, _ = empty_environment(tmp_path / "env")
  clone = tmp_path / "clone"
  for name in ("mtp_jax", "launch", "experiments", "tests"):
    (clone / name).mkdir(parents=True)
    shutil.copy(ROOT / name / "__init__.py", clone / name)
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, clone)
  run([
    python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index",
    "-e", clone,
  ], tmp_path)
  program = "import mtp_jax, launch, experiments; print(mtp_jax.__file__)"
  assert run([python, "-c", program], tmp_path).strip().startswith(str(clone))


@pytest.mark.parametrize("accel, wanted", [
  ("cpu", "/opt/mtp_jax"), ("cuda12", "/opt/mtp_jax[cuda12]"),
  ("cuda13", "/opt/mtp_jax[cuda13]"), ("tpu", "/opt/mtp_jax[tpu]"),
])
def test_the_image_installs_the_extra(accel, wanted):
  (line,) = re.findall(r"^RUN (.*)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
  script = f'pip() {{ printf "%s\\n" "$@"; }}; {line}'
  assert run(["sh", "-c", script], ROOT, ACCEL=accel).split("\n")[-2] == wanted
  assert accel == "cpu" or accel in EXTRAS


def test_the_version_stands_in_one_place_and_in_the_citation():
  assert PROJECT["dynamic"] == ["version"]
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert citation["version"] == mtp_jax.__version__
  assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_hosted_and_local_checks_call_our_own():
  workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
  assert {"run": ".ci/run"} in workflow["jobs"]["ci"]["steps"]
  hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
  assert [x["entry"] for x in hooks["repos"][0]["hooks"]] == ["make lint"]
