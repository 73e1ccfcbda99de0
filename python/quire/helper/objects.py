"""Reading ranges of an object in an object store, and noticing when it is another object."""

from __future__ import annotations

import datetime as dt
import urllib.parse
from typing import Any

from quire.errors import PageError

__all__ = ["ObjectReader"]


class ObjectReader:
    """A callable that reads ranges through obstore, which repeats what failed for a reason that passes."""

    def __init__(self, url: str, options: dict[str, Any], timeout: float) -> None:
        """Open the object.

        Args:
            url: ``s3://bucket/key``, ``gs://``, ``az://``, ``file:///path``.
            options: For ``obstore.store.from_url``; what is not there is taken from the environment.
            timeout: In seconds, for opening and for each read, repetitions included.
        """
        import obstore  # noqa: PLC0415 - an extra

        parts = urllib.parse.urlsplit(url)
        self.url, self.timeout = url, timeout
        self.options = options
        self.root = f"{parts.scheme}://{parts.netloc}/"
        self.key = urllib.parse.unquote(parts.path).lstrip("/")
        self._store: Any = None
        meta = obstore.head(self._opened(), self.key)
        self.size: int = meta["size"]
        self.etag: str | None = meta["e_tag"]
        self.modified = meta["last_modified"]

    def __getstate__(self) -> dict[str, object]:
        """All but the store."""
        return vars(self) | {"_store": None}

    def _opened(self) -> Any:
        if self._store is None:
            from obstore.store import from_url  # noqa: PLC0415 - an extra

            # Less than the reader's patience, so that it hears the reason.
            patience = dt.timedelta(seconds=0.9 * self.timeout)
            options = {"retry_config": {"max_retries": 1000, "retry_timeout": patience}} | self.options
            if self.root == "file:///":
                options.pop("retry_config")
            self._store = from_url(self.root, **options)
        return self._store

    def __call__(self, offset: int, length: int) -> Any:
        """Fetch ``length`` bytes from ``offset`` on.

        Raises:
            PageError: The object changed.
        """
        import obstore  # noqa: PLC0415 - an extra
        from obstore.exceptions import PreconditionError  # noqa: PLC0415 - an extra

        if length == 0:
            return b""
        wanted: dict[str, Any] = {"range": (offset, offset + length)}
        if self.etag is not None:
            wanted["if_match"] = self.etag
        else:
            wanted["if_unmodified_since"] = self.modified
        try:
            answer = obstore.get(self._opened(), self.key, options=wanted)  # type: ignore[arg-type]
        except PreconditionError as error:
            raise PageError("the object changed since it was opened") from error
        meta = answer.meta
        if meta["e_tag"] != self.etag or meta["size"] != self.size:
            raise PageError("the object changed since it was opened")
        return answer.bytes()
