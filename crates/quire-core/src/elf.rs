//! What a shared object says of other shared objects: its own name, the names it needs, and where to look for them.
//!
//! Only program headers and the dynamic section are read, as the dynamic linker does; section headers may be absent.

use std::fs::File;
use std::os::fd::BorrowedFd;

use object::elf::{self, FileHeader32, FileHeader64};
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use object::{Endianness, FileKind, ReadCache, ReadRef, StringTable};

use crate::{Error, Result};

/// More libraries than any object needs; a dynamic section that names more was made to waste memory.
const NEEDED_MAX: usize = 4096;
/// A search path longer than this is none (`PATH_MAX` bounds each of its folders).
const STRING_MAX: usize = 4096;

/// The strings are those of the file, as bytes: nothing says that they are text.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Linkage {
    pub soname: Option<Vec<u8>>,
    /// In the order of the file, which is the order of loading.
    pub needed: Vec<Vec<u8>>,
    pub rpath: Option<Vec<u8>>,
    pub runpath: Option<Vec<u8>>,
}

impl Linkage {
    /// Read it from a file, by parts. The file's position moves.
    ///
    /// # Errors
    /// Malformed, and what duplicating the descriptor raises.
    pub fn of_file(fd: BorrowedFd<'_>) -> Result<Self> {
        let own = fd.try_clone_to_owned().map_err(|error| Error::os("dup", error.raw_os_error().unwrap_or(0)))?;
        Self::read(&ReadCache::new(File::from(own)))
    }

    /// Read it from bytes, or from whatever gives them.
    ///
    /// # Errors
    /// Malformed: no ELF file, or one whose headers, dynamic section or names lie outside of it.
    pub fn read<'d>(data: impl ReadRef<'d>) -> Result<Self> {
        match FileKind::parse(data) {
            Ok(FileKind::Elf32) => linkage::<FileHeader32<Endianness>, _>(data),
            Ok(FileKind::Elf64) => linkage::<FileHeader64<Endianness>, _>(data),
            _ => Err(malformed("the first bytes are not those of an ELF file")),
        }
    }
}

fn malformed(what: impl std::fmt::Display) -> Error {
    Error::Malformed(format!("no shared object that can be loaded: {what}"))
}

fn linkage<'d, Elf: FileHeader<Endian = Endianness>, R: ReadRef<'d>>(data: R) -> Result<Linkage> {
    let header = Elf::parse(data).map_err(malformed)?;
    let endian = header.endian().map_err(malformed)?;
    let segments = header.program_headers(endian, data).map_err(malformed)?;
    let mut found = Linkage::default();
    let mut entries = None;
    for segment in segments {
        // The dynamic linker takes the last one.
        entries = segment.dynamic(endian, data).map_err(malformed)?.or(entries);
    }
    let Some(entries) = entries else { return Ok(found) };
    let entries = entries.iter().take_while(|entry| entry.tag(endian) != elf::DT_NULL);

    // Where the names are may be told after them.
    let mut names = Vec::new();
    let (mut table, mut table_bytes) = (None, 0);
    for entry in entries {
        match entry.tag(endian) {
            elf::DT_STRTAB => table = Some(entry.val(endian)),
            elf::DT_STRSZ => table_bytes = entry.val(endian),
            tag @ (elf::DT_SONAME | elf::DT_NEEDED | elf::DT_RPATH | elf::DT_RUNPATH) => {
                if names.len() == NEEDED_MAX {
                    return Err(malformed(format_args!("more than {NEEDED_MAX} names in the dynamic section")));
                }
                names.push((tag, entry.val(endian)));
            }
            _ => {}
        }
    }
    if names.is_empty() {
        return Ok(found);
    }
    let address = table.ok_or_else(|| malformed("the dynamic section has names and no DT_STRTAB"))?;
    let (start, room) = place(segments, endian, address)
        .ok_or_else(|| malformed(format_args!("DT_STRTAB {address:#x} is in no loaded segment")))?;
    if table_bytes > room {
        return Err(malformed(format_args!("DT_STRSZ {table_bytes:#x} is past the end of the segment")));
    }
    let end = start.checked_add(table_bytes).ok_or_else(|| malformed("DT_STRSZ overflows"))?;
    let strings = StringTable::new(data, start, end);
    for (tag, offset) in names {
        let name = u32::try_from(offset)
            .ok()
            .and_then(|offset| strings.get(offset).ok())
            .filter(|name| name.len() < STRING_MAX)
            .ok_or_else(|| malformed(format_args!("the name at {offset:#x} of the string table does not end in it")))?
            .to_vec();
        match tag {
            elf::DT_SONAME => found.soname = Some(name),
            elf::DT_RPATH => found.rpath = Some(name),
            elf::DT_RUNPATH => found.runpath = Some(name),
            _ => found.needed.push(name),
        }
    }
    Ok(found)
}

/// Where in the file an address comes from, and how many bytes from there on are in the file.
fn place<P: ProgramHeader<Endian = Endianness>>(
    segments: &[P],
    endian: Endianness,
    address: u64,
) -> Option<(u64, u64)> {
    segments.iter().filter(|segment| segment.p_type(endian) == elf::PT_LOAD).find_map(|segment| {
        let inside = address.checked_sub(segment.p_vaddr(endian).into())?;
        let room = segment.p_filesz(endian).into().checked_sub(inside).filter(|room| *room > 0)?;
        Some((segment.p_offset(endian).into().checked_add(inside)?, room))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A 64-bit little-endian object: header, two program headers, dynamic section, names.
    fn object(entries: &[(u64, u64)], names: &[u8], strings_at: u64) -> Vec<u8> {
        let dynamic_at = 64 + 2 * 56;
        let names_at = dynamic_at + 16 * entries.len() as u64;
        let total = names_at + names.len() as u64;
        let mut out = b"\x7fELF\x02\x01\x01".to_vec();
        out.resize(16, 0);
        for half in [3u16, 62] {
            out.extend(half.to_le_bytes());
        }
        out.extend(1u32.to_le_bytes());
        for word in [0u64, 64, 0] {
            out.extend(word.to_le_bytes());
        }
        out.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 2, 64, 0, 0] {
            out.extend(half.to_le_bytes());
        }
        let size = 16 * entries.len() as u64;
        for (kind, offset, address, bytes) in [(1u32, 0, 0x1000, total), (2, dynamic_at, 0x1000 + dynamic_at, size)] {
            out.extend(kind.to_le_bytes());
            out.extend(4u32.to_le_bytes());
            for word in [offset, address, address, bytes, bytes, 8] {
                out.extend(u64::to_le_bytes(word));
            }
        }
        for (tag, value) in entries {
            let value = if *tag == 5 { 0x1000 + names_at + strings_at } else { *value };
            out.extend(tag.to_le_bytes());
            out.extend(value.to_le_bytes());
        }
        out.extend(names);
        out
    }

    const NAMES: &[u8] = b"\0libme.so.1\0liba.so\0libb.so\0$ORIGIN/../x.libs\0";
    const ENTRIES: &[(u64, u64)] = &[(1, 12), (14, 1), (29, 28), (1, 20), (5, 0), (10, NAMES.len() as u64), (0, 0)];

    #[test]
    fn names_are_read_through_the_program_headers() {
        let found = Linkage::read(&object(ENTRIES, NAMES, 0)[..]).expect("well-formed");
        assert_eq!(found.soname.as_deref(), Some(&b"libme.so.1"[..]));
        assert_eq!(found.needed, [b"liba.so".to_vec(), b"libb.so".to_vec()]);
        assert_eq!(found.runpath.as_deref(), Some(&b"$ORIGIN/../x.libs"[..]));
        assert_eq!(found.rpath, None);
    }

    #[test]
    fn every_cut_and_every_flipped_byte_is_read_or_refused() {
        let good = object(ENTRIES, NAMES, 0);
        for len in 0..good.len() {
            assert!(matches!(Linkage::read(&good[..len]), Err(Error::Malformed(_))), "cut to {len}");
        }
        for at in 0..good.len() {
            for flip in [1u8, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] ^= flip;
                match Linkage::read(&bad[..]) {
                    Ok(found) => assert!(found.needed.len() <= 4),
                    Err(error) => assert!(matches!(error, Error::Malformed(_))),
                }
            }
        }
    }

    #[test]
    fn what_lies_outside_is_refused() {
        for (entries, names, strings_at, text) in [
            (&ENTRIES[..4], NAMES, 0, "no DT_STRTAB"),
            (ENTRIES, NAMES, 1 << 40, "in no loaded segment"),
            (&[(1, 1), (5, 0), (10, u64::MAX), (0, 0)], NAMES, 0, "past the end"),
            (&[(1, 1 << 33), (5, 0), (10, 8), (0, 0)], NAMES, 0, "does not end"),
            (&[(1, 0), (5, 0), (10, 4), (0, 0)], b"abcd", 0, "does not end"),
        ] {
            let error = Linkage::read(&object(entries, names, strings_at)[..]).expect_err(text).to_string();
            assert!(error.contains(text), "{error}");
        }
        let many = vec![(1, 1); NEEDED_MAX + 1];
        assert!(Linkage::read(&object(&many, NAMES, 0)[..]).expect_err("too many").to_string().contains("more than"));
    }
}
