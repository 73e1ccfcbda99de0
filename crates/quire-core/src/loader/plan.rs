//! What of a shared object the dynamic linker reads or writes while it links, and what can be left until it is touched.
//!
//! The dynamic linker believes what an object says. Here all that it follows while it links is checked first: where tables
//! lie, where relocations point, which symbols and names they use. Section headers are not needed for any of it.

use std::ops::Range;

use object::elf::{self, Dyn64, FileHeader64, ProgramHeader64, Rela64, Sym64};
use object::{LittleEndian as LE, ReadRef};

use super::versions;
use crate::pages::PAGE;
use crate::{Error, Result};

#[cfg(target_arch = "x86_64")]
mod machine {
    pub const NUMBER: u16 = 62;
    pub const NAME: &str = "x86-64";
    pub const NONE: u32 = 0;
    pub const IRELATIVE: u32 = 37;
}
#[cfg(target_arch = "aarch64")]
mod machine {
    pub const NUMBER: u16 = 183;
    pub const NAME: &str = "aarch64";
    pub const NONE: u32 = 0;
    pub const IRELATIVE: u32 = 1032;
}

/// No shared object has more of them.
const SEGMENTS_MAX: u16 = 1024;
const DYNAMIC_MAX: u64 = 1 << 16;
/// Addresses end below this, so that sums of two of them are numbers.
const SPAN_MAX: u64 = 1 << 46;
/// Section headers are for debuggers only; with more of them than this, debuggers go without.
const SECTIONS_MAX_BYTES: u64 = 1 << 16;

/// The tables of relocations with addends: where, how long, and what messages call them.
const RELOCATIONS: [(elf::DynamicTag, elf::DynamicTag, &str); 2] =
    [(elf::DT_RELA, elf::DT_RELASZ, "DT_RELA"), (elf::DT_JMPREL, elf::DT_PLTRELSZ, "DT_JMPREL")];

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
    pub writable: bool,
    pub executable: bool,
}

impl Segment {
    /// Whether the dynamic linker leaves it as it is in the file.
    #[must_use]
    pub const fn is_lazy(&self) -> bool {
        !self.writable && self.memory_bytes == self.file_bytes
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

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub segments: Vec<Segment>,
    /// Ranges of the file that must be there while it is linked, sorted, not overlapping.
    pub eager: Vec<Range<u64>>,
    pub whole: Option<Whole>,
    /// `DT_INIT`, an address in the object.
    pub init: Option<u64>,
    /// `DT_INIT_ARRAY`: addresses in the object, half-open.
    pub init_array: Range<u64>,
    /// Where in the file the tags of dynamic entries stand that would make the dynamic linker run constructors.
    pub constructor_tags: Vec<u64>,
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
}

/// The values of the dynamic section that count, by name.
#[derive(Default)]
struct Dynamic {
    entries: Vec<(elf::DynamicTag, u64, u64)>,
}

impl Dynamic {
    fn get(&self, tag: elf::DynamicTag) -> Option<u64> {
        self.entries.iter().find(|entry| entry.0 == tag).map(|entry| entry.1)
    }

    fn or_zero(&self, tag: elf::DynamicTag) -> u64 {
        self.get(tag).unwrap_or(0)
    }

    fn places(&self, tags: &[elf::DynamicTag]) -> Vec<u64> {
        self.entries.iter().filter(|entry| tags.contains(&entry.0)).map(|entry| entry.2).collect()
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
        let mut object = Object { file, segments, eager: Vec::new(), whole: None };
        object.eager.push(0..PAGE.min(file.len));
        let mut plan = object.read(headers)?;
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

/// An object in the course of being read.
struct Object<R> {
    file: Bytes<R>,
    segments: Vec<Segment>,
    eager: Vec<Range<u64>>,
    whole: Option<Whole>,
}

impl<'d, R: ReadRef<'d>> Object<R> {
    fn read(mut self, headers: &[ProgramHeader64<LE>]) -> Result<Plan> {
        for segment in self.segments.iter().filter(|segment| !segment.is_lazy()) {
            self.eager.push(segment.offset..segment.offset + segment.file_bytes);
        }
        let mut dynamic = None;
        for header in headers {
            let (name, is_read) = match header.p_type.get(LE) {
                elf::PT_DYNAMIC => ("PT_DYNAMIC", true),
                elf::PT_TLS => ("PT_TLS", true),
                elf::PT_NOTE => ("PT_NOTE", true),
                elf::PT_GNU_PROPERTY => ("PT_GNU_PROPERTY", true),
                elf::PT_PHDR => ("PT_PHDR", true),
                elf::PT_GNU_RELRO => ("PT_GNU_RELRO", false),
                _ => continue,
            };
            let (address, len) = (header.p_vaddr.get(LE), header.p_filesz.get(LE));
            if is_read && len > 0 {
                let offset = self.table(name, address, len)?;
                if name == "PT_DYNAMIC" {
                    dynamic = Some((offset, len)); // the dynamic linker takes the last
                }
            }
            if name == "PT_GNU_RELRO" && !self.in_memory(address, header.p_memsz.get(LE)) {
                return Err(malformed(name, "is not within a loaded segment"));
            }
        }
        let Some((offset, len)) = dynamic else {
            self.whole = Some(Whole::NotDynamic);
            return Ok(self.finish(None, 0..0, Vec::new()));
        };
        let dynamic = self.dynamic(offset, len)?;
        self.tables(&dynamic)?;
        let (init, init_array, tags) = self.constructors(&dynamic)?;
        Ok(self.finish(init, init_array, tags))
    }

    fn finish(self, init: Option<u64>, init_array: Range<u64>, constructor_tags: Vec<u64>) -> Plan {
        Plan { segments: self.segments, eager: self.eager, whole: self.whole, init, init_array, constructor_tags }
    }

    /// Where in the file a range of addresses comes from that lies in the file's part of one segment.
    fn place(&self, address: u64, len: u64) -> Option<u64> {
        self.segments.iter().find_map(|segment| {
            let inside = address.checked_sub(segment.address)?;
            (inside <= segment.file_bytes && len <= segment.file_bytes - inside).then(|| segment.offset + inside)
        })
    }

    fn in_memory(&self, address: u64, len: u64) -> bool {
        self.segments.iter().any(|segment| {
            address.checked_sub(segment.address).is_some_and(|inside| {
                let room = segment.memory_bytes.next_multiple_of(PAGE);
                inside <= room && len <= room - inside
            })
        })
    }

    /// A range of addresses that the dynamic linker reads: where in the file it is.
    fn table(&mut self, field: &str, address: u64, len: u64) -> Result<u64> {
        let offset = self.place(address, len).ok_or_else(|| {
            malformed(field, format_args!("{len:#x} bytes at address {address:#x} are in no loaded segment"))
        })?;
        self.eager.push(offset..offset + len);
        Ok(offset)
    }

    /// The bytes of the file from an address to the end of what its segment has there.
    fn rest(&self, field: &str, address: u64) -> Result<(u64, u64)> {
        let found = self.segments.iter().find_map(|segment| {
            let inside = address.checked_sub(segment.address)?;
            (inside < segment.file_bytes).then(|| (segment.offset + inside, segment.file_bytes - inside))
        });
        found.ok_or_else(|| malformed(field, format_args!("address {address:#x} is in no loaded segment")))
    }

    fn dynamic(&self, offset: u64, len: u64) -> Result<Dynamic> {
        const ENTRY: u64 = size_of::<Dyn64<LE>>() as u64;
        if len / ENTRY > DYNAMIC_MAX {
            return Err(malformed("PT_DYNAMIC", format_args!("{} entries", len / ENTRY)));
        }
        let all = self.file.slice::<Dyn64<LE>>("PT_DYNAMIC", offset, len / ENTRY)?;
        let end = all.iter().position(|entry| entry.d_tag.get(LE) == elf::DT_NULL);
        let end = end.ok_or_else(|| malformed("PT_DYNAMIC", "has no end (DT_NULL)"))?;
        let entries = all[..end].iter().zip((offset..).step_by(ENTRY as usize));
        // Of tags that come twice the dynamic linker takes the last.
        let mut entries: Vec<_> =
            entries.map(|(entry, place)| (entry.d_tag.get(LE), entry.d_val.get(LE), place)).collect();
        entries.reverse();
        Ok(Dynamic { entries })
    }

    fn tables(&mut self, dynamic: &Dynamic) -> Result<()> {
        let text_relocations = dynamic.get(elf::DT_TEXTREL).is_some() || dynamic.or_zero(elf::DT_FLAGS) & 4 != 0;
        if text_relocations {
            self.whole = Some(Whole::TextRelocations);
        }
        let names_bytes = dynamic.or_zero(elf::DT_STRSZ);
        if let Some(address) = dynamic.get(elf::DT_STRTAB) {
            let offset = self.table("DT_STRTAB", address, names_bytes)?;
            let last = names_bytes.checked_sub(1).map(|last| self.file.slice::<u8>("DT_STRTAB", offset + last, 1));
            if last.transpose()?.is_some_and(|last| last != [0]) {
                return Err(malformed("DT_STRTAB", "its last name does not end"));
            }
        }
        for tag in [elf::DT_NEEDED, elf::DT_SONAME, elf::DT_RPATH, elf::DT_RUNPATH] {
            let mut values = dynamic.entries.iter().filter(|entry| entry.0 == tag).map(|entry| entry.1);
            if let Some(value) = values.find(|value| *value >= names_bytes) {
                return Err(malformed(
                    "DT_NEEDED, DT_SONAME, DT_RPATH or DT_RUNPATH",
                    format_args!("a name at {value:#x} is outside the {names_bytes:#x} bytes of DT_STRTAB"),
                ));
            }
        }
        let symbols = self.symbols(dynamic, names_bytes)?;
        versions::check(&versions::Tables {
            file: self.file,
            need: self.versions(dynamic, elf::DT_VERNEED, "DT_VERNEED")?,
            need_count: dynamic.or_zero(elf::DT_VERNEEDNUM),
            define: self.versions(dynamic, elf::DT_VERDEF, "DT_VERDEF")?,
            define_count: dynamic.or_zero(elf::DT_VERDEFNUM),
            names_bytes,
        })?
        .into_iter()
        .for_each(|range| self.eager.push(range));
        if let Some(address) = dynamic.get(elf::DT_VERSYM) {
            self.table("DT_VERSYM", address, 2 * symbols.unwrap_or(0))?;
        }
        if dynamic.get(elf::DT_REL).is_some() || dynamic.get(elf::DT_PLTREL).is_some_and(|kind| kind != 7) {
            return Err(malformed("DT_REL, DT_PLTREL", "relocations without addends are not used on this machine"));
        }
        for (at, size, field) in RELOCATIONS {
            if let Some(address) = dynamic.get(at) {
                self.relocations(field, address, dynamic.or_zero(size), symbols, text_relocations)?;
            }
        }
        if let Some(address) = dynamic.get(elf::DT_RELR) {
            self.relative(address, dynamic.or_zero(elf::DT_RELRSZ), text_relocations)?;
        }
        Ok(())
    }

    fn versions(&self, dynamic: &Dynamic, tag: elf::DynamicTag, field: &str) -> Result<Option<(u64, u64)>> {
        dynamic.get(tag).map(|address| self.rest(field, address)).transpose()
    }

    /// The symbol table and its hash tables; how many symbols there are, if anything tells.
    fn symbols(&mut self, dynamic: &Dynamic, names_bytes: u64) -> Result<Option<u64>> {
        let Some(address) = dynamic.get(elf::DT_SYMTAB) else { return Ok(None) };
        const SYMBOL: u64 = size_of::<Sym64<LE>>() as u64;
        let hashed = match dynamic.get(elf::DT_GNU_HASH) {
            Some(table) => Some(self.gnu_hash(table)?),
            None => None,
        };
        let listed = match dynamic.get(elf::DT_HASH) {
            Some(table) => Some(self.hash(table)?),
            None => None,
        };
        let (offset, room) = self.rest("DT_SYMTAB", address)?;
        // A table for lookups does not tell of symbols that are only needed, if there are no others.
        let count = listed.or(hashed).unwrap_or(0).max(self.last_used(dynamic)? + 1);
        if count > room / SYMBOL {
            return Err(malformed("DT_SYMTAB", format_args!("{count} symbols are not within the segment")));
        }
        self.eager.push(offset..offset + count * SYMBOL);
        for (number, symbol) in self.file.slice::<Sym64<LE>>("DT_SYMTAB", offset, count)?.iter().enumerate() {
            if u64::from(symbol.st_name.get(LE)) >= names_bytes.max(1) {
                return Err(malformed("DT_SYMTAB", format_args!("the name of symbol {number} is outside DT_STRTAB")));
            }
            if symbol.st_type() == elf::STT_GNU_IFUNC && symbol.st_shndx.get(LE) != elf::SHN_UNDEF {
                self.whole = Some(Whole::IndirectFunctions);
            }
        }
        Ok(Some(count))
    }

    /// The last symbol that a relocation uses, or 0.
    fn last_used(&self, dynamic: &Dynamic) -> Result<u64> {
        let mut last = 0;
        for (at, size, field) in RELOCATIONS {
            let Some(address) = dynamic.get(at) else { continue };
            let (offset, _) = self.rest(field, address)?;
            let count = dynamic.or_zero(size) / size_of::<Rela64<LE>>() as u64;
            let used = self.file.slice::<Rela64<LE>>(field, offset, count)?.iter();
            last = used.map(|entry| entry.r_info.get(LE) >> 32).fold(last, u64::max);
        }
        Ok(last)
    }

    fn hash(&mut self, address: u64) -> Result<u64> {
        let (offset, _) = self.rest("DT_HASH", address)?;
        let head = self.file.slice::<object::U32<LE>>("DT_HASH", offset, 2)?;
        let (buckets, chains) = (u64::from(head[0].get(LE)), u64::from(head[1].get(LE)));
        let at = self.table("DT_HASH", address, 4 * (2 + buckets + chains))?;
        let links = self.file.slice::<object::U32<LE>>("DT_HASH", at + 8, buckets + chains)?;
        if buckets == 0 || links.iter().any(|link| u64::from(link.get(LE)) >= chains.max(1)) {
            return Err(malformed("DT_HASH", "it has no buckets, or names symbols beyond its chains"));
        }
        // A symbol is followed by a later or an earlier one; a circle would never end.
        let mut left = chains;
        for start in &links[..buckets as usize] {
            let mut symbol = start.get(LE);
            while symbol != 0 {
                left = left.checked_sub(1).ok_or_else(|| malformed("DT_HASH", "its chains go round in circles"))?;
                symbol = links[buckets as usize + symbol as usize].get(LE);
            }
        }
        Ok(chains)
    }

    /// How many symbols the GNU hash table reaches, and that it ends.
    fn gnu_hash(&mut self, address: u64) -> Result<u64> {
        let field = "DT_GNU_HASH";
        let (offset, room) = self.rest(field, address)?;
        let head = self.file.slice::<object::U32<LE>>(field, offset, 4)?;
        let [buckets, base, bloom, shift] = [0, 1, 2, 3].map(|at| u64::from(head[at].get(LE)));
        if buckets == 0 || !bloom.is_power_of_two() || shift >= 64 {
            return Err(malformed(field, format_args!("{buckets} buckets, {bloom} words of filter, shift {shift}")));
        }
        let chains_at = 16 + 8 * bloom + 4 * buckets;
        if chains_at > room {
            return Err(malformed(field, "is not within the segment"));
        }
        let starts = self.file.slice::<object::U32<LE>>(field, offset + 16 + 8 * bloom, buckets)?;
        let mut last = base;
        for start in starts.iter().map(|start| u64::from(start.get(LE))).filter(|start| *start != 0) {
            if start < base {
                return Err(malformed(field, format_args!("a bucket names symbol {start}, before the first, {base}")));
            }
            last = last.max(start);
        }
        let mut end = chains_at;
        let any = starts.iter().any(|start| start.get(LE) != 0);
        if any {
            // Chains stand one after the other, so the end of the last one is the end of all.
            let first = chains_at + 4 * (last - base);
            let most = room.saturating_sub(first) / 4;
            let chain = self.file.slice::<object::U32<LE>>(field, offset + first, most)?;
            let length = chain.iter().position(|hash| hash.get(LE) & 1 != 0);
            let length = length.ok_or_else(|| malformed(field, "its last chain does not end"))? as u64 + 1;
            last += length;
            end = first + 4 * length;
        }
        self.eager.push(offset..offset + end);
        Ok(last)
    }

    fn relocations(&mut self, field: &str, address: u64, bytes: u64, symbols: Option<u64>, text: bool) -> Result<()> {
        let offset = self.table(field, address, bytes)?;
        let entries = self.file.slice::<Rela64<LE>>(field, offset, bytes / size_of::<Rela64<LE>>() as u64)?;
        let mut targets = Targets::new(&self.segments, text);
        for (number, entry) in entries.iter().enumerate() {
            let info = entry.r_info.get(LE);
            let (kind, symbol) = (info as u32, info >> 32);
            if kind == machine::NONE {
                continue;
            }
            if kind == machine::IRELATIVE {
                self.whole = Some(Whole::IndirectFunctions);
            }
            if symbol >= symbols.unwrap_or(0).max(1) {
                return Err(malformed(
                    field,
                    format_args!("entry {number} uses symbol {symbol}, which does not exist"),
                ));
            }
            targets.check(field, entry.r_offset.get(LE))?;
        }
        Ok(())
    }

    fn relative(&mut self, address: u64, bytes: u64, text: bool) -> Result<()> {
        let field = "DT_RELR";
        let offset = self.table(field, address, bytes)?;
        let mut targets = Targets::new(&self.segments, text);
        let mut next = 0;
        for entry in self.file.slice::<object::U64<LE>>(field, offset, bytes / 8)? {
            let entry = entry.get(LE);
            if entry & 1 == 0 {
                targets.check(field, entry)?;
                next = entry.saturating_add(8);
                continue;
            }
            for bit in (1..64).filter(|bit| entry >> bit & 1 != 0) {
                targets.check(field, next.saturating_add(8 * (bit - 1)))?;
            }
            next = next.saturating_add(8 * 63);
        }
        Ok(())
    }

    /// The constructors, and where the entries that announce them stand.
    fn constructors(&self, dynamic: &Dynamic) -> Result<(Option<u64>, Range<u64>, Vec<u64>)> {
        for tag in [elf::DT_INIT, elf::DT_FINI] {
            if let Some(address) = dynamic.get(tag)
                && !self.segments.iter().any(|segment| {
                    segment.executable && (segment.address..segment.address + segment.file_bytes).contains(&address)
                })
            {
                return Err(malformed("DT_INIT or DT_FINI", format_args!("address {address:#x} is not in code")));
            }
        }
        let mut array = 0..0;
        for (at, size) in [(elf::DT_INIT_ARRAY, elf::DT_INIT_ARRAYSZ), (elf::DT_FINI_ARRAY, elf::DT_FINI_ARRAYSZ)] {
            let Some(address) = dynamic.get(at) else { continue };
            let bytes = dynamic.or_zero(size);
            if self.place(address, bytes).is_none() || address % 8 != 0 {
                return Err(malformed(
                    "DT_INIT_ARRAY or DT_FINI_ARRAY",
                    format_args!("{bytes:#x} bytes at address {address:#x} are in no loaded segment"),
                ));
            }
            if at == elf::DT_INIT_ARRAY {
                array = address..address + bytes / 8 * 8;
            }
        }
        let tags = dynamic.places(&[elf::DT_INIT, elf::DT_INIT_ARRAY, elf::DT_INIT_ARRAYSZ]);
        Ok((dynamic.get(elf::DT_INIT), array, tags))
    }
}

/// Where relocations may point: eight bytes of a segment that can be written, or any if there are text relocations.
struct Targets<'a> {
    segments: &'a [Segment],
    text: bool,
    last: usize,
}

impl<'a> Targets<'a> {
    const fn new(segments: &'a [Segment], text: bool) -> Self {
        Self { segments, text, last: 0 }
    }

    fn check(&mut self, field: &str, address: u64) -> Result<()> {
        let holds = |segment: &Segment| {
            (segment.writable || self.text)
                && address
                    .checked_sub(segment.address)
                    .is_some_and(|inside| inside <= segment.memory_bytes.saturating_sub(4))
        };
        if holds(&self.segments[self.last]) {
            return Ok(());
        }
        self.last = self.segments.iter().position(holds).ok_or_else(|| {
            malformed(field, format_args!("a relocation of address {address:#x}, which is not writable memory of it"))
        })?;
        Ok(())
    }
}
