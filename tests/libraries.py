"""Shared objects that the tests compile: large enough that most of them is left until it is touched."""

import pathlib
import subprocess
import zipfile

import quire

TABLE_BYTES = 4 << 20
CODE_BYTES = 2 << 20

# Code and constants of which every page tells where it is, between functions that can be called.
LARGE = f"""
extern const unsigned char table[];
__asm__(".section .rodata\\n.globl table\\n.balign 4096\\ntable:\\n"
        ".set page, 0\\n.rept {TABLE_BYTES // 4096}\\n.long page + 1\\n.fill 4092, 1, 0x5a\\n"
        ".set page, page + 1\\n.endr\\n.previous");
__asm__(".text\\n.globl sled\\n.type sled, @function\\n.balign 4096\\nsled:\\n"
        ".fill {CODE_BYTES}, 1, 0x90\\nret\\n.size sled, . - sled");
void sled(void);
const void *table_address(void) {{ return table; }}
int page_of(long page) {{ return *(const int *)(table + 4096 * page); }}
int walk(void) {{ sled(); return 7; }}
"""


def refusal() -> str:
    """Why nothing can be left until it is touched here; empty if it can."""
    try:
        with quire.Region(bytes(4096), faults="thread", shared=True) as region:
            return "" if region.serves_system_calls else "userfaultfd is for user-mode faults only"
    except quire.Unsupported as error:
        return str(error)


def compiled(folder: pathlib.Path, name: str, source: str, *flags: str, language: str = "c") -> pathlib.Path:
    """Compile a source to a shared object in a folder, where others are found to link with."""
    compiler = {"c": "cc", "c++": "c++"}[language]
    code = folder / f"{name}.{language}"
    code.write_text(source, "ascii")
    # Unique symbols, of which C++ makes some, would keep a library from being unloaded.
    flags = ("-fno-gnu-unique", *flags) if language == "c++" else flags
    command = [compiler, "-shared", "-fPIC", "-O1", "-x", language, code, "-x", "none", "-o", folder / name]
    subprocess.run([*command, f"-L{folder}", *flags], check=True, capture_output=True, text=True)
    return folder / name


def zipped(archive: pathlib.Path, *files: pathlib.Path, method: int = zipfile.ZIP_DEFLATED) -> pathlib.Path:
    """Put files into an archive, by their names."""
    with zipfile.ZipFile(archive, "w", method) as out:
        for file in files:
            out.write(file, file.name)
    return archive
