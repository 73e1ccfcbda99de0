"""What a test may not leave behind."""

import contextlib
import gc
import os
from collections.abc import Iterator


def kept(what: str) -> bool:
    """Whether a descriptor is one that the library opens once, when it is first needed, and keeps."""
    return what == "anon_inode:[userfaultfd]" or what.endswith("/pagemap")


def descriptors() -> dict[int, str]:
    """Open descriptors of this process, by number, with what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        # The descriptor of the listing itself is closed by now.
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


@contextlib.contextmanager
def no_new_descriptors(*, collect: bool = True) -> Iterator[None]:
    """The block may not leave a descriptor open that was not.

    Without ``collect`` not even until the garbage collector runs, which takes a while.
    """
    if collect:
        gc.collect()
    before = descriptors()
    yield
    if collect:
        gc.collect()
    after = descriptors()
    new = {fd: what for fd, what in after.items() if before.get(fd) != what and not kept(what)}
    assert not new, f"descriptors left open: {new}"
