//! The dynamic section of a shared object, and what the dynamic linker follows from there.
//!
//! glibc follows entries that are not there to address 0, and ends the process where an assertion fails. Both are refused
//! here: what an entry needs beside it, sizes of entries, and names that must be among others.

use std::ops::Range;

use object::elf::{self, Dyn64, DynamicTag, ProgramHeader64, Rela64};
use object::{LittleEndian as LE, ReadRef};

use super::plan::{Bytes, Linkage, Plan, Segment, Whole, malformed};
use super::versions;
use crate::Result;
use crate::pages::PAGE;

const ENTRIES_MAX: u64 = 1 << 16;
/// More libraries than any object needs; a dynamic section that names more was made to waste memory.
const NEEDED_MAX: usize = 4096;
/// No TLS block is larger. glibc ends the process if it has no memory for one.
const TLS_MAX_BYTES: u64 = 1 << 28;
const TLS_ALIGN_MAX: u64 = 1 << 16;
/// What the dynamic linker writes to `DT_PLTGOT` for functions that are bound at their first call.
const GOT_HEAD_BYTES: u64 = 24;

const DF_1_PIE: u64 = 0x0800_0000;

/// The tables of relocations with addends: where, how long, and what messages call them.
pub const RELOCATIONS: [(DynamicTag, DynamicTag, &str); 2] =
    [(elf::DT_RELA, elf::DT_RELASZ, "DT_RELA"), (elf::DT_JMPREL, elf::DT_PLTRELSZ, "DT_JMPREL")];

/// Entries, by the name that messages give them, that are followed without a look at whether they are there.
const PAIRS: [(DynamicTag, DynamicTag, &str); 8] = [
    (elf::DT_RELA, elf::DT_RELASZ, "DT_RELASZ"),
    (elf::DT_RELA, elf::DT_RELAENT, "DT_RELAENT"),
    (elf::DT_PLTREL, elf::DT_JMPREL, "DT_JMPREL"),
    (elf::DT_JMPREL, elf::DT_PLTRELSZ, "DT_PLTRELSZ"),
    (elf::DT_RELR, elf::DT_RELRSZ, "DT_RELRSZ"),
    (elf::DT_RELR, elf::DT_RELRENT, "DT_RELRENT"),
    (elf::DT_INIT_ARRAY, elf::DT_INIT_ARRAYSZ, "DT_INIT_ARRAYSZ"),
    (elf::DT_FINI_ARRAY, elf::DT_FINI_ARRAYSZ, "DT_FINI_ARRAYSZ"),
];

/// Names whose places in the string table are followed.
const NAMES: [(DynamicTag, &str); 6] = [
    (elf::DT_NEEDED, "DT_NEEDED"),
    (elf::DT_SONAME, "DT_SONAME"),
    (elf::DT_RPATH, "DT_RPATH"),
    (elf::DT_RUNPATH, "DT_RUNPATH"),
    (elf::DT_AUXILIARY, "DT_AUXILIARY"),
    (elf::DT_FILTER, "DT_FILTER"),
];

/// The values of the dynamic section, the last first.
#[derive(Default)]
pub struct Dynamic {
    /// Tag, value, and where in the file the entry stands.
    entries: Vec<(DynamicTag, u64, u64)>,
}

impl Dynamic {
    /// Of tags that come twice the dynamic linker takes the last.
    pub fn get(&self, tag: DynamicTag) -> Option<u64> {
        self.entries.iter().find(|entry| entry.0 == tag).map(|entry| entry.1)
    }

    pub fn or_zero(&self, tag: DynamicTag) -> u64 {
        self.get(tag).unwrap_or(0)
    }

    fn places(&self, tags: &[DynamicTag]) -> Vec<u64> {
        self.entries.iter().filter(|entry| tags.contains(&entry.0)).map(|entry| entry.2).collect()
    }

    /// All values of a tag, in the order of the file.
    fn all(&self, tag: DynamicTag) -> impl Iterator<Item = u64> {
        self.entries.iter().rev().filter(move |entry| entry.0 == tag).map(|entry| entry.1)
    }

    fn check_pairs(&self) -> Result<()> {
        for (tag, wanted, field) in PAIRS {
            if self.get(tag).is_some() && self.get(wanted).is_none() {
                return Err(malformed(field, "is missing, which the dynamic linker counts on"));
            }
        }
        for (tag, size, field) in
            [(elf::DT_RELAENT, size_of::<Rela64<LE>>() as u64, "DT_RELAENT"), (elf::DT_RELRENT, 8, "DT_RELRENT")]
        {
            if self.get(tag).is_some_and(|value| value != size) {
                return Err(malformed(field, format_args!("{} instead of {size}", self.or_zero(tag))));
            }
        }
        if self.get(elf::DT_REL).is_some() || self.get(elf::DT_PLTREL).is_some_and(|kind| kind != 7) {
            return Err(malformed("DT_REL, DT_PLTREL", "relocations without addends are not used on this machine"));
        }
        Ok(())
    }
}

/// An object in the course of being read.
pub struct Object<R> {
    pub file: Bytes<R>,
    pub segments: Vec<Segment>,
    pub eager: Vec<Range<u64>>,
    pub spent: Vec<Range<u64>>,
    pub whole: Option<Whole>,
    /// Whether there is a block of memory that each thread gets.
    pub has_tls: bool,
    linkage: Linkage,
}

impl<'d, R: ReadRef<'d>> Object<R> {
    pub fn new(file: Bytes<R>, segments: Vec<Segment>) -> Self {
        let linkage = Linkage::default();
        Self { file, segments, eager: Vec::new(), spent: Vec::new(), whole: None, has_tls: false, linkage }
    }

    pub fn read(mut self, headers: &[ProgramHeader64<LE>]) -> Result<Plan> {
        for segment in self.segments.iter().filter(|segment| !segment.is_lazy()) {
            self.eager.push(segment.offset..segment.offset + segment.file_bytes);
        }
        let mut dynamic = None;
        for header in headers {
            let (address, len) = (header.p_vaddr.get(LE), header.p_filesz.get(LE));
            match header.p_type.get(LE) {
                // The dynamic linker takes the last.
                elf::PT_DYNAMIC => dynamic = Some((self.dynamic_section(header)?, len)),
                elf::PT_TLS => self.tls(header)?,
                elf::PT_NOTE if len > 0 => drop(self.table("PT_NOTE", address, len)?),
                elf::PT_GNU_PROPERTY if len > 0 => drop(self.table("PT_GNU_PROPERTY", address, len)?),
                // Unwinders take the headers from there, however many the file has.
                elf::PT_PHDR => drop(self.table("PT_PHDR", address, size_of_val(headers) as u64)?),
                elf::PT_GNU_RELRO if !self.is_writable(address, header.p_memsz.get(LE)) => {
                    return Err(malformed("PT_GNU_RELRO", "is not within a loaded segment that is written"));
                }
                _ => {}
            }
        }
        let Some((offset, len)) = dynamic else {
            self.whole = Some(Whole::NotDynamic);
            return Ok(self.finish(None, 0..0, Vec::new()));
        };
        let dynamic = self.dynamic(offset, len)?;
        if dynamic.or_zero(elf::DT_FLAGS_1) & DF_1_PIE != 0 {
            return Err(malformed("DT_FLAGS_1", "it is a program (DF_1_PIE), and no shared object"));
        }
        dynamic.check_pairs()?;
        self.tables(&dynamic)?;
        let (init, init_array, tags) = self.constructors(&dynamic)?;
        Ok(self.finish(init, init_array, tags))
    }

    fn finish(self, init: Option<u64>, init_array: Range<u64>, constructor_tags: Vec<u64>) -> Plan {
        let Self { segments, eager, spent, whole, linkage, .. } = self;
        Plan { segments, eager, spent, whole, init, init_array, constructor_tags, linkage }
    }

    fn readable(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|segment| segment.readable)
    }

    /// Where in the file a range of addresses comes from that lies in the file's part of one segment that may be read.
    fn place(&self, address: u64, len: u64) -> Option<u64> {
        self.readable().find_map(|segment| {
            let inside = address.checked_sub(segment.address)?;
            (inside <= segment.file_bytes && len <= segment.file_bytes - inside).then(|| segment.offset + inside)
        })
    }

    /// Whether a range lies in the memory of one segment that the object may write to, or is made to.
    fn is_writable(&self, address: u64, len: u64) -> bool {
        self.segments.iter().filter(|segment| segment.writable).any(|segment| {
            address.checked_sub(segment.address).is_some_and(|inside| {
                // RELRO may be rounded up to a page.
                let room = (segment.address + segment.memory_bytes).next_multiple_of(PAGE) - segment.address;
                inside <= room && len <= room - inside
            })
        })
    }

    pub fn is_code(&self, address: u64) -> bool {
        let holds = |segment: &Segment| {
            segment.executable && (segment.address..segment.address + segment.file_bytes).contains(&address)
        };
        self.segments.iter().any(holds)
    }

    /// A range of addresses that the dynamic linker reads: where in the file it is.
    pub fn table(&mut self, field: &str, address: u64, len: u64) -> Result<u64> {
        let offset = self.place(address, len).ok_or_else(|| {
            malformed(field, format_args!("{len:#x} bytes at address {address:#x} are in no loaded segment"))
        })?;
        self.eager.push(offset..offset + len);
        Ok(offset)
    }

    /// The bytes of the file from an address to the end of what its segment has there.
    pub fn rest(&self, field: &str, address: u64) -> Result<(u64, u64)> {
        let found = self.readable().find_map(|segment| {
            let inside = address.checked_sub(segment.address)?;
            (inside < segment.file_bytes).then(|| (segment.offset + inside, segment.file_bytes - inside))
        });
        found.ok_or_else(|| malformed(field, format_args!("address {address:#x} is in no loaded segment")))
    }

    /// Where in the file the dynamic section is. The dynamic linker writes to it.
    fn dynamic_section(&mut self, header: &ProgramHeader64<LE>) -> Result<u64> {
        let (address, len) = (header.p_vaddr.get(LE), header.p_filesz.get(LE));
        if len == 0 {
            return Err(malformed("PT_DYNAMIC", "has no bytes in the file, as in files of debugging symbols"));
        }
        let offset = self.table("PT_DYNAMIC", address, len)?;
        if !self.is_writable(address, len) {
            return Err(malformed("PT_DYNAMIC", "is not within a segment that is written"));
        }
        if header.p_offset.get(LE) != offset {
            return Err(malformed("PT_DYNAMIC", "p_offset and p_vaddr name different bytes of the file"));
        }
        Ok(offset)
    }

    fn tls(&mut self, header: &ProgramHeader64<LE>) -> Result<()> {
        let (file_bytes, memory_bytes, align) =
            (header.p_filesz.get(LE), header.p_memsz.get(LE), header.p_align.get(LE));
        if memory_bytes == 0 && file_bytes == 0 {
            return Ok(());
        }
        if memory_bytes < file_bytes || memory_bytes > TLS_MAX_BYTES {
            return Err(malformed("PT_TLS", format_args!("{memory_bytes:#x} bytes, {file_bytes:#x} in the file")));
        }
        if !align.is_power_of_two() || align > TLS_ALIGN_MAX {
            return Err(malformed("PT_TLS", format_args!("p_align is {align:#x}")));
        }
        if file_bytes > 0 {
            self.table("PT_TLS", header.p_vaddr.get(LE), file_bytes)?;
        }
        self.has_tls = true;
        Ok(())
    }

    fn dynamic(&self, offset: u64, len: u64) -> Result<Dynamic> {
        const ENTRY: u64 = size_of::<Dyn64<LE>>() as u64;
        if len / ENTRY > ENTRIES_MAX {
            return Err(malformed("PT_DYNAMIC", format_args!("{} entries", len / ENTRY)));
        }
        let all = self.file.slice::<Dyn64<LE>>("PT_DYNAMIC", offset, len / ENTRY)?;
        let end = all.iter().position(|entry| entry.d_tag.get(LE) == elf::DT_NULL);
        let end = end.ok_or_else(|| malformed("PT_DYNAMIC", "has no end (DT_NULL)"))?;
        let entries = all[..end].iter().zip((offset..).step_by(ENTRY as usize));
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
        let names = self.names(dynamic, names_bytes)?;
        self.linkage = self.linkage(dynamic, names, names_bytes)?;
        let symbols = self.symbols(dynamic, names_bytes)?;
        let need = self.versions(dynamic, elf::DT_VERNEED, "DT_VERNEED")?;
        let define = self.versions(dynamic, elf::DT_VERDEF, "DT_VERDEF")?;
        let versions = versions::check(&versions::Tables {
            file: self.file,
            need,
            define,
            names,
            names_bytes,
            needed: &self.linkage.needed,
        })?;
        self.eager.extend(versions.ranges);
        self.symbol_versions(dynamic, symbols, versions.highest)?;
        for (at, size, field) in RELOCATIONS {
            if let Some(address) = dynamic.get(at) {
                let relative = if at == elf::DT_RELA { dynamic.or_zero(elf::DT_RELACOUNT) } else { 0 };
                self.relocations(field, address, dynamic.or_zero(size), relative, symbols, text_relocations)?;
                if at == elf::DT_RELA {
                    // Those of DT_JMPREL may be done one by one, when a function is called.
                    let start = self.table(field, address, dynamic.or_zero(size))?;
                    self.spent.push(start..start + dynamic.or_zero(size));
                }
            }
        }
        if let Some(address) = dynamic.get(elf::DT_RELR) {
            self.relative(address, dynamic.or_zero(elf::DT_RELRSZ), text_relocations)?;
        }
        match dynamic.get(elf::DT_PLTGOT) {
            Some(address) if dynamic.get(elf::DT_JMPREL).is_some() && !self.is_writable(address, GOT_HEAD_BYTES) => {
                Err(malformed("DT_PLTGOT", format_args!("address {address:#x} is not in a segment that is written")))
            }
            None if dynamic.get(elf::DT_JMPREL).is_some() => {
                Err(malformed("DT_PLTGOT", "is missing, which the dynamic linker counts on"))
            }
            _ => Ok(()),
        }
    }

    /// Where in the file the string table is.
    fn names(&mut self, dynamic: &Dynamic, names_bytes: u64) -> Result<u64> {
        let Some(address) = dynamic.get(elf::DT_STRTAB) else {
            return Err(malformed("DT_STRTAB", "is missing, which the dynamic linker counts on"));
        };
        let offset = self.table("DT_STRTAB", address, names_bytes)?;
        let last = names_bytes.checked_sub(1).map(|last| self.file.slice::<u8>("DT_STRTAB", offset + last, 1));
        if last.transpose()?.is_some_and(|last| last != [0]) {
            return Err(malformed("DT_STRTAB", "its last name does not end"));
        }
        Ok(offset)
    }

    fn linkage(&self, dynamic: &Dynamic, names: u64, names_bytes: u64) -> Result<Linkage> {
        let mut found = Linkage::default();
        for (tag, field) in NAMES {
            for value in dynamic.all(tag) {
                if value >= names_bytes {
                    let what = format_args!("a name at {value:#x} is outside the {names_bytes:#x} bytes of DT_STRTAB");
                    return Err(malformed(field, what));
                }
                let name = self.file.name(field, names + value..names + names_bytes)?.to_vec();
                match tag {
                    elf::DT_NEEDED if found.needed.len() == NEEDED_MAX => {
                        return Err(malformed(field, format_args!("there are more than {NEEDED_MAX}")));
                    }
                    elf::DT_NEEDED => found.needed.push(name),
                    elf::DT_SONAME => found.soname = Some(name),
                    elf::DT_RPATH => found.rpath = Some(name),
                    elf::DT_RUNPATH => found.runpath = Some(name),
                    _ => {}
                }
            }
        }
        Ok(found)
    }

    fn versions(&self, dynamic: &Dynamic, tag: DynamicTag, field: &str) -> Result<Option<(u64, u64)>> {
        dynamic.get(tag).map(|address| self.rest(field, address)).transpose()
    }

    /// The constructors, and where the entries that announce them stand.
    fn constructors(&self, dynamic: &Dynamic) -> Result<(Option<u64>, Range<u64>, Vec<u64>)> {
        for (tag, field) in [(elf::DT_INIT, "DT_INIT"), (elf::DT_FINI, "DT_FINI")] {
            if let Some(address) = dynamic.get(tag).filter(|address| !self.is_code(*address)) {
                return Err(malformed(field, format_args!("address {address:#x} is not in code")));
            }
        }
        let mut array = 0..0;
        for (at, size, field) in [
            (elf::DT_INIT_ARRAY, elf::DT_INIT_ARRAYSZ, "DT_INIT_ARRAY"),
            (elf::DT_FINI_ARRAY, elf::DT_FINI_ARRAYSZ, "DT_FINI_ARRAY"),
        ] {
            let Some(address) = dynamic.get(at) else { continue };
            let bytes = dynamic.or_zero(size);
            if self.place(address, bytes).is_none() || address % 8 != 0 {
                let what = format_args!("{bytes:#x} bytes at address {address:#x} are in no loaded segment");
                return Err(malformed(field, what));
            }
            if at == elf::DT_INIT_ARRAY {
                array = address..address + bytes / 8 * 8;
            }
        }
        let tags = dynamic.places(&[elf::DT_INIT, elf::DT_INIT_ARRAY, elf::DT_INIT_ARRAYSZ]);
        Ok((dynamic.get(elf::DT_INIT), array, tags))
    }
}
