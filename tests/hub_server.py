"""The part of the Hugging Face hub's protocol by which models are fetched, over a directory."""

import json
from hashlib import sha256
from urllib.parse import unquote

from loopback import LoopbackServer


class HubServer(LoopbackServer):
    """Serves `folder` as the repository `name`; `fetched` lists the files that were asked for.

    `branches` has the folder and the commit of any other branch.
    """

    def __init__(self, name, folder):
        self.name, self.folder, self.fetched, self.commit = name, folder, [], "c" * 40
        self.branches = {}

    def handle(self, request):
        path = unquote(request.path.partition("?")[0])
        folder, commit = self._at(path)
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        if path.startswith(f"/api/models/{self.name}"):
            tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": n} for n, f in files.items()]
            siblings = [{"rfilename": name} for name in files]
            document = tree if "/tree/" in path else {"id": self.name, "sha": commit, "siblings": siblings}
            return self.send(request, 200, json.dumps(document).encode(), {"content-type": "application/json"})
        name = path.partition("/resolve/")[2].partition("/")[2]  # of whatever revision
        if path.startswith(f"/{self.name}/resolve/") and name in files:
            body = files[name].read_bytes()
            if request.command == "GET":
                self.fetched.append(name)
            return self.send(request, 200, body, {"ETag": f'"{sha256(body).hexdigest()}"', "X-Repo-Commit": commit})
        request.send_error(404)

    def _at(self, path):
        for branch, (folder, commit) in self.branches.items():
            if f"/revision/{branch}" in path or f"/{commit}" in path:
                return folder, commit
        return self.folder, self.commit
