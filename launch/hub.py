"""Model folders of the Hugging Face Hub: `hf://ORG/NAME[@REVISION]`, down and up.

The package huggingface_hub (extra `hub`) is imported where it is needed. Its own
settings count: HF_ENDPOINT, HF_HOME, HF_TOKEN.
"""

import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_jax.config import ConfigError
from mtp_jax.data.errors import require

_NAME = r"[\w.-]+/[\w.-]+"
_ADDRESS = re.compile(rf"hf://({_NAME})(?:@(\S+))?")
# What an import reads: weights, configs and chat templates of the folder itself.
_FILES = ("*.safetensors", "*.json", "*.jinja")


class HubError(Exception):
  """The Hub did not answer, or refused; the message has the reason."""


def local_folder(flag: str, value: str) -> Path:
  """Returns the folder that a flag names; one of the Hub is downloaded.

  Raises:
    ConfigError: no address of the Hub, or no such repository or revision.
    DataError: huggingface_hub is not installed.
    HubError: the download failed.
  """
  if not value.startswith("hf:"):
    return Path(value)
  address = _ADDRESS.fullmatch(value)
  if not address:
    raise ConfigError(
      f"--{flag} must be hf://ORG/NAME or hf://ORG/NAME@REVISION, got {value!r}."
    )
  name, revision = address.groups()
  library = require("huggingface_hub", f"--{flag}={value}")
  with _explained(f"--{flag}={value}"):
    return Path(library.snapshot_download(
      name, revision=revision, allow_patterns=_FILES, ignore_patterns="*/*"
    ))


def check_push(name: str) -> None:
  """Checks, without the network, that a folder can be pushed.

  Raises:
    ConfigError: no name of a repository, or no token.
    DataError: huggingface_hub is not installed.
  """
  if not re.fullmatch(_NAME, name):
    raise ConfigError(f"--push must be ORG/NAME, got {name!r}.")
  if require("huggingface_hub", "--push").get_token() is None:
    raise ConfigError(
      "--push needs a token of the Hub with write access: set HF_TOKEN, or run "
      "`hf auth login`."
    )


def create_repository(name: str) -> None:
  """Creates a private repository; an existing repository stays as it is.

  Raises:
    ConfigError: the token may not write there.
    HubError: no answer.
  """
  with _explained(f"--push={name}"):
    _api().create_repo(name, private=True, exist_ok=True)


def upload(folder: Path, name: str) -> str:
  """Uploads a folder as one commit; returns the address of the repository.

  Raises:
    ConfigError: the token may not write there.
    HubError: the upload failed; the message has the command that tries again.
  """
  again = f"; the folder is whole: hf upload {name} {folder}"
  with _explained(f"--push={name}", again):
    commit = _api().upload_folder(
      repo_id=name, folder_path=folder, commit_message="Export of mtp_jax"
    )
  return str(commit.repo_url)


def _api() -> Any:
  return require("huggingface_hub", "--push").HfApi()


@contextlib.contextmanager
def _explained(what: str, then: str = "") -> Iterator[None]:
  """Turns the library's errors into ours; `then` ends the message of a HubError."""
  errors = importlib.import_module("huggingface_hub.errors")
  try:
    yield
  except errors.GatedRepoError as error:
    raise ConfigError(
      f"{what}: the repository is gated: accept its terms on its page, then set "
      "HF_TOKEN, or run `hf auth login`."
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise ConfigError(
      f"{what}: the Hub has no such repository, or it is private: set HF_TOKEN, or run "
      "`hf auth login`."
    ) from error
  except errors.RevisionNotFoundError as error:
    raise ConfigError(f"{what}: the repository has no such revision.") from error
  except errors.HFValidationError as error:
    raise ConfigError(f"{what}: {error}") from error
  except (errors.HTTPError, OSError) as error:
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = str(error).strip().partition("\n")[0]
    if status in (401, 403):
      raise ConfigError(f"{what}: the token has no access ({reason}).") from error
    raise HubError(f"{what}: the Hub did not answer ({reason}){then}") from error
