"""A Hugging Face Hub on this machine: what huggingface_hub asks for, over HTTP."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

TOKEN = "hf_of_a_test"


class FakeHub:
  """Serves folders as repositories, and takes new ones; a context manager.

  repositories: of every name, its files by path. private: which were created private.
  """

  def __init__(self):
    self.repositories: dict[str, dict[str, bytes]] = {}
    self.private: set[str] = set()
    self.requests: list[str] = []
    self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
    self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

  def __enter__(self) -> "FakeHub":
    serve = self._server.serve_forever
    threading.Thread(target=serve, args=[0.02], daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._server.shutdown()
    self._server.server_close()

  def add(self, name: str, folder: Path) -> None:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    self.repositories[name] = {
      str(path.relative_to(folder)): path.read_bytes() for path in files
    }

  def _handler(hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def log_message(self, *_: object) -> None:
        pass

      def do_HEAD(self) -> None:
        self.do_GET()

      def do_GET(self) -> None:
        path = urlparse(self.path).path
        hub.requests.append(path)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?", path):
          name, what, revision = match.groups()
          if files := self._files(name, revision or "main"):
            sha = _sha(files)
            info = {"id": name, "modelId": name, "sha": sha, "private": False}
            info["siblings"] = [{"rfilename": file} for file in files]
            tree = [
              {"type": "file", "path": file, "size": len(data), "oid": _sha(data)}
              for file, data in files.items()
            ]
            self._json(tree if what == "tree" else info)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
          name, revision, file = match.groups()
          if files := self._files(name, revision):
            if file in files:
              self._send(200, files[file], {
                "ETag": f'"{_sha(files[file])}"', "X-Repo-Commit": _sha(files)
              })
            else:
              self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
          self._send(404, b"")

      def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlparse(self.path).path
        hub.requests.append(path)
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
          self._send(401, b"{}")
        elif path == "/api/repos/create":
          asked = json.loads(body)
          name = f"{asked['organization']}/{asked['name']}"
          address = {"url": f"{hub.endpoint}/{name}", "name": name}
          if name in hub.repositories:
            self._json(address, 409)
            return
          hub.repositories[name] = {}
          if asked.get("private") or asked.get("visibility") == "private":
            hub.private.add(name)
          self._json(address)
        elif path == "/api/validate-yaml":
          self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
          files = [x["path"] for x in json.loads(body)["files"]]
          answer = {"uploadMode": "regular", "shouldIgnore": False}
          self._json({"files": [{"path": file} | answer for file in files]})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
          for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
              content = base64.b64decode(line["value"]["content"])
              hub.repositories[match[1]][line["value"]["path"]] = content
          sha = _sha(hub.repositories[match[1]])
          address = f"{hub.endpoint}/{match[1]}/commit/{sha}"
          self._json({"success": True, "commitOid": sha, "commitUrl": address})
        else:
          self._send(404, b"")

      def _files(self, name: str, revision: str) -> dict[str, bytes] | None:
        """Returns the files of a repository; answers by itself where there is none."""
        if (files := hub.repositories.get(name)) is None:
          self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", _sha(files)):
          self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
          return files
        return None

      def _json(self, value: object, code: int = 200) -> None:
        header = {"Content-Type": "application/json"}
        self._send(code, json.dumps(value).encode(), header)

      def _send(
        self, code: int, body: bytes, headers: dict[str, str] | None = None
      ) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": len(body), **(headers or {})}.items():
          self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
          self.wfile.write(body)

    return Handler


def _sha(content: bytes | dict[str, bytes]) -> str:
  """Returns 40 hex digits, as a commit or a blob has."""
  data = content if isinstance(content, bytes) else repr(sorted(content.items()))
  return hashlib.sha1(data if isinstance(data, bytes) else data.encode()).hexdigest()
