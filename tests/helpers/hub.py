"""A stand-in for the hub on loopback, which speaks what HfApi speaks."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(BaseHTTPRequestHandler):
    """What HfApi asks to make a data set and to put small files there; the server holds what it was told."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        server.asked.append((self.path, self.headers.get("Authorization")))
        if server.refuses:
            return self.answer({"error": "no right to write"}, 403)
        if self.path == "/api/repos/create":
            server.created = json.loads(body)
            return self.answer({"url": f"{server.url}/datasets/me/rows", "id": "me/rows"})
        if "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{server.url}/datasets/me/rows/commit/1"
            return self.answer({"commitUrl": url, "commitOid": "1", "success": True})
        return self.answer({"errors": [], "warnings": []})  # the card is looked at

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        self.answer({"id": "me/rows", "sha": "0", "private": True, "siblings": []})

    def answer(self, facts, status=200):
        text = json.dumps(facts).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def is_private(created):
    """As huggingface_hub says it since 2.0, or before."""
    return created.get("visibility") == "private" or created.get("private") is True


@contextmanager
def standing_in(monkeypatch):
    """The hub, and how HfApi is told where it is."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.refuses = f"http://127.0.0.1:{server.server_port}", False
    server.asked, server.files, server.created = [], {}, None
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)  # HF_ENDPOINT, read when it is imported
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_standin")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
