"""A hub on this machine with one data set in it, which Hugging Face's own clients talk to."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import datasets
import huggingface_hub
import pytest

NAME = "someone/images"


class Hub(ThreadingHTTPServer):
    """`files` are those of the data set, by name; `asked` the ranges that were asked for, each (name, bytes)."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files, self.commit, self.asked = files, "a" * 40, []


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        path, files = unquote(urlsplit(self.path).path), self.server.files
        if re.fullmatch(rf"/api/datasets/{NAME}(/revision/.+)?", path):
            self._send(200, json.dumps({"id": NAME, "sha": self.server.commit, "siblings": [], "tags": []}).encode())
        elif re.fullmatch(rf"/api/datasets/{NAME}/tree/{self.server.commit}", path):  # without folders
            found = [{"type": "file", "path": n, "size": len(data), "oid": "b" * 40} for n, data in files.items()]
            self._send(200, json.dumps(found).encode())
        elif (file := re.fullmatch(rf"/datasets/{NAME}/resolve/[^/]+/(.+)", path)) and file[1] in files:
            first, last = 0, len(files[file[1]]) - 1
            if span := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", "")):
                first, last = int(span[1]), min(int(span[2]), last)
                self.server.asked.append((file[1], range(first, last + 1)))
            self._send(206 if span else 200, files[file[1]][first : last + 1])
        else:
            self._send(404)

    do_HEAD = do_GET

    def _send(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"ETag": '"b"', "X-Repo-Commit": self.server.commit, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
    """Inside `with`, that hub is the one that every client asks."""
    hub = Hub(files)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
        huggingface_hub.HfFileSystem.clear_instance_cache()
        try:
            yield hub
        finally:
            huggingface_hub.HfFileSystem.clear_instance_cache()
            hub.shutdown()
            hub.server_close()
            thread.join()
