"""An image as plain data, for JSON; and what it asks of the loader for its safety."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from quire.errors import Malformed
from quire.image.elf import ElfImage
from quire.image.layout import layout_of
from quire.image.operations import Protection

if TYPE_CHECKING:
    from quire.image.model import Image

__all__ = ["as_dict", "security"]

# Bits of PE's DllCharacteristics, and of a Mach-O header.
_PE_FACTS = {"high_entropy_aslr": 0x20, "aslr": 0x40, "nx": 0x100, "no_seh": 0x400, "guard_cf": 0x4000}
_MACHO_FACTS = {"pie": 0x20_0000, "executable_stack": 0x2_0000, "no_heap_execution": 0x100_0000}
"""The bits of formats that a loader of Linux does not look at."""


def security(image: Image) -> dict[str, bool | str | None]:
    """List what an image says that makes attacks harder or easier; which facts depends on the format.

    Returns:
        For ELF: ``pie``, ``relro`` (``none``, ``partial``, ``full``: with ``bind_now`` all of the GOT is
        read-only), ``bind_now``, ``nx_stack`` (None: the file does not say), ``text_relocations``,
        ``writable_code``, ``search_path`` (its RPATH or RUNPATH). For others the bits of their headers.

    Raises:
        Malformed: The dynamic section is damaged.
    """
    if isinstance(image, ElfImage):
        stack = image.stack_protection
        now = image.binds_now
        return {
            "pie": image.is_position_independent_executable,
            "relro": "none" if image.relro is None else "full" if now else "partial",
            "bind_now": now,
            "nx_stack": None if stack is None else not stack & Protection.EXEC,
            "text_relocations": image.has_text_relocations,
            "writable_code": _has_writable_code(image),
            "search_path": image.runpath or image.rpath,
        }
    for attribute, facts in (("dll_characteristics", _PE_FACTS), ("flags", _MACHO_FACTS)):
        bits = getattr(image, attribute, None)
        if isinstance(bits, int):
            return {name: bool(bits & bit) for name, bit in facts.items()}
    return {}


def _has_writable_code(image: Image) -> bool:
    both = Protection.WRITE | Protection.EXEC
    return any(each.kind == "LOAD" and each.protection & both == both for each in image.segments)


def as_dict(image: Image, *, tables: bool = False, bias: int = 0) -> dict[str, Any]:
    """Describe an image as plain data. Keys that a format lacks are null or empty.

    Args:
        image: Stays the caller's.
        tables: Symbols, imports, exports, relocations and slots too, which can be long.
        bias: Of the load plan; see `Image.load_plan`.

    Raises:
        Malformed: A part is damaged. That it cannot be loaded is told under ``load_error``.
        PageError: It cannot be read.
    """
    found: dict[str, Any] = {
        "name": image.name,
        "format": image.format,
        "kind": image.kind,
        "machine": image.machine,
        "bits": image.bits,
        "byte_order": image.byte_order,
        "offset": image.offset,
        "size": image.size,
        "entry": image.entry,
        "interpreter": image.interpreter,
        "argument": _argument(image),
        "needed": list(image.needed),
        "soname": getattr(image, "soname", None) or getattr(image, "install_name", None),
        "rpath": getattr(image, "rpath", None),
        "runpath": getattr(image, "runpath", None),
        "build_id": getattr(image, "build_id", None),
        "security": security(image),
        "segments": [_plain(each) for each in image.segments],
        "sections": [_plain(each) for each in image.sections],
        "load_plan": [],
        "load_error": None,
        "layout": [],
        "members": [as_dict(member, tables=tables, bias=bias) for member in image.members],
    }
    try:
        operations = image.load_plan(bias)
    except (Malformed, ValueError) as error:
        found["load_error"] = str(error)
    else:
        found["load_plan"] = [_plain(each) for each in operations]
        found["layout"] = [_plain(each) | {"kind": each.kind} for each in layout_of(image, bias)]
    if tables:
        for name in ("symbols", "imports", "exports", "relocations", "slots"):
            found[name] = [_plain(each) for each in getattr(image, name)()]
    return found


def _argument(image: Image) -> str | None:
    script = getattr(image, "script", None)
    argument = None if script is None else script.argument
    return None if argument is None else argument.decode("utf-8", "backslashreplace")


def _plain(value: Any) -> Any:
    """Make data of dataclasses, named tuples and protections."""
    if isinstance(value, Protection):
        return value.letters
    if dataclasses.is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(each) for name, each in value._asdict().items()}
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value
