"""The part of the Hugging Face hub's protocol by which models are fetched, over a directory."""

import json
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "c" * 40


class HubServer:
    """Within `with`, `url` serves `folder` as the repository `name`; `fetched` lists the files that were asked for."""

    def __init__(self, name, folder):
        self.name, self.folder, self.fetched = name, folder, []

    def __enter__(self):
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                owner.answer(self)

            do_HEAD = do_GET  # noqa: N815 (the library's name)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request):
        path = request.path.partition("?")[0]
        files = {file.name: file for file in self.folder.iterdir()}
        if path.startswith(f"/api/models/{self.name}"):
            tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": n} for n, f in files.items()]
            siblings = [{"rfilename": name} for name in files]
            document = tree if "/tree/" in path else {"id": self.name, "sha": COMMIT, "siblings": siblings}
            return self.send(request, json.dumps(document).encode(), {"content-type": "application/json"})
        name = path.rpartition("/")[2]
        if path.startswith(f"/{self.name}/resolve/") and name in files:
            body = files[name].read_bytes()
            if request.command == "GET":
                self.fetched.append(name)
            return self.send(request, body, {"ETag": f'"{sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT})
        request.send_error(404)

    def send(self, request, body, headers):
        request.send_response(200)
        for key, value in {**headers, "content-length": len(body)}.items():
            request.send_header(key, str(value))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)
