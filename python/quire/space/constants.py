"""The numbers of the calls, and the flags of a VMA, with the kernel's names and values.

Those that differ between machines are x86-64's and aarch64's, which agree.
"""

from typing import Final

from quire._native import PAGE_SIZE

PAGE_SHIFT: Final = PAGE_SIZE.bit_length() - 1
PAGE_MASK: Final = PAGE_SIZE - 1
ENTRIES: Final = PAGE_SIZE // 8
"""Entries of one node of a page table."""

PROT_NONE: Final = 0
PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4
PROT_ALL: Final = PROT_READ | PROT_WRITE | PROT_EXEC

MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_SHARED_VALIDATE: Final = 0x03
MAP_TYPE: Final = 0x0F
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_GROWSDOWN: Final = 0x0100
MAP_NORESERVE: Final = 0x4000
MAP_FIXED_NOREPLACE: Final = 0x100000
MAP_MODELLED: Final = (
    MAP_TYPE | MAP_FIXED | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_NORESERVE | MAP_FIXED_NOREPLACE
)

MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2
MREMAP_DONTUNMAP: Final = 4

MADV_DONTNEED: Final = 4
MADV_FREE: Final = 8
MADV_DONTFORK: Final = 10
MADV_DOFORK: Final = 11
MADV_WIPEONFORK: Final = 18
MADV_KEEPONFORK: Final = 19
MADV_GUARD_INSTALL: Final = 102
MADV_GUARD_REMOVE: Final = 103

VM_READ: Final = 0x1
VM_WRITE: Final = 0x2
VM_EXEC: Final = 0x4
VM_SHARED: Final = 0x8
VM_MAYREAD: Final = 0x10
VM_MAYWRITE: Final = 0x20
VM_MAYEXEC: Final = 0x40
VM_MAYSHARE: Final = 0x80
VM_GROWSDOWN: Final = 0x100
VM_MAYBE_GUARD: Final = 0x800
VM_DONTCOPY: Final = 0x20000
VM_ACCOUNT: Final = 0x100000
VM_NORESERVE: Final = 0x200000
VM_WIPEONFORK: Final = 0x2000000

VM_STICKY: Final = VM_MAYBE_GUARD
"""Flags that keep no VMAs apart: what they merge into has those of all."""
VM_ACCESS: Final = VM_READ | VM_WRITE | VM_EXEC
VM_MAYACCESS: Final = VM_MAYREAD | VM_MAYWRITE | VM_MAYEXEC

FLAG_NAMES: Final = {
    VM_READ: "read",
    VM_WRITE: "write",
    VM_EXEC: "exec",
    VM_SHARED: "shared",
    VM_MAYREAD: "mayread",
    VM_MAYWRITE: "maywrite",
    VM_MAYEXEC: "mayexec",
    VM_MAYSHARE: "mayshare",
    VM_GROWSDOWN: "growsdown",
    VM_MAYBE_GUARD: "maybeguard",
    VM_DONTCOPY: "dontfork",
    VM_ACCOUNT: "account",
    VM_NORESERVE: "noreserve",
    VM_WIPEONFORK: "wipeonfork",
}


def flag_names(flags: int) -> list[str]:
    """Name the flags of a VMA that are set, in the order of their bits."""
    return [name for bit, name in FLAG_NAMES.items() if flags & bit]


def page_align(length: int) -> int:
    """Round a length in bytes up to whole pages."""
    return (length + PAGE_MASK) & ~PAGE_MASK
