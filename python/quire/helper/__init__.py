"""The process that runs Python functions and fetches from remote stores on behalf of regions.

`worker` answers requests, `program` is the process that is started, `zygote` the one that is forked where a
function cannot be pickled. ``docs/helper.md`` has the protocol.
"""

__all__: list[str] = []
