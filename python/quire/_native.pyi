"""The native core. Private: import the public names from ``quire`` instead.

Every call that may take long releases the GIL. Every class is thread-safe.
Failures are the exceptions of ``quire.errors``; kernel failures are ``OSError``.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self, final

from typing_extensions import Buffer

PAGE_SIZE: int
MAX_LAYERS: int

@final
class Snapshot:
    """An immutable version: layers (descriptors) and a page table."""

    @staticmethod
    def from_fds(fds: Sequence[int]) -> Snapshot:
        """Verify descriptors received from a peer; the first is the top layer.

        Takes ownership of every descriptor in ``fds``, also when it raises.
        Raises NotImmutable, Malformed.
        """
    @staticmethod
    def load(path: str | bytes, copy: bool, check: bool) -> Snapshot: ...
    @property
    def size(self) -> int: ...
    @property
    def layer_count(self) -> int: ...
    def layer_fds(self) -> list[int]:
        """Borrowed descriptors, top layer first; valid while this snapshot is open."""
    def layer_ids(self) -> list[bytes]:
        """16-byte identities, in the order of ``layer_fds``."""
    def layer_keys(self) -> list[tuple[int, int]]:
        """(st_dev, st_ino) of each layer, in the order of ``layer_fds``."""
    def verify(self) -> None: ...
    def diff(self, other: Snapshot) -> bytes:
        """Native-endian u64 pairs (start, stop) in bytes, ascending, merged, page aligned."""
    def save(self, path: str | bytes) -> None: ...
    @property
    def stats(self) -> tuple[int, int, int, int]:
        """(pages_scanned, pages_copied, nodes_written, duration_ns) of its making."""
    def check_invariants(self) -> int:
        """Walk the page table, raise Malformed if any invariant fails; return the pages that hold data."""
    def memory(self) -> list[tuple[int, int]]:
        """(allocated_bytes, live_bytes) of each layer, in the order of ``layer_fds``."""
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...

class Segment:
    """Growable pages with one writer. Subclassable; exports a writable buffer."""

    def __new__(cls, size_bytes: int, *, start: Snapshot | None = None) -> Self:
        """Zero-filled, or starting as ``start`` (whose size must equal ``size_bytes``)."""
    @property
    def size(self) -> int: ...
    @property
    def address(self) -> int: ...
    def snapshot_native(self) -> Snapshot: ...
    def sever_native(self) -> Snapshot: ...
    def grow(self, size_bytes: int) -> None: ...
    def write_at(self, offset: int, data: Buffer) -> None:
        """Copy ``data`` in; a full memory raises instead of SIGBUS. Bounds checked."""
    def check_invariants(self) -> None: ...
    def memory(self) -> dict[str, int]:
        """Bytes: ``private`` (copies of pages in this process), ``duplicate`` (those also in a layer),
        ``layers`` (allocated in the layers of the last version), ``live`` (content of the last version)."""
    def close(self) -> None:
        """Raises BufferError while views are exported."""
    @property
    def closed(self) -> bool: ...
    @property
    def forked(self) -> bool:
        """True in a child process that inherited this segment through fork."""
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Mapping:
    """A view of a snapshot at a fixed address. Subclassable; exports a buffer."""

    def __new__(cls, snapshot: Snapshot, *, private: bool = False) -> Self: ...
    @property
    def size(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def private(self) -> bool: ...
    @property
    def vma_budget(self) -> int: ...
    @property
    def copied_pages(self) -> int:
        """Pages copied in because the VMA budget was spent."""
    def advance_native(self, snapshot: Snapshot) -> None: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class LiveSegment:
    """Shared live pages. The buffer it exports is the read-only alias. Subclassable."""

    def __new__(cls, size_bytes: int, *, backend: Literal["memfd", "sysv"] = "memfd") -> Self: ...
    @property
    def size(self) -> int: ...
    @property
    def ro_address(self) -> int: ...
    @property
    def rw_address(self) -> int: ...
    @property
    def fd(self) -> int:
        """Borrowed descriptor of the memfd backend; -1 for System V."""
    @property
    def shmid(self) -> int:
        """System V id; -1 for the memfd backend."""
    def snapshot_native(self) -> Snapshot: ...
    def writable(self) -> WritableAlias:
        """The writable alias; ForkedError in a forked child."""
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def forked(self) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class WritableAlias:
    """The read-write view of a LiveSegment. Exports a writable buffer until released. Subclassable."""

    def __new__(cls, segment: LiveSegment) -> Self:
        """The same as ``segment.writable()``, for subclasses."""
    @property
    def size(self) -> int: ...
    @property
    def address(self) -> int: ...
    def release(self) -> None:
        """Raises BufferError while views of it are exported; afterwards no new view can be made."""
    def __buffer__(self, flags: int, /) -> memoryview: ...

class MirrorView:
    """A read-only live mapping of another process's LiveSegment. Subclassable."""

    @staticmethod
    def verify_fd(fd: int) -> int:
        """Check that the descriptor's seals make a mirror; return its size in bytes. Raises NotImmutable, Malformed."""
    def __new__(cls, *, fd: int = -1, shmid: int = -1, size_bytes: int = 0) -> Self:
        """Map; the descriptor is borrowed for the call only."""
    @property
    def size(self) -> int: ...
    @property
    def address(self) -> int: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def probe() -> dict[str, Any]:
    """What this kernel and user can do; see quire.commands.doctor for the meaning of each key."""

@final
class Source:
    """What a region shows. Failures of the bytes are PageError."""

    @staticmethod
    def file(fd: int, offset: int = 0, length: int | None = None) -> Source:
        """A range of a file; None means up to its end. The descriptor is duplicated. ValueError if outside."""
    @staticmethod
    def buffer(obj: Buffer) -> Source:
        """The bytes of a contiguous buffer, which is held as long as the source lives."""
    @staticmethod
    def snapshot(snapshot: Snapshot) -> Source: ...
    def part(self, offset: int, length: int) -> Source: ...
    def slice(self, offset: int, length: int) -> Source:
        """A range of raw bytes. This and the codecs need a source that is not decoded already (ValueError)."""
    def deflate(self, size: int, crc: int, cache: str | bytes | None = None) -> Source:
        """Raw deflate data of known length and CRC-32; ``cache`` is a directory for what a first pass finds."""
    def gzip(self, cache: str | bytes | None = None) -> Source:
        """Reads all of it to learn its length, unless the cache knows it. Blocks; Ctrl-C interrupts it."""
    def zstd(self, cache: str | bytes | None = None) -> Source:
        """Reads all of it only if a frame does not say its length and the cache does not know it."""
    def opens_at_once(self, codec: Literal["gzip", "zstd"], cache: str | bytes | None = None) -> bool:
        """Whether that codec would not have to read all of it."""
    @property
    def size(self) -> int: ...
    def unit(self, offset: int) -> tuple[int, int]:
        """The range that is produced together with this byte, half-open; empty if any is as good."""
    def read(self, offset: int, length: int) -> bytes: ...

@final
class FrameEncoder:
    """Makes zstandard frames that can be decoded on their own, in any thread."""

    def __new__(cls, level: int) -> Self:
        """ValueError unless 1 to 22."""
    def frame(self, data: bytes) -> bytes:
        """One frame with length and checksum."""

def digest(data: bytes) -> bytes:
    """The first 16 bytes of the BLAKE3 hash."""

def is_loaded(name: str | bytes) -> bool:
    """Whether the dynamic linker would take an object that it has for this name."""

@final
class Lent:
    """Addresses of a lease: a touch of them that fails is explained on standard error, until this is collected."""

    def __new__(cls, address: int, length: int, base: int, size: int, number: int) -> Self:
        """Enter ``length`` bytes from ``address`` on; byte 0 of the lease, which has ``size``, lies at ``base``.

        Raises OSError, ValueError.
        """
    def close(self) -> None:
        """Say from now on that the lease was given back."""

@final
class Library:
    """A shared object, laid out in memory for the dynamic linker. Not unloaded when it is collected."""

    def __new__(
        cls,
        source: Source,
        name: str,
        window_bytes: int,
        whole: str | None = None,
        crc: int | None = None,
        hide: bool = False,
    ) -> Self:
        """Fill in what the dynamic linker reads, and check it; with a reason for it, all. Blocks without the GIL.

        With `hide` the dynamic linker will not run its constructors, whole or not: for a `Group`.

        Raises Malformed, with the field that is wrong, PageError, OSError.
        """
    @property
    def path(self) -> str: ...
    @property
    def has_resolvers(self) -> bool:
        """Whether it has indirect functions (IFUNC), whose resolvers run while it is linked."""
    def linkage(self) -> tuple[str | None, list[str], str | None, str | None]:
        """What it says of other objects: (soname, needed, rpath, runpath), decoded as paths are."""
    def open(self, mode: int) -> int:
        """Have it linked and construct it, the first time; the handle, which is the library's. OSError if refused."""
    def close(self) -> bool:
        """Give the handle back; whether the object was unloaded."""
    def fill(self) -> None: ...
    def discard(self) -> int: ...
    def share(self) -> tuple[str, int, int, int, int, int, int]:
        """(reason if whole, size, lazy bytes, filled bytes, faults, refills, evictions)."""

@final
class Group:
    """Shared objects that are linked, and unloaded, together. Not unloaded when it is collected."""

    def __new__(
        cls, members: Sequence[Library], needed: Sequence[str], order: Sequence[int], mode: int
    ) -> Self:
        """Have members linked in one step, and construct them in an order: places in `members`.

        `needed` are paths of members and names of others, in the order in which symbols are looked up. Every member
        is paged or was made with `hide`. OSError if refused; nothing is loaded then.
        """
    def close(self) -> bool:
        """Close all members; whether all were unloaded."""

@final
class ElfFile:
    """The tables of an ELF file, each read when it is asked for. Names are decoded as paths are.

    Every method raises Malformed, whose message names the field, and PageError if the source fails.
    """

    def __new__(cls, source: Source, offset: int, size: int) -> Self:
        """A range of a source; ValueError if outside."""
    def header(self) -> tuple[bool, bool, int, int, int, int, int, int, int, int, int, int]:
        """(is_64, is_little_endian, os_abi, abi_version, kind, machine, flags, entry, header_bytes,
        segments_offset, sections_offset, section_count)"""
    def segments(self) -> list[tuple[int, int, int, int, int, int, int, int]]:
        """(kind, flags, offset, address, physical_address, file_size, memory_size, align)"""
    def sections(self) -> list[tuple[str, int, int, int, int, int, int, int, int, int]]:
        """(name, kind, flags, address, offset, size, link, info, align, entry_size)"""
    def interpreter(self) -> str | None: ...
    def dynamic(self) -> list[tuple[int, int, str | None]] | None:
        """(tag, value, name); None without a dynamic segment."""
    def symbols(
        self, dynamic: bool
    ) -> list[tuple[str, int, int, int, int, int, int, str | None, str | None, bool]]:
        """(name, value, size, kind, binding, other, section, version, library, is_hidden)"""
    def relocations(self) -> list[tuple[str, int, int, int, int | None, int | None]]:
        """(table, offset, kind, symbol, addend, section); table is eager, plt, relr or section."""
    def notes(self) -> list[tuple[str, int, bytes]]:
        """(name, kind, description)"""
    def bytes_at(self, address: int, size: int) -> bytes: ...

@final
class PeFile:
    """The tables of a PE file. As ElfFile; addresses are relative to the image base unless it is said."""

    def __new__(cls, source: Source, offset: int, size: int) -> Self: ...
    def header(
        self,
    ) -> tuple[
        tuple[bool, int, int, int, int, int, int], tuple[int, int, int, int, int, int], list[tuple[int, int]]
    ]:
        """(is_64, machine, characteristics, entry, image_base, section_align, file_align),
        (image_size, headers_size, subsystem, dll_characteristics, stack_reserve, stack_commit),
        (address, size) of each data directory"""
    def sections(self) -> list[tuple[str, int, int, int, int, int]]:
        """(name, address, memory_size, offset, file_size, flags)"""
    def imports(self) -> list[tuple[str, str | None, int, int, bool]]:
        """(library, name, number, slot, is_delayed)"""
    def exports(self) -> list[tuple[str | None, int, int, str | None]]:
        """(name, ordinal, address, forward)"""
    def relocations(self) -> list[tuple[int, int]]:
        """(address, type)"""
    def tls(self) -> tuple[int, int, int, int, list[int]] | None:
        """(start, end, index, zero_fill, callbacks), absolute addresses"""

def macho_members(source: Source, size: int) -> list[tuple[int, int, int, int, int]] | None:
    """(cpu_type, cpu_subtype, offset, size, log2 of the alignment) of each program in a universal file.

    None if it is none, such as a Java class, which begins with the same bytes. Raises as ElfFile.
    """

@final
class MachOFile:
    """The tables of a Mach-O file. As ElfFile."""

    def __new__(cls, source: Source, offset: int, size: int) -> Self: ...
    def header(
        self,
    ) -> tuple[
        tuple[bool, bool, int, int, int, int],
        tuple[str | None, list[tuple[str, str]], list[str], str | None],
        int | None,
        bytes | None,
    ]:
        """(is_64, is_little_endian, cpu_type, cpu_subtype, kind, flags), (name, [(library, how)], run_paths,
        linker), offset of the first instruction in the file, uuid"""
    def segments(
        self,
    ) -> list[tuple[str, int, int, int, int, int, int, list[tuple[str, str, int, int, int, int, int]]]]:
        """(name, address, memory_size, offset, file_size, protection, flags,
        [(name, segment, address, size, offset, log2 of the alignment, flags)])"""
    def symbols(self) -> list[tuple[str, int, int, int, int]]:
        """(name, type, section, description, value)"""
    def exports(self) -> list[tuple[str, int, int, tuple[int, str] | None]]:
        """(name, flags, address from the beginning of the image, (library, name there))"""
    def fixups(self) -> list[tuple[str, int, str | None, int, int]]:
        """(kind, address, name, library, addend); kind is rebase, bind, lazy or weak"""

def elf_name(kind: str, machine: int, value: int) -> str | None:
    """The constant of this value whose name begins with ``kind``: EM, ET, PT, SHT, DT, STB, STT or R."""

def remember_touched() -> None: ...
def region_file(size: int) -> int:
    """Make the file of a shared region; the descriptor is the caller's."""

class Region:
    def __new__(
        cls,
        source: Source,
        name: str,
        window_bytes: int,
        discard_mode: str,
        faults: str,
        executable: bool,
        shared_fd: int | None,
        budget_bytes: int | None,
    ) -> Self: ...
    @property
    def size(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def window_bytes(self) -> int: ...
    @property
    def faults(self) -> Literal["thread", "signal", "sigsegv", "eager"]: ...
    @property
    def discard_mode(self) -> Literal["kernel", "pressure", "never"]: ...
    @property
    def serves_system_calls(self) -> bool: ...
    def shared_fileno(self) -> int | None: ...
    def read(self, offset: int, length: int) -> bytes: ...
    def pin_native(self, offset: int, length: int) -> None: ...
    def unpin_native(self, offset: int, length: int) -> None: ...
    def prefetch_native(self, offset: int, length: int, wait: bool) -> None: ...
    def discard_native(self, offset: int, length: int) -> int: ...
    def resident_native(self) -> bytes: ...
    def touched(self) -> list[int]: ...
    def figures(self) -> tuple[int, int, int, int, int, int, list[int]]: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Purgeable:
    """Private memory that the kernel may take while it is unlocked. Subclassable; exports a writable buffer while locked."""

    def __new__(cls, size_bytes: int) -> Self: ...
    @property
    def size(self) -> int: ...
    @property
    def address(self) -> int: ...
    def unlock(self) -> None:
        """Raises BufferError while views are exported."""
    def lock(self) -> bool: ...
    @property
    def is_locked(self) -> bool: ...
    def lost_native(self) -> bytes:
        """Native-endian u64 pairs (start, stop) in bytes, ascending, merged, page aligned."""
    def close(self) -> None:
        """Raises BufferError while views are exported."""
    @property
    def closed(self) -> bool: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class PurgeableStore:
    """Values packed into pages that the kernel may take."""

    def __new__(cls) -> Self: ...
    def put(self, data: Buffer) -> PurgeableEntry:
        """Copy a C-contiguous buffer of bytes in; it is freed when the entry dies."""
    def sweep(self) -> None:
        """Note which values are gone, for ``PurgeableEntry.lost``."""
    def check_invariants(self) -> None: ...
    @property
    def value_bytes(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def resident_bytes(self) -> int: ...
    def count_miss(self) -> None: ...
    def count_purged(self, values: int) -> None: ...
    def count_evicted(self, values: int) -> None: ...
    @property
    def counters(self) -> tuple[int, int, int, int]:
        """(hits, misses, purged, evicted)"""

@final
class PurgeableEntry:
    def __len__(self) -> int: ...
    def read(self) -> bytes | None:
        """A copy of the value, or None if some of it is gone."""
    @property
    def lost(self) -> bool:
        """Whether the last sweep, or a read since, saw that some of it is gone."""

def available_bytes() -> int | None:
    """What can still be allocated, purgeable pages included; None where unknown."""

def program_source(
    argv: list[bytes],
    environment: list[bytes],
    payload: bytes,
    *,
    size: int,
    parallel: int,
    timeout: float,
    fetches: bool,
) -> Source:
    """A source served by a helper program, started without the GIL when it is first read."""

def zygote_source(control: int, *, size: int, parallel: int, timeout: float, fetches: bool) -> Source:
    """A source served by workers that the process at the other end of ``control`` forks; it is duplicated."""

def read_maps(
    fd: int,
) -> tuple[
    list[int],
    list[int],
    list[str],
    tuple[list[int], list[int], list[int], list[int], list[bytes]],
    tuple[list[tuple[str, ...]], list[bytes], list[tuple[tuple[str, bytes], ...]]],
    list[bytes],
]:
    """Read and parse an open ``/proc/PID/maps`` or ``smaps`` from where it stands to its end; ``fd`` is borrowed.

    Blocks without the GIL; handlers of signals run about every megabyte. Columns, with an item for each VMA, and the
    rest:

    (start, end, protection, (offset, major, minor, inode, name as it stands there), (names of figures, the figures as
    native-endian u64 with sizes in bytes, lines that are no figures as pairs of name and value), lines that were not
    understood)
    """

def spawn_calls(first: int) -> int:
    """Fork a child that makes the system calls of a list of records and nothing else; its pid."""

def calls_code_address() -> int:
    """Where the code is that such a child runs, in one page."""
