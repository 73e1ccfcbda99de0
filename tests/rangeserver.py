"""A web server for one file, with the faults that a test asks for."""

import contextlib
import http.server
import threading
from collections.abc import Iterator
from typing import Any


class File:
    """What is served, and how badly. Attributes may be changed while it is served."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.etag: str | None = '"one"'
        self.honours_ranges = True
        self.honours_conditions = True
        self.cut_after: int | None = None
        """Close the connection after so many bytes of the next body."""
        self.busy = 0
        """Answer 503 so often."""
        self.stuck: threading.Event | None = None
        """Answer nothing until it is set."""
        self.requests: list[dict[str, str]] = []


@contextlib.contextmanager
def serving(file: File) -> Iterator[str]:
    """Serve a file; the url of it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if file.etag is not None:
                self.send_header("ETag", file.etag)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if file.cut_after is not None:
                body, file.cut_after = body[: file.cut_after], None
                self.close_connection = True
            self.wfile.write(body)

        def do_GET(self) -> None:
            file.requests.append(dict(self.headers))
            if file.stuck is not None:
                file.stuck.wait(60)
            if self.path.startswith("/moved"):
                self.answer(302, Location="/file?x=1")
                return
            if not self.path.startswith("/file"):
                self.answer(404)
                return
            if file.busy:
                file.busy -= 1
                self.answer(503)
                return
            wanted = self.headers.get("Range", "")
            size = len(file.content)
            if not file.honours_ranges or not wanted:
                self.answer(200, file.content)
                return
            condition = self.headers.get("If-Match")
            if file.honours_conditions and condition not in (None, file.etag):
                self.answer(412)
                return
            first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
            if first >= size:
                self.answer(416, Content_Range=f"bytes */{size}")
                return
            last = min(last, size - 1)
            body = file.content[first : last + 1]
            self.answer(206, body, Content_Range=f"bytes {first}-{last}/{size}")

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/file"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
