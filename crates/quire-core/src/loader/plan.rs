//! What of a shared object the dynamic linker reads or writes while it links, and what can be left until it is touched.
//!
//! The dynamic linker believes what an object says. Here all that it follows while it links is checked first: where tables
//! lie, where relocations point, which symbols and names they use. Section headers are not needed for any of it.

use std::ops::Range;

use object::elf::{self, FileHeader64, ProgramHeader64};
use object::{LittleEndian as LE, ReadRef};

use super::dynamic::Object;
use crate::pages::{PAGE, PageRange};
use crate::{Error, Result};

#[cfg(target_arch = "x86_64")]
pub mod machine {
    pub const NUMBER: u16 = 62;
    pub const NAME: &str = "x86-64";
}
#[cfg(target_arch = "aarch64")]
pub mod machine {
    pub const NUMBER: u16 = 183;
    pub const NAME: &str = "aarch64";
}

/// No shared object has more of them.
const SEGMENTS_MAX: u16 = 1024;
/// No name of a library, version or search path is longer (`PATH_MAX`).
const NAME_MAX_BYTES: usize = 4096;
/// Addresses end below this, so that sums of two of them are numbers.
const SPAN_MAX: u64 = 1 << 46;
/// Section headers are for debuggers only; with more of them than this, debuggers go without.
const SECTIONS_MAX_BYTES: u64 = 1 << 16;

pub fn malformed(field: &str, what: impl std::fmt::Display) -> Error {
    Error::Malformed(format!("{field}: {what}"))
}

/// A `PT_LOAD` segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub address: u64,
    pub offset: u64,
    pub file_bytes: u64,
    pub memory_bytes: u64,
    pub readable: bool,
    pub writable: bool,
    pub executable: bool,
}

impl Segment {
    /// Whether the dynamic linker leaves it as it is in the file.
    #[must_use]
    pub const fn is_lazy(&self) -> bool {
        self.readable && !self.writable && self.memory_bytes == self.file_bytes
    }

    /// The pages of the file that it shows.
    #[must_use]
    pub const fn pages(&self) -> PageRange {
        PageRange::between(self.offset / PAGE, (self.offset + self.file_bytes).div_ceil(PAGE))
    }
}

/// Why an object cannot be left in part until it is touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whole {
    /// The dynamic linker runs its code while it links.
    IndirectFunctions,
    /// The dynamic linker writes to its code.
    TextRelocations,
    /// A debugger or loader marks it as not to be loaded this way, or it has nothing to link.
    NotDynamic,
}

impl Whole {
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::IndirectFunctions => "it has indirect functions (IFUNC), whose resolvers run while it is linked",
            Self::TextRelocations => "it has text relocations",
            Self::NotDynamic => "it has no dynamic section",
        }
    }
}

/// What an object says of other objects: its own name, the names it needs, and where to look for them.
///
/// The strings are those of the file, as bytes: nothing says that they are text.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Linkage {
    pub soname: Option<Vec<u8>>,
    /// In the order of the file, which is the order of loading.
    pub needed: Vec<Vec<u8>>,
    pub rpath: Option<Vec<u8>>,
    pub runpath: Option<Vec<u8>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub segments: Vec<Segment>,
    /// Ranges of the file that must be there while it is linked, sorted, not overlapping.
    pub eager: Vec<Range<u64>>,
    /// What of that nobody reads again afterwards: relocations that are done at once.
    pub spent: Vec<Range<u64>>,
    pub whole: Option<Whole>,
    /// `DT_INIT`, an address in the object.
    pub init: Option<u64>,
    /// `DT_INIT_ARRAY`: addresses in the object, half-open.
    pub init_array: Range<u64>,
    /// Where in the file the tags of dynamic entries stand that would make the dynamic linker run constructors.
    pub constructor_tags: Vec<u64>,
    pub linkage: Linkage,
}

/// The file, with the checks that every read needs.
#[derive(Clone, Copy)]
pub struct Bytes<R> {
    data: R,
    pub len: u64,
}

impl<'d, R: ReadRef<'d>> Bytes<R> {
    fn new(data: R) -> Result<Self> {
        let len = data.len().map_err(|()| malformed("file", "its length cannot be had"))?;
        Ok(Self { data, len })
    }

    pub fn slice<T: object::Pod>(&self, field: &str, offset: u64, count: u64) -> Result<&'d [T]> {
        let fits = count
            .checked_mul(size_of::<T>() as u64)
            .and_then(|bytes| bytes.checked_add(offset))
            .is_some_and(|end| end <= self.len);
        let count = usize::try_from(count).ok().filter(|_| fits).ok_or_else(|| {
            malformed(
                field,
                format_args!("{count} entries at {offset:#x} are not within the file's {} bytes", self.len),
            )
        })?;
        let read = self.data.read_slice_at(offset, count);
        read.map_err(|()| malformed(field, format_args!("cannot be read at {offset:#x}")))
    }

    /// The name that begins where a range does, and ends within it.
    pub fn name(&self, field: &str, range: Range<u64>) -> Result<&'d [u8]> {
        let start = range.start;
        let name = self.data.read_bytes_at_until(range, 0).ok().filter(|name| name.len() < NAME_MAX_BYTES);
        name.ok_or_else(|| malformed(field, format_args!("the name at {start:#x} is longer than any")))
    }
}

impl Plan {
    /// Read and check an object. `data` is read in parts; only what is eager is read.
    ///
    /// # Errors
    /// Malformed, with the field that is wrong: it is no shared object for this machine, or the dynamic linker would read
    /// or write outside of it.
    pub fn read<'d>(data: impl ReadRef<'d>) -> Result<Self> {
        let file = Bytes::new(data)?;
        let headers = program_headers(&file)?;
        let segments = load_segments(headers, file.len)?;
        let mut plan = Object::new(file, segments).read(headers)?;
        plan.eager.push(0..PAGE.min(file.len));
        plan.eager.extend(sections(&file));
        plan.eager = merged(plan.eager);
        Ok(plan)
    }
}

fn program_headers<'d, R: ReadRef<'d>>(file: &Bytes<R>) -> Result<&'d [ProgramHeader64<LE>]> {
    if file.len < size_of::<FileHeader64<LE>>() as u64 {
        return Err(malformed("e_ident", format_args!("{} bytes are not those of an ELF file", file.len)));
    }
    let ident = file.slice::<u8>("e_ident", 0, 16)?;
    if ident[..4] != elf::ELFMAG {
        return Err(malformed("e_ident", "the first bytes are not those of an ELF file"));
    }
    if ident[4] != 2 {
        return Err(malformed("EI_CLASS", format_args!("{}: not a 64-bit object, which this process needs", ident[4])));
    }
    if ident[5] != 1 {
        return Err(malformed("EI_DATA", format_args!("{}: not little-endian, which this process needs", ident[5])));
    }
    let header = &file.slice::<FileHeader64<LE>>("ELF header", 0, 1)?[0];
    let machine = header.e_machine.get(LE).0;
    if machine != machine::NUMBER {
        return Err(malformed(
            "e_machine",
            format_args!("{machine}: not for this machine, which is {} ({})", machine::NAME, machine::NUMBER),
        ));
    }
    if header.e_type.get(LE) != elf::ET_DYN {
        return Err(malformed("e_type", format_args!("{}: no shared object", header.e_type.get(LE).0)));
    }
    let count = header.e_phnum.get(LE);
    if usize::from(header.e_phentsize.get(LE)) != size_of::<ProgramHeader64<LE>>() || count == 0 || count > SEGMENTS_MAX
    {
        return Err(malformed(
            "e_phnum",
            format_args!("{count} program headers of {} bytes", header.e_phentsize.get(LE)),
        ));
    }
    file.slice("e_phoff", header.e_phoff.get(LE), u64::from(count))
}

fn load_segments(headers: &[ProgramHeader64<LE>], file_len: u64) -> Result<Vec<Segment>> {
    let mut segments: Vec<Segment> = Vec::new();
    for header in headers.iter().filter(|header| header.p_type.get(LE) == elf::PT_LOAD) {
        let name = format!("PT_LOAD {}", segments.len());
        let segment = Segment {
            address: header.p_vaddr.get(LE),
            offset: header.p_offset.get(LE),
            file_bytes: header.p_filesz.get(LE),
            memory_bytes: header.p_memsz.get(LE),
            readable: header.p_flags.get(LE).contains(elf::PF_R),
            writable: header.p_flags.get(LE).contains(elf::PF_W),
            executable: header.p_flags.get(LE).contains(elf::PF_X),
        };
        if segment.offset.checked_add(segment.file_bytes).is_none_or(|end| end > file_len) {
            return Err(malformed(
                &name,
                format_args!(
                    "{:#x} bytes at {:#x} are not within the file's {file_len} bytes",
                    segment.file_bytes, segment.offset
                ),
            ));
        }
        if segment.memory_bytes < segment.file_bytes {
            return Err(malformed(&name, "p_memsz is less than p_filesz"));
        }
        if segment.address > SPAN_MAX || segment.memory_bytes > SPAN_MAX - segment.address {
            return Err(malformed(&name, "p_vaddr and p_memsz reach beyond the address space"));
        }
        if segment.address % PAGE != segment.offset % PAGE {
            return Err(malformed(&name, "p_vaddr and p_offset differ within a page"));
        }
        if let Some(before) = segments.last()
            && segment.address / PAGE < (before.address + before.memory_bytes).div_ceil(PAGE)
        {
            return Err(malformed(&name, "overlaps the segment before it, or is not in order of addresses"));
        }
        segments.push(segment);
    }
    if segments.is_empty() {
        return Err(malformed("program headers", "there is no PT_LOAD"));
    }
    Ok(segments)
}

/// Section headers and their names, which debuggers read. What is wrong with them is theirs to find out.
fn sections<'d, R: ReadRef<'d>>(file: &Bytes<R>) -> Vec<Range<u64>> {
    let Ok([header]) = file.slice::<FileHeader64<LE>>("ELF header", 0, 1) else { return Vec::new() };
    let (start, size) = (header.e_shoff.get(LE), u64::from(header.e_shentsize.get(LE)));
    let bytes = size * u64::from(header.e_shnum.get(LE));
    if bytes == 0 || bytes > SECTIONS_MAX_BYTES || start.checked_add(bytes).is_none_or(|end| end > file.len) {
        return Vec::new();
    }
    let mut found: Vec<Range<u64>> = std::iter::once(start..start + bytes).collect();
    let names = start + size * u64::from(header.e_shstrndx.get(LE).0);
    if let Ok([section]) = file.slice::<elf::SectionHeader64<LE>>("e_shstrndx", names, 1) {
        let (at, len) = (section.sh_offset.get(LE), section.sh_size.get(LE));
        if len <= SECTIONS_MAX_BYTES && at.checked_add(len).is_some_and(|end| end <= file.len) {
            found.push(at..at + len);
        }
    }
    found
}

fn merged(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| range.start < range.end);
    ranges.sort_unstable_by_key(|range| range.start);
    let mut out: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match out.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => out.push(range),
        }
    }
    out
}
