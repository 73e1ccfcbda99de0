"""The broker: a daemon that lends memory, accounts for it and takes it back; see ``docs/broker.md``.

`quire.client` and `quire.aio` connect to one. Raises Unsupported when imported without msgspec.
"""

from __future__ import annotations

from importlib.util import find_spec

from quire.errors import Unsupported

if find_spec("msgspec") is None:
    raise Unsupported("the broker and its clients need msgspec: install quire[broker]")
