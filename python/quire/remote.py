"""Files on web servers and objects in object stores as sources of regions."""

from __future__ import annotations

import pickle
import urllib.parse
from typing import TYPE_CHECKING, Any

from quire.errors import Unsupported
from quire.functions import DEFAULT_TIMEOUT, program_source
from quire.sources import Source

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["HTTPSource", "ObjectSource", "open_remote"]

DEFAULT_PARALLEL = 8


class HTTPSource(Source):
    """A file on a web server, read by ranges.

    Opening it tells the version: its ETag, or where there is none the time of its last change. Every read
    asks for this version and checks that it got it, so bytes of two versions never mix; a server that sends
    neither is believed as long as the size stays. Connection errors, and answers that say "later", are
    repeated with growing pauses until the timeout. Proxies are those of the environment.
    """

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        parallel: int = DEFAULT_PARALLEL,
    ) -> None:
        """Open the file. Blocks until the server answered.

        Args:
            url: http or https. A user and password in it become basic authentication.
            headers: Sent with every request.
            timeout: In seconds, for opening and for each read.
            parallel: Requests in flight, 1 to 64.

        Raises:
            ValueError: The url is of another scheme, or an argument out of range.
            FileNotFoundError: The server has no such file.
            PermissionError: It wants other credentials.
            PageError: It ignores ranges, or cannot be reached in time.
        """
        from quire.helper.http import HTTPReader  # noqa: PLC0415 - loads much

        if urllib.parse.urlsplit(url).scheme.lower() not in ("http", "https"):
            raise ValueError(f"{url}: an HTTPSource reads http and https")
        reader = HTTPReader(url, dict(headers or {}), _checked(timeout))
        native = program_source(
            pickle.dumps(reader), reader.size, timeout=timeout, parallel=parallel, fetches=True
        )
        super().__init__(native, reader.shown)
        self._made_of = url, {"headers": dict(headers or {}), "timeout": timeout, "parallel": parallel}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as url and options; unpickling opens it anew, whatever its version is then."""
        url, options = self._made_of
        return _reopen, (url, options)


class ObjectSource(Source):
    """An object in S3, Google Cloud Storage, Azure, or a file, read by ranges through obstore.

    Its ETag is remembered and every read is for that version, so bytes of two versions never mix.
    Credentials, regions and endpoints come from the environment variables that the store's own tools use.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        parallel: int = DEFAULT_PARALLEL,
        **options: Any,
    ) -> None:
        """Open the object. Blocks until the store answered.

        Args:
            url: ``s3://bucket/key``, ``gs://bucket/key``, ``az://container/key``, ``file:///path``.
            timeout: In seconds, for each read.
            parallel: Requests in flight, 1 to 64.
            **options: For ``obstore.store.from_url``: ``config``, ``client_options``, ``retry_config`` and
                the store's own, such as ``endpoint`` or ``region``. They must pickle.

        Raises:
            Unsupported: obstore is not installed (``quire[remote]``).
            FileNotFoundError: There is no such object.
            obstore.exceptions.BaseError: The store refused, or cannot be reached.
        """
        from quire.helper.objects import ObjectReader  # noqa: PLC0415 - loads much

        try:
            reader = ObjectReader(url, options, _checked(timeout))
        except ModuleNotFoundError as error:
            raise Unsupported(f"{url}: {error}; install quire[remote]") from error
        native = program_source(
            pickle.dumps(reader), reader.size, timeout=timeout, parallel=parallel, fetches=True
        )
        super().__init__(native, url)
        self._made_of = url, {"timeout": timeout, "parallel": parallel, **options}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as url and options; unpickling opens it anew, whatever its version is then."""
        url, options = self._made_of
        return _reopen, (url, options)


def open_remote(url: str, **options: Any) -> Source:
    """Open what a url names: `HTTPSource` for http and https, else `ObjectSource`, which take the options."""
    kind = HTTPSource if urllib.parse.urlsplit(url).scheme.lower() in ("http", "https") else ObjectSource
    return kind(url, **options)


def _reopen(url: str, options: dict[str, Any]) -> Source:
    return open_remote(url, **options)


def _checked(timeout: float) -> float:
    if not timeout > 0:
        raise ValueError(f"timeout is {timeout}, it must be seconds, more than 0")
    return timeout
