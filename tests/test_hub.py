"""`hf://ORG/NAME` and `--push`, against a Hub on this machine."""

import os
import subprocess
import sys

import pytest

import mtp_jax
from launch import hub
from mtp_jax import interop
from mtp_jax.config import ConfigError
from mtp_jax.data.errors import DataError
from tests import hf_folders, tiny_runs
from tests.commands import ROOT
from tests.common import random_params
from tests.fake_hub import TOKEN, FakeHub
from tests.quick_xla import xla_flags

constants = pytest.importorskip("huggingface_hub.constants", reason="the extra hub")


@pytest.fixture
def served(monkeypatch, tmp_path):
  """Returns a Hub that the library of this process asks, with an empty cache."""
  with FakeHub() as fake:
    monkeypatch.setattr(constants, "ENDPOINT", fake.endpoint)
    files = fake.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield fake


@pytest.fixture
def model_folder(tmp_path):
  folder = tmp_path / "model"
  folder.mkdir()
  for name, text in {
    "config.json": "{}", "model.safetensors": "weights", "chat_template.jinja": "chat",
    "pytorch_model.bin": "torch", "README.md": "card", "onnx/config.json": "{}",
  }.items():
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
  return folder


def contents(folder):
  files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_folder_of_this_machine_is_itself(served):
  assert str(hub.local_folder("from", "models/gpt2")) == "models/gpt2"
  assert served.requests == []


def test_a_model_is_downloaded_without_what_an_import_does_not_read(
  served, model_folder
):
  served.add("org/model", model_folder)
  folder = hub.local_folder("from", "hf://org/model")
  wanted = ("config.json", "model.safetensors", "chat_template.jinja")
  assert contents(folder) == {
    name: (model_folder / name).read_bytes() for name in sorted(wanted)
  }
  asked = len([x for x in served.requests if "/resolve/" in x])
  assert hub.local_folder("from", f"hf://org/model@{folder.name}") == folder
  assert len([x for x in served.requests if "/resolve/" in x]) == asked


@pytest.mark.parametrize("address, words", [
  ("hf://model", "--from must be hf://ORG/NAME or hf://ORG/NAME@REVISION, got 'hf://m"),
  ("hf:org/model", "--from must be hf://ORG/NAME or"),
  ("hf://org/model@", "--from must be hf://ORG/NAME or"),
  ("hf://org/a--b", "--from=hf://org/a--b: "),
  ("hf://org/other", "--from=hf://org/other: the Hub has no such repository, or it is"),
  ("hf://org/model@v9", "--from=hf://org/model@v9: the repository has no such revisio"),
])
def test_an_address_that_leads_nowhere_is_bad_input(
  served, model_folder, address, words
):
  served.add("org/model", model_folder)
  with pytest.raises(ConfigError) as error:
    hub.local_folder("from", address)
  assert str(error.value).startswith(words)
  assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_is_no_bad_input(served):
  served.__exit__()
  with pytest.raises(hub.HubError, match=r"^--from=hf://org/model: "):
    hub.local_folder("from", "hf://org/model")


@pytest.mark.parametrize("call", [
  lambda: hub.local_folder("from", "hf://org/model"), lambda: hub.check_push("org/new")
])
def test_the_library_is_asked_for_by_name(monkeypatch, call):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(DataError, match="needs the package huggingface_hub, which must"):
    call()


def test_a_push_needs_a_name_and_a_token(served, monkeypatch):
  with pytest.raises(ConfigError, match=r"^--push must be ORG/NAME, got 'name'"):
    hub.check_push("name")
  with pytest.raises(ConfigError, match=r"^--push needs a token of the Hub"):
    hub.check_push("org/new")
  monkeypatch.setenv("HF_TOKEN", "hf_of_another")
  hub.check_push("org/new")
  with pytest.raises(ConfigError, match=r"^--push=org/new: "):
    hub.create_repository("org/new")
  assert served.repositories == {}


def test_the_bytes_that_arrive_are_those_of_the_folder(
  served, model_folder, monkeypatch
):
  monkeypatch.setenv("HF_TOKEN", TOKEN)
  hub.check_push("org/new")
  hub.create_repository("org/new")
  assert hub.upload(model_folder, "org/new") == f"{served.endpoint}/org/new"
  assert served.repositories["org/new"] == contents(model_folder)
  assert served.private == {"org/new"}
  hub.create_repository("org/new")  # It exists: nothing is changed.
  assert served.repositories["org/new"] == contents(model_folder)


@pytest.mark.slow
def test_a_model_comes_from_the_hub_trains_and_goes_back(tmp_path):
  """The commands themselves, in processes that know the Hub from HF_ENDPOINT."""
  config = hf_folders.config_of("qwen2", {"tokenizer.vocab_size": 264})
  params = random_params(config)
  interop.export_params(params, config, tmp_path / "qwen2", "qwen2")
  with FakeHub() as fake:
    fake.add("org/qwen2", tmp_path / "qwen2")

    def run(*arguments):
      return subprocess.run(
        [sys.executable, "-m", "launch", *map(str, arguments)], cwd=ROOT, text=True,
        capture_output=True, env=os.environ | {
          "HF_ENDPOINT": fake.endpoint, "HF_HOME": str(tmp_path / "home"),
          "HF_TOKEN": TOKEN, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(),
        },
      )

    workdir, out = tmp_path / "run", tmp_path / "out"
    texts = tiny_runs.write_texts(tmp_path / "texts")
    done = run(
      "import", "--from=hf://org/qwen2", f"--workdir={workdir}",
      "data.source=files", f"data.path={texts}", "data.seq_len=16",
      "tokenizer.kind=bytes", "eval.max_new_tokens=4",
    )
    assert done.returncode == 0, done.stderr
    assert mtp_jax.load(workdir).step == 0
    done = run(
      "export", workdir, "--layout=qwen2", "--trunk_only", f"--output={out}",
      "--push=org/back",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{fake.endpoint}/org/back"
    assert fake.repositories["org/back"] == contents(out)
    assert contents(out).keys() >= {"config.json", "model.safetensors"}
