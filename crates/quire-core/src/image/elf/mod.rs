//! ELF files. What runs is described by the program headers and the dynamic section; section headers are read only by
//! `sections`, and where nothing else can tell: symbols that are not dynamic, relocatable objects, static executables.

mod relocations;
mod symbols;

use std::collections::HashMap;

use object::elf::{self, FileHeader32, FileHeader64};
use object::read::elf::{Dyn, FileHeader, NoteIterator, ProgramHeader, SectionHeader};
use object::{Endianness, FileKind, Pod, ReadRef, StringTable};

use super::{Names, Window, malformed};
use crate::Result;

/// A name in a dynamic section longer than this is none (`PATH_MAX` bounds each folder of a search path).
const STRING_MAX: usize = 4096;
/// A dynamic section with more entries than this was made to waste time.
const DYNAMIC_MAX: usize = 1 << 16;

/// Fields of the file header that say what the file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub is_64: bool,
    pub is_little_endian: bool,
    pub os_abi: u8,
    pub abi_version: u8,
    pub kind: u16,
    pub machine: u16,
    pub flags: u32,
    pub entry: u64,
    pub header_bytes: u16,
    pub segments_offset: u64,
    pub sections_offset: u64,
    pub section_count: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub kind: u32,
    pub flags: u32,
    pub offset: u64,
    pub address: u64,
    pub physical_address: u64,
    pub file_size: u64,
    pub memory_size: u64,
    pub align: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    pub name: Vec<u8>,
    pub kind: u32,
    pub flags: u64,
    pub address: u64,
    pub offset: u64,
    pub size: u64,
    pub link: u32,
    pub info: u32,
    pub align: u64,
    pub entry_size: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DynamicEntry {
    pub tag: i64,
    pub value: u64,
    /// For the tags whose value is a name.
    pub name: Option<Vec<u8>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    pub name: Vec<u8>,
    /// The library that is to define it, for a symbol that is needed.
    pub library: Option<Vec<u8>>,
    /// Not the version that a name without one means.
    pub is_hidden: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Symbol {
    pub name: Vec<u8>,
    pub value: u64,
    pub size: u64,
    pub kind: u8,
    pub binding: u8,
    pub other: u8,
    pub section: u32,
    pub version: Option<Version>,
}

/// Which table a relocation stands in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RelocationTable {
    /// Done when the object is loaded.
    Eager,
    /// `DT_JMPREL`: slots of functions, which may wait for the first call.
    Plt,
    /// `DT_RELR`: words to which the load address is added.
    Relative,
    /// Of the section with this index; for a linker.
    Section(u32),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relocation {
    pub table: RelocationTable,
    pub offset: u64,
    pub kind: u32,
    /// Index into the symbols of the table; 0 for none.
    pub symbol: u32,
    /// None if it is what stands at the place.
    pub addend: Option<i64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    pub name: Vec<u8>,
    pub kind: u32,
    pub description: Vec<u8>,
}

/// Where the names that a symbol table has are taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SymbolTable {
    /// What the dynamic linker sees.
    Dynamic,
    /// What the linker and debuggers see; stripped files have none.
    Static,
}

macro_rules! ask {
    ($window:expr, $view:ident => $body:expr) => {
        $window.ask(|data| match FileKind::parse(data) {
            Ok(FileKind::Elf32) => {
                let $view = View::<FileHeader32<Endianness>, _>::new(data)?;
                $body
            }
            Ok(FileKind::Elf64) => {
                let $view = View::<FileHeader64<Endianness>, _>::new(data)?;
                $body
            }
            _ => Err(malformed("e_ident", "the first bytes are not those of an ELF file")),
        })
    };
}

/// # Errors
/// Malformed: the file header, or the table of program headers or of section headers, is cut or has entries of
/// another size; Page, as everywhere here.
pub fn header(window: &Window) -> Result<Header> {
    ask!(window, view => view.describe())
}

/// # Errors
/// Malformed: the table of program headers lies outside of the file.
pub fn segments(window: &Window) -> Result<Vec<Segment>> {
    ask!(window, view => Ok(view.segments.iter().map(|segment| view.segment(segment)).collect()))
}

/// # Errors
/// Malformed: the table of section headers, or the names of sections, lie outside of the file.
pub fn sections(window: &Window) -> Result<Vec<Section>> {
    ask!(window, view => view.named_sections())
}

/// What `PT_INTERP` names; without the byte 0 at its end.
///
/// # Errors
/// Malformed: it lies outside of the file, is too long or does not end.
pub fn interpreter(window: &Window) -> Result<Option<Vec<u8>>> {
    ask!(window, view => view.interpreter())
}

/// The entries up to `DT_NULL`, which is not among them. None without a dynamic segment.
///
/// # Errors
/// Malformed: the dynamic section or a name of it lies outside of the file or of the loaded segments.
pub fn dynamic(window: &Window) -> Result<Option<Vec<DynamicEntry>>> {
    ask!(window, view => view.dynamic_entries())
}

/// All symbols of a table, the empty one at index 0 too, so that a relocation's index counts in it.
///
/// # Errors
/// Malformed: the table, its names or its versions lie outside of the file or of the loaded segments.
pub fn symbols(window: &Window, table: SymbolTable) -> Result<Vec<Symbol>> {
    ask!(window, view => match table {
        SymbolTable::Dynamic => view.dynamic_symbols(),
        SymbolTable::Static => view.static_symbols(),
    })
}

/// Those that the dynamic linker does, in its order; of an object without a dynamic section those of its sections.
///
/// # Errors
/// Malformed: a table lies outside of the file or of the loaded segments.
pub fn relocations(window: &Window) -> Result<Vec<Relocation>> {
    ask!(window, view => view.relocations())
}

/// The notes of all `PT_NOTE` segments, and of sections that are in none of them.
///
/// # Errors
/// Malformed: a note is cut.
pub fn notes(window: &Window) -> Result<Vec<Note>> {
    ask!(window, view => view.notes())
}

/// Bytes at an address of the loaded object, as they stand in the file.
///
/// # Errors
/// Malformed: they are in no loaded segment, or past what of it is in the file.
pub fn bytes_at(window: &Window, address: u64, size: u64) -> Result<Vec<u8>> {
    ask!(window, view => view.at(address, size, "the address").map(<[u8]>::to_vec))
}

struct View<'d, E: FileHeader<Endian = Endianness>, R: ReadRef<'d>> {
    data: R,
    header: &'d E,
    endian: Endianness,
    segments: &'d [E::ProgramHeader],
}

/// The values of the dynamic section that appear once.
#[derive(Default)]
struct Places(HashMap<i64, u64>);

impl Places {
    fn get(&self, tag: elf::DynamicTag) -> Option<u64> {
        self.0.get(&tag.0).copied()
    }

    fn size(&self, tag: elf::DynamicTag) -> u64 {
        self.get(tag).unwrap_or(0)
    }
}

impl<'d, E: FileHeader<Endian = Endianness>, R: ReadRef<'d>> View<'d, E, R> {
    fn new(data: R) -> Result<Self> {
        let header = E::parse(data).map_err(|why| malformed("the file header", why))?;
        let endian = header.endian().map_err(|why| malformed("EI_DATA", why))?;
        let segments = header.program_headers(endian, data).map_err(|why| malformed("e_phoff, e_phnum", why))?;
        Ok(Self { data, header, endian, segments })
    }

    fn describe(&self) -> Result<Header> {
        let (header, endian) = (self.header, self.endian);
        let sections = header.section_headers(endian, self.data).map_err(|why| malformed("e_shoff, e_shnum", why));
        Ok(Header {
            is_64: header.is_type_64(),
            is_little_endian: header.is_little_endian(),
            os_abi: header.e_ident().os_abi.0,
            abi_version: header.e_ident().abi_version,
            kind: header.e_type(endian).0,
            machine: header.e_machine(endian).0,
            flags: header.e_flags(endian).0,
            entry: header.e_entry(endian).into(),
            header_bytes: header.e_ehsize(endian),
            segments_offset: header.e_phoff(endian).into(),
            sections_offset: header.e_shoff(endian).into(),
            // Nothing that runs needs them, so a table that cannot be read is told of when it is asked for.
            section_count: sections.map_or(0, |sections| sections.len() as u32),
        })
    }

    fn segment(&self, segment: &E::ProgramHeader) -> Segment {
        let endian = self.endian;
        Segment {
            kind: segment.p_type(endian).0,
            flags: segment.p_flags(endian).0,
            offset: segment.p_offset(endian).into(),
            address: segment.p_vaddr(endian).into(),
            physical_address: segment.p_paddr(endian).into(),
            file_size: segment.p_filesz(endian).into(),
            memory_size: segment.p_memsz(endian).into(),
            align: segment.p_align(endian).into(),
        }
    }

    fn named_sections(&self) -> Result<Vec<Section>> {
        let endian = self.endian;
        let headers = self.section_headers()?;
        let strings =
            self.header.section_strings(endian, self.data, headers).map_err(|why| malformed("e_shstrndx", why))?;
        let mut names = Names::of(self.data);
        headers
            .iter()
            .enumerate()
            .map(|(index, section)| {
                let name = section
                    .name(endian, strings)
                    .map_err(|why| malformed(format_args!("sh_name of section {index}"), why))?;
                Ok(Section {
                    name: names.take(name, "sh_name")?,
                    kind: section.sh_type(endian).0,
                    flags: section.sh_flags(endian).0,
                    address: section.sh_addr(endian).into(),
                    offset: section.sh_offset(endian).into(),
                    size: section.sh_size(endian).into(),
                    link: section.sh_link(endian),
                    info: section.sh_info(endian),
                    align: section.sh_addralign(endian).into(),
                    entry_size: section.sh_entsize(endian).into(),
                })
            })
            .collect()
    }

    fn section_headers(&self) -> Result<&'d [E::SectionHeader]> {
        self.header.section_headers(self.endian, self.data).map_err(|why| malformed("e_shoff, e_shnum", why))
    }

    fn interpreter(&self) -> Result<Option<Vec<u8>>> {
        for segment in self.segments {
            // So it is in files of debugging symbols, which are not run.
            if segment.p_filesz(self.endian).into() == 0 {
                continue;
            }
            let found = segment.interpreter(self.endian, self.data).map_err(|why| malformed("PT_INTERP", why))?;
            if let Some(name) = found {
                if name.len() >= STRING_MAX {
                    return Err(malformed("PT_INTERP", format_args!("a path of {} bytes", name.len())));
                }
                return Ok(Some(name.to_vec()));
            }
        }
        Ok(None)
    }

    fn raw_dynamic(&self) -> Result<Option<&'d [E::Dyn]>> {
        let mut entries = None;
        for segment in self.segments {
            // The dynamic linker takes the last one.
            entries = segment.dynamic(self.endian, self.data).map_err(|why| malformed("PT_DYNAMIC", why))?.or(entries);
        }
        let Some(entries) = entries else { return Ok(None) };
        let end = entries.iter().position(|entry| entry.tag(self.endian) == elf::DT_NULL).unwrap_or(entries.len());
        if end > DYNAMIC_MAX {
            return Err(malformed("PT_DYNAMIC", format_args!("more than {DYNAMIC_MAX} entries")));
        }
        Ok(Some(&entries[..end]))
    }

    fn places(&self) -> Result<Option<Places>> {
        let Some(entries) = self.raw_dynamic()? else { return Ok(None) };
        Ok(Some(Places(entries.iter().map(|entry| (entry.tag(self.endian).0, entry.val(self.endian))).collect())))
    }

    fn dynamic_entries(&self) -> Result<Option<Vec<DynamicEntry>>> {
        let Some(entries) = self.raw_dynamic()? else { return Ok(None) };
        let has_names = entries.iter().any(|entry| is_name(entry.tag(self.endian)));
        let strings = if has_names {
            let places = self.places()?.unwrap_or_default();
            Some(self.dynamic_strings(&places)?)
        } else {
            None
        };
        let mut names = Names::of(self.data);
        let mut found = Vec::with_capacity(entries.len());
        for entry in entries {
            let (tag, value) = (entry.tag(self.endian), entry.val(self.endian));
            let name = match strings {
                Some(strings) if is_name(tag) => Some(names.take(short_name(strings, value)?, "DT_STRTAB")?),
                _ => None,
            };
            found.push(DynamicEntry { tag: tag.0, value, name });
        }
        Ok(Some(found))
    }

    /// `DT_STRTAB`, to be read name by name.
    fn dynamic_strings(&self, places: &Places) -> Result<StringTable<'d, R>> {
        let address =
            places.get(elf::DT_STRTAB).ok_or_else(|| malformed("DT_STRTAB", "missing, and there are names"))?;
        let size = places.size(elf::DT_STRSZ);
        let (start, room) = self.place(address, "DT_STRTAB")?;
        if size > room {
            return Err(malformed("DT_STRSZ", format_args!("{size:#x} is past the end of the segment")));
        }
        Ok(StringTable::new(self.data, start, start + size))
    }

    /// `DT_STRTAB` in one piece, for tables that name much of it.
    fn dynamic_strings_whole(&self, places: &Places) -> Result<StringTable<'d, &'d [u8]>> {
        let address =
            places.get(elf::DT_STRTAB).ok_or_else(|| malformed("DT_STRTAB", "missing, and there are names"))?;
        let bytes = self.at(address, places.size(elf::DT_STRSZ), "DT_STRTAB, DT_STRSZ")?;
        Ok(StringTable::new(bytes, 0, bytes.len() as u64))
    }

    /// Where in the file an address comes from, and how many bytes from there on are in the file.
    fn place(&self, address: u64, field: &str) -> Result<(u64, u64)> {
        let endian = self.endian;
        self.segments
            .iter()
            .filter(|segment| segment.p_type(endian) == elf::PT_LOAD)
            .find_map(|segment| {
                let inside = address.checked_sub(segment.p_vaddr(endian).into())?;
                let room = segment.p_filesz(endian).into().checked_sub(inside).filter(|room| *room > 0)?;
                let start = segment.p_offset(endian).into().checked_add(inside)?;
                start.checked_add(room)?;
                Some((start, room))
            })
            .ok_or_else(|| malformed(field, format_args!("{address:#x} is in no loaded segment")))
    }

    fn at(&self, address: u64, size: u64, field: &str) -> Result<&'d [u8]> {
        if size == 0 {
            return Ok(&[]);
        }
        let (start, room) = self.place(address, field)?;
        if size > room {
            let why = format_args!("{size:#x} bytes at {address:#x} are past the end of the segment");
            return Err(malformed(field, why));
        }
        self.data
            .read_bytes_at(start, size)
            .map_err(|()| malformed(field, format_args!("{size:#x} bytes at {start:#x} are past the end of the file")))
    }

    fn table_at<T: Pod>(&self, address: u64, size: u64, field: &str) -> Result<&'d [T]> {
        let each = std::mem::size_of::<T>() as u64;
        let bytes = self.at(address, size / each * each, field)?;
        object::pod::slice_from_all_bytes(bytes).map_err(|()| malformed(field, "not a whole number of entries"))
    }

    fn one_at<T: Pod>(&self, address: u64, field: &str) -> Result<&'d T> {
        let found: &[T] = self.table_at(address, std::mem::size_of::<T>() as u64, field)?;
        Ok(&found[0])
    }

    fn notes(&self) -> Result<Vec<Note>> {
        let endian = self.endian;
        let mut found = Vec::new();
        for segment in self.segments {
            if let Some(notes) = segment.notes(endian, self.data).map_err(|why| malformed("PT_NOTE", why))? {
                Self::push_notes(endian, notes, &mut found)?;
            }
        }
        // Linkers other than GNU's leave some out of the program headers. Without section headers they are not there.
        for section in self.section_headers().unwrap_or_default() {
            if self.segments.iter().any(|segment| self.is_note_of(segment, section)) {
                continue;
            }
            if let Some(notes) = section.notes(endian, self.data).map_err(|why| malformed("SHT_NOTE", why))? {
                Self::push_notes(endian, notes, &mut found)?;
            }
        }
        Ok(found)
    }

    fn is_note_of(&self, segment: &E::ProgramHeader, section: &E::SectionHeader) -> bool {
        let endian = self.endian;
        let (start, size) = segment.file_range(endian);
        let at: u64 = section.sh_offset(endian).into();
        segment.p_type(endian) == elf::PT_NOTE && at >= start && at - start < size
    }

    fn push_notes(endian: Endianness, mut notes: NoteIterator<'d, E>, into: &mut Vec<Note>) -> Result<()> {
        while let Some(note) = notes.next().map_err(|why| malformed("a note", why))? {
            into.push(Note {
                name: note.name().to_vec(),
                kind: note.n_type(endian).0,
                description: note.desc().to_vec(),
            });
        }
        Ok(())
    }
}

fn is_name(tag: elf::DynamicTag) -> bool {
    matches!(
        tag,
        elf::DT_NEEDED | elf::DT_SONAME | elf::DT_RPATH | elf::DT_RUNPATH | elf::DT_AUXILIARY | elf::DT_FILTER
    )
}

fn short_name<'d, R: ReadRef<'d>>(strings: StringTable<'d, R>, offset: u64) -> Result<&'d [u8]> {
    u32::try_from(offset)
        .ok()
        .and_then(|offset| strings.get(offset).ok())
        .filter(|name| name.len() < STRING_MAX)
        .ok_or_else(|| malformed("DT_STRTAB", format_args!("the name at {offset:#x} does not end in it")))
}
