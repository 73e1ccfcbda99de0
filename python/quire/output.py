"""Files that appear complete or not at all."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedRandom

__all__ = ["whole_file"]

_NO_NAMELESS_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}


@contextmanager
def whole_file(
    path: str | os.PathLike[str], *, force: bool = False, mode: int | None = None
) -> Iterator[BufferedRandom]:
    """Write a file that gets its name when the block ends without an exception, synced to disk.

    Until then it has no name, so that nothing is left of it even if the process is killed. File systems that
    have no nameless files get a name that starts with ``.quire-`` beside it, which is removed after an
    exception, but not by a kill.

    Args:
        path: A symbolic link is followed.
        force: Replace a file that is there, in one step.
        mode: Permission bits; None for those that new files get.

    Yields:
        The file, open for reading and writing at any position.

    Raises:
        FileExistsError: There is something of this name, at the beginning or at the end, and no ``force``.
        ValueError: What is there is no regular file, so it cannot be replaced.
        OSError: The file cannot be written; what had the name before is as it was.
    """
    target = os.path.realpath(os.fspath(path))
    directory, name = os.path.split(target)
    _check_free(target, force)
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd, draft = _open_draft(directory, folder)
        try:
            # The buffer must not be flushed by closing it: after a failure it would fail again.
            file = open(fd, "r+b", closefd=False)  # noqa: SIM115 - closed below, in two ways
            try:
                if mode is not None:
                    os.fchmod(fd, mode)
                yield file
                file.flush()
                os.fsync(fd)
            except BaseException:
                # Why is said by the exception that is under way.
                with suppress(OSError):
                    file.close()
                raise
            file.close()
            if draft is None and not force:
                _link(fd, folder, name)
            else:
                if draft is None:
                    unique = _draft_name()
                    _link(fd, folder, unique)
                    draft = unique
                elif not force:
                    # Not every file system without nameless files has links, which would refuse to replace.
                    _check_free(target, force)
                os.replace(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
                draft = None
        finally:
            os.close(fd)
            if draft is not None:
                os.unlink(draft, dir_fd=folder)
        os.fsync(folder)
    finally:
        os.close(folder)


def _check_free(target: str, force: bool) -> None:
    try:
        status = os.lstat(target)
    except FileNotFoundError:
        return
    if not force:
        raise FileExistsError(errno.EEXIST, "it exists; use force to replace it", target)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{target} is no regular file and is not replaced")


def _draft_name() -> str:
    return f".quire-{os.urandom(16).hex()}"


def _open_draft(directory: str, folder: int) -> tuple[int, str | None]:
    """Open a new file; its name in the folder if it has one."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(directory, flags | os.O_TMPFILE, 0o666), None
    except OSError as error:
        if error.errno not in _NO_NAMELESS_FILES:
            raise
    draft = _draft_name()
    return os.open(draft, flags | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder), draft


def _link(fd: int, folder: int, name: str) -> None:
    # With a descriptor of a folder this is linkat with AT_SYMLINK_FOLLOW, not link, which would not follow.
    os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder)
