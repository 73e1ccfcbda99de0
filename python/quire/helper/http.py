"""Reading ranges of a file on a web server, and noticing when it is another file."""

from __future__ import annotations

import base64
import http.client
import re
import threading
import time
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING

from quire.errors import PageError
from quire.helper.retry import Passing, retrying

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["HTTPReader"]

MAX_REDIRECTS = 5
SHORTEST_WAIT = 0.01
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)")

CHANGED = "the object changed since it was opened"


class HTTPReader:
    """A callable that reads ranges. Safe in several threads, each of which keeps a connection open.

    Opening it asks for the first byte, which tells at once the size, whether the server honours ranges, and
    what identifies this version of the file: an ETag, or the time of its last change. All later reads are
    for this version only.
    """

    def __init__(self, url: str, headers: Mapping[str, str], timeout: float) -> None:
        """Open the file.

        Args:
            url: http or https, with a query if it needs one; a user and password become basic authentication.
            headers: Sent with every request.
            timeout: In seconds, for opening and for each read, repetitions included.
        """
        self.url = url
        self.headers = {"User-Agent": "quire", **headers, "Accept-Encoding": "identity"}
        self.timeout = timeout
        self.etag: str | None = None
        self.modified: str | None = None
        self._connections = threading.local()
        self.size = retrying(self._open, timeout, self.shown)
        self._drop()

    def __getstate__(self) -> dict[str, object]:
        """All but the connections."""
        return {key: value for key, value in vars(self).items() if key != "_connections"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Begin without connections."""
        vars(self).update(state)
        self._connections = threading.local()

    @property
    def shown(self) -> str:
        """The url without what may be secret."""
        parts = urllib.parse.urlsplit(self.url)
        return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    def __call__(self, offset: int, length: int) -> bytes:
        """Fetch ``length`` bytes from ``offset`` on.

        Raises:
            PageError: The file changed, the server answered something else, or could not be reached in time.
        """
        if length == 0:
            return b""
        return retrying(lambda deadline: self._range(offset, length, deadline), self.timeout, self.shown)

    def _open(self, deadline: float) -> int:
        answer = self._get({"Range": "bytes=0-0"}, deadline)
        found = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status == 416 and found and int(found[3]) == 0:
            return 0
        if answer.status == 200:
            # The whole body would follow.
            self._drop()
            if answer.headers.get("Content-Length") == "0":
                return 0
            raise PageError(f"{self.shown}: the server ignores ranges, so nothing can be read by parts")
        self._refuse(answer)
        if found is None:
            raise PageError(f"{self.shown}: the server does not say how long it is")
        self._body(answer, 1)
        etag = answer.headers.get("ETag")
        self.etag, self.modified = etag, answer.headers.get("Last-Modified")
        return int(found[3])

    def _range(self, offset: int, length: int, deadline: float) -> bytes:
        wanted = {"Range": f"bytes={offset}-{offset + length - 1}"}
        # If-Match wants a strong tag; a weak one is compared with the answer's.
        if self.etag is not None and not self.etag.startswith("W/"):
            wanted["If-Match"] = self.etag
        elif self.modified is not None:
            wanted["If-Unmodified-Since"] = self.modified
        answer = self._get(wanted, deadline)
        if answer.status in (412, 416):
            raise PageError(CHANGED)
        if answer.status == 200:
            self._drop()
            raise PageError("the server ignores ranges now")
        self._refuse(answer)
        found = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        same = answer.headers.get("ETag") == self.etag and (
            self.etag is not None or answer.headers.get("Last-Modified") == self.modified
        )
        if not same or (found and int(found[3]) != self.size):
            self._drop()
            raise PageError(CHANGED)
        if not found or (found[1], found[2]) != (str(offset), str(offset + length - 1)):
            self._drop()
            raise PageError("the server sent another range than was asked for")
        return self._body(answer, length)

    def _body(self, answer: http.client.HTTPResponse, length: int) -> bytes:
        try:
            # One more than there should be, so that the end is seen and the connection can be used again.
            body = answer.read(length + 1)
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            raise Passing(_text(error)) from error
        if len(body) != length:
            self._drop()
            raise Passing(f"the connection ended after {len(body)} of {length} bytes")
        return body

    def _refuse(self, answer: http.client.HTTPResponse) -> None:
        """Raise for all that is no partial content."""
        if answer.status == 206:
            return
        self._drop()
        text = f"{self.shown}: the server answered {answer.status} {answer.reason}"
        if answer.status in PASSING:
            raise Passing(f"the server answered {answer.status} {answer.reason}")
        if answer.status in (404, 410):
            raise FileNotFoundError(text)
        if answer.status in (401, 403, 407):
            raise PermissionError(text)
        raise PageError(text)

    def _get(self, headers: dict[str, str], deadline: float) -> http.client.HTTPResponse:
        """Send a request and read the head of the answer."""
        url = self.url
        sent = {**self.headers, **headers}
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._once(url, sent, deadline)
            if answer.status not in (301, 302, 303, 307, 308):
                return answer
            self._drop()
            target = urllib.parse.urljoin(url, answer.headers.get("Location", ""))
            if urllib.parse.urlsplit(target).scheme not in ("http", "https"):
                raise PageError(f"{self.shown}: the server redirects to what is no web address")
            if _origin(target) != _origin(url):
                # What was meant for one server is not told to another.
                sent = {k: v for k, v in sent.items() if k.lower() not in ("authorization", "cookie")}
            url = target
        raise PageError(f"{self.shown}: more than {MAX_REDIRECTS} redirections")

    def _once(self, url: str, headers: dict[str, str], deadline: float) -> http.client.HTTPResponse:
        parts = urllib.parse.urlsplit(url)
        sent = dict(headers)
        if parts.username is not None and "Authorization" not in sent:
            user = urllib.parse.unquote(parts.username)
            password = urllib.parse.unquote(parts.password or "")
            sent["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        try:
            connection, absolute = self._connection(parts, max(deadline - time.monotonic(), SHORTEST_WAIT))
            if absolute:
                target = f"http://{parts.netloc.rpartition('@')[2]}{target}"
            connection.request("GET", target, headers=sent)
            return connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            self._drop()
            raise Passing(_text(error)) from error

    def _connection(
        self, parts: urllib.parse.SplitResult, timeout: float
    ) -> tuple[http.client.HTTPConnection, bool]:
        """The connection of this thread, and whether it is one to a proxy that wants whole urls."""
        host = parts.hostname or ""
        proxy = urllib.request.getproxies().get(parts.scheme)
        if proxy and urllib.request.proxy_bypass(host):
            proxy = None
        secure = parts.scheme == "https"
        key = (parts.scheme, host, parts.port, proxy)
        held = self._connections.__dict__.get("held")
        if held is not None and held[0] == key:
            connection: http.client.HTTPConnection = held[1]
            connection.timeout = timeout
            if connection.sock is not None:
                connection.sock.settimeout(timeout)
            return connection, bool(proxy) and not secure
        self._drop()
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        if proxy:
            via = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            connection = kind(via.hostname or "", via.port, timeout=timeout)
            if secure:
                connection.set_tunnel(host, parts.port)
        else:
            connection = kind(host, parts.port, timeout=timeout)
        self._connections.held = (key, connection)
        return connection, bool(proxy) and not secure

    def _drop(self) -> None:
        """Close the connection of this thread."""
        held = self._connections.__dict__.pop("held", None)
        if held is not None:
            held[1].close()


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
