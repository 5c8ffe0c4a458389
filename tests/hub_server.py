"""The part of the Hugging Face hub's protocol by which models are fetched, over a directory."""

import json
from hashlib import sha256

from loopback import LoopbackServer


class HubServer(LoopbackServer):
    """Serves `folder` as the repository `name`; `fetched` lists the files that were asked for."""

    def __init__(self, name, folder):
        self.name, self.folder, self.fetched, self.commit = name, folder, [], "c" * 40

    def handle(self, request):
        path = request.path.partition("?")[0]
        files = {file.relative_to(self.folder).as_posix(): file for file in self.folder.rglob("*") if file.is_file()}
        if path.startswith(f"/api/models/{self.name}"):
            tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": n} for n, f in files.items()]
            siblings = [{"rfilename": name} for name in files]
            document = tree if "/tree/" in path else {"id": self.name, "sha": self.commit, "siblings": siblings}
            return self.send(request, 200, json.dumps(document).encode(), {"content-type": "application/json"})
        name = path.partition("/resolve/")[2].partition("/")[2]  # of whatever revision
        if path.startswith(f"/{self.name}/resolve/") and name in files:
            body = files[name].read_bytes()
            if request.command == "GET":
                self.fetched.append(name)
            return self.send(
                request, 200, body, {"ETag": f'"{sha256(body).hexdigest()}"', "X-Repo-Commit": self.commit}
            )
        request.send_error(404)
