"""The broker: a daemon that lends memory, accounts for it and takes it back; see ``docs/broker.md``.

Nothing of this package is needed by clients except `quire.broker.protocol`.
"""
