"""A server on loopback for scripted endpoints: a subclass says in `handle` what comes back."""

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class LoopbackServer:
    """Within `with`, requests to `root` reach `handle(request)`, several at a time. url: where OpenAI's protocol is."""

    def __enter__(self):
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                owner.handle(self)

            do_GET = do_HEAD = do_POST  # noqa: N815 (the library's names)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.root = f"http://127.0.0.1:{self.server.server_port}"
        self.url = f"{self.root}/v1"
        return self

    def send(self, request, status, body, headers):
        """A whole response: `body` in bytes, and its length beside `headers`."""
        request.send_response(status)
        for key, value in {**headers, "content-length": len(body)}.items():
            request.send_header(key, str(value))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()
