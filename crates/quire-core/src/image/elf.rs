//! ELF files. What runs is described by the program headers and the dynamic section; section headers are read only by
//! `sections`, and where nothing else can tell: symbols that are not dynamic, relocatable objects, static executables.

use std::collections::HashMap;

use object::elf::{self, FileHeader32, FileHeader64};
use object::read::elf::{Dyn, FileHeader, ProgramHeader, Rel, Rela, SectionHeader, Sym};
use object::read::elf::{HashTable, NoteIterator, RelrIterator};
use object::{Endianness, FileKind, Pod, ReadRef, StringTable};

use super::{Window, malformed};
use crate::Result;

/// A name in a dynamic section longer than this is none (`PATH_MAX` bounds each folder of a search path).
const STRING_MAX: usize = 4096;
/// A dynamic section with more entries than this was made to waste time.
const DYNAMIC_MAX: usize = 1 << 16;
const VERSION_NAMES_MAX: usize = 1 << 16;

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

/// The notes of all `PT_NOTE` segments; of a file without program headers, of its sections.
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
        headers
            .iter()
            .enumerate()
            .map(|(index, section)| {
                let name = section
                    .name(endian, strings)
                    .map_err(|why| malformed(format_args!("sh_name of section {index}"), why))?;
                Ok(Section {
                    name: name.to_vec(),
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
        let mut found = Vec::with_capacity(entries.len());
        for entry in entries {
            let (tag, value) = (entry.tag(self.endian), entry.val(self.endian));
            let name = match strings {
                Some(strings) if is_name(tag) => Some(short_name(strings, value)?.to_vec()),
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

    fn dynamic_symbols(&self) -> Result<Vec<Symbol>> {
        let Some(places) = self.places()? else { return Ok(Vec::new()) };
        let Some(table) = places.get(elf::DT_SYMTAB) else { return Ok(Vec::new()) };
        let count = self.dynamic_symbol_count(&places, table)?;
        if count == 0 {
            return Ok(Vec::new());
        }
        let each = std::mem::size_of::<E::Sym>() as u64;
        let symbols: &[E::Sym] = self.table_at(table, count * each, "DT_SYMTAB")?;
        let strings = self.dynamic_strings_whole(&places)?;
        let versions = self.versions(&places, strings, count)?;
        symbols
            .iter()
            .enumerate()
            .map(|(index, symbol)| {
                let version = versions.of(index);
                self.symbol(index, symbol, strings, None, version)
            })
            .collect()
    }

    fn symbol(
        &self,
        index: usize,
        symbol: &E::Sym,
        strings: StringTable<'d, &'d [u8]>,
        section: Option<u32>,
        version: Option<Version>,
    ) -> Result<Symbol> {
        let name = match symbol.st_name(self.endian) {
            0 => &[],
            _ => symbol
                .name(self.endian, strings)
                .map_err(|why| malformed(format_args!("st_name of symbol {index}"), why))?,
        };
        Ok(Symbol {
            name: name.to_vec(),
            value: symbol.st_value(self.endian).into(),
            size: symbol.st_size(self.endian).into(),
            kind: symbol.st_type().0,
            binding: symbol.st_bind().0,
            other: symbol.st_other().0,
            section: section.unwrap_or_else(|| symbol.st_shndx(self.endian).0.into()),
            version,
        })
    }

    /// Nothing in the dynamic section says how many symbols there are. A section header of the same table does; without
    /// one, a hash table counts those that it finds, and relocations those that they name.
    fn dynamic_symbol_count(&self, places: &Places, table: u64) -> Result<u64> {
        let each = std::mem::size_of::<E::Sym>() as u64;
        let endian = self.endian;
        if let Ok(sections) = self.section_headers() {
            let same = sections
                .iter()
                .find(|section| section.sh_type(endian) == elf::SHT_DYNSYM && section.sh_addr(endian).into() == table);
            let room = self.place(table, "DT_SYMTAB")?.1;
            if let Some(size) = same.map(|section| section.sh_size(endian).into()).filter(|size| *size <= room) {
                return Ok(size / each);
            }
        }
        let mut count = 0;
        if let Some(address) = places.get(elf::DT_HASH) {
            let room = self.place(address, "DT_HASH")?.1;
            let head: &[object::U32<Endianness>] = self.table_at(address, 8, "DT_HASH")?;
            let [buckets, chains] = [head[0].get(endian), head[1].get(endian)].map(u64::from);
            let bytes = self.at(address, room.min(8 + 4 * (buckets + chains)), "DT_HASH")?;
            let hash = HashTable::<E>::parse(endian, bytes).map_err(|why| malformed("DT_HASH", why))?;
            count = u64::from(hash.symbol_table_length());
        }
        if let Some(address) = places.get(elf::DT_GNU_HASH) {
            count = count.max(self.gnu_hash_count(address)?);
        }
        for relocation in self.dynamic_relocations(places)? {
            count = count.max(u64::from(relocation.symbol) + 1);
        }
        Ok(count)
    }

    fn gnu_hash_count(&self, address: u64) -> Result<u64> {
        let field = "DT_GNU_HASH";
        let word = std::mem::size_of::<E::Word>() as u64;
        let head: &[object::U32<Endianness>] = self.table_at(address, 16, field)?;
        let [buckets, base, blooms] = [0, 1, 2].map(|index: usize| u64::from(head[index].get(self.endian)));
        let buckets_at = 16 + blooms * word;
        let at = |inside: u64| address.checked_add(inside).ok_or_else(|| malformed(field, "its size overflows"));
        let table: &[object::U32<Endianness>] = self.table_at(at(buckets_at)?, 4 * buckets, field)?;
        let last = table.iter().map(|bucket| u64::from(bucket.get(self.endian))).max().unwrap_or(0);
        let Some(mut index) = last.checked_sub(base).filter(|_| last != 0) else { return Ok(base) };
        let chains_at = buckets_at + 4 * buckets;
        // Only the last chain is followed, in pieces: most are short.
        loop {
            let start = at(chains_at + 4 * index)?;
            let room = self.place(start, field)?.1;
            let piece: &[object::U32<Endianness>] = self.table_at(start, room.min(4096), field)?;
            if piece.is_empty() {
                return Err(malformed(field, "its last chain does not end"));
            }
            if let Some(end) = piece.iter().position(|value| value.get(self.endian) & 1 != 0) {
                return Ok(base + index + end as u64 + 1);
            }
            index += piece.len() as u64;
        }
    }

    fn static_symbols(&self) -> Result<Vec<Symbol>> {
        let endian = self.endian;
        let sections = self.section_headers()?;
        let Some((index, section)) =
            sections.iter().enumerate().find(|(_, section)| section.sh_type(endian) == elf::SHT_SYMTAB)
        else {
            return Ok(Vec::new());
        };
        let symbols: &[E::Sym] =
            section.data_as_array(endian, self.data).map_err(|why| malformed("the symbol table", why))?;
        let names = sections
            .get(section.sh_link(endian) as usize)
            .ok_or_else(|| malformed("sh_link of the symbol table", "there is no such section"))?;
        let bytes = names.data(endian, self.data).map_err(|why| malformed("the names of symbols", why))?;
        let strings = StringTable::new(bytes, 0, bytes.len() as u64);
        let extended = sections
            .iter()
            .find(|other| other.sh_type(endian) == elf::SHT_SYMTAB_SHNDX && other.sh_link(endian) as usize == index);
        let extended: &[object::U32<Endianness>] = match extended {
            Some(other) => other.data_as_array(endian, self.data).map_err(|why| malformed("SHT_SYMTAB_SHNDX", why))?,
            None => &[],
        };
        symbols
            .iter()
            .enumerate()
            .map(|(index, symbol)| {
                let section = if symbol.st_shndx(endian) == elf::SHN_XINDEX {
                    extended.get(index).map(|section| section.get(endian))
                } else {
                    None
                };
                self.symbol(index, symbol, strings, section, None)
            })
            .collect()
    }

    fn versions(&self, places: &Places, strings: StringTable<'d, &'d [u8]>, count: u64) -> Result<Versions<'d>> {
        let Some(table) = places.get(elf::DT_VERSYM) else { return Ok(Versions::default()) };
        let indices: &[object::U16<Endianness>] = self.table_at(table, 2 * count, "DT_VERSYM")?;
        let mut names = HashMap::new();
        let endian = self.endian;
        let step = |at: u64, by: u32, field: &str| {
            at.checked_add(by.into()).ok_or_else(|| malformed(field, "an offset overflows"))
        };
        let name = |offset: u32, field: &str| {
            strings.get(offset).map_err(|()| malformed(field, format_args!("no name at {offset:#x} of DT_STRTAB")))
        };
        let mut entries = 0;
        let mut one_more = |field: &str| {
            entries += 1;
            if entries > VERSION_NAMES_MAX { Err(malformed(field, "too many entries")) } else { Ok(()) }
        };
        if let Some(mut at) = places.get(elf::DT_VERDEF) {
            let field = "DT_VERDEF";
            for _ in 0..places.size(elf::DT_VERDEFNUM) {
                one_more(field)?;
                let definition: &elf::Verdef<Endianness> = self.one_at(at, field)?;
                if definition.vd_cnt.get(endian) > 0 {
                    let first: &elf::Verdaux<Endianness> =
                        self.one_at(step(at, definition.vd_aux.get(endian), field)?, field)?;
                    let text = name(first.vda_name.get(endian), field)?;
                    names.insert(definition.vd_ndx.get(endian).0 & 0x7fff, (text, None));
                }
                match definition.vd_next.get(endian) {
                    0 => break,
                    next => at = step(at, next, field)?,
                }
            }
        }
        if let Some(mut at) = places.get(elf::DT_VERNEED) {
            let field = "DT_VERNEED";
            for _ in 0..places.size(elf::DT_VERNEEDNUM) {
                one_more(field)?;
                let need: &elf::Verneed<Endianness> = self.one_at(at, field)?;
                let library = name(need.vn_file.get(endian), field)?;
                let mut inner = step(at, need.vn_aux.get(endian), field)?;
                for _ in 0..need.vn_cnt.get(endian) {
                    one_more(field)?;
                    let version: &elf::Vernaux<Endianness> = self.one_at(inner, field)?;
                    let text = name(version.vna_name.get(endian), field)?;
                    names.insert(version.vna_other.get(endian).0 & 0x7fff, (text, Some(library)));
                    match version.vna_next.get(endian) {
                        0 => break,
                        next => inner = step(inner, next, field)?,
                    }
                }
                match need.vn_next.get(endian) {
                    0 => break,
                    next => at = step(at, next, field)?,
                }
            }
        }
        Ok(Versions { indices: indices.iter().map(|index| index.get(endian)).collect(), names })
    }

    fn one_at<T: Pod>(&self, address: u64, field: &str) -> Result<&'d T> {
        let found: &[T] = self.table_at(address, std::mem::size_of::<T>() as u64, field)?;
        Ok(&found[0])
    }

    fn relocations(&self) -> Result<Vec<Relocation>> {
        match self.places()? {
            Some(places) => self.dynamic_relocations(&places),
            None => self.section_relocations(),
        }
    }

    fn dynamic_relocations(&self, places: &Places) -> Result<Vec<Relocation>> {
        let mut found = Vec::new();
        let plt = places.get(elf::DT_JMPREL).map(|at| (at, places.size(elf::DT_PLTRELSZ)));
        if let Some(address) = places.get(elf::DT_RELR) {
            self.relative_words(address, places.size(elf::DT_RELRSZ), &mut found)?;
        }
        for (table, size, with_addends, field) in
            [(elf::DT_REL, elf::DT_RELSZ, false, "DT_REL"), (elf::DT_RELA, elf::DT_RELASZ, true, "DT_RELA")]
        {
            let Some(address) = places.get(table) else { continue };
            let mut size = places.size(size);
            // Some linkers count the slots of functions in, at the end.
            if let Some((at, plt_size)) = plt {
                if at >= address && plt_size <= size && at - address == size - plt_size {
                    size -= plt_size;
                }
            }
            self.table_of_relocations(address, size, with_addends, RelocationTable::Eager, field, &mut found)?;
        }
        if let Some((address, size)) = plt {
            let with_addends = places.get(elf::DT_PLTREL) == Some(elf::DT_RELA.0 as u64);
            self.table_of_relocations(address, size, with_addends, RelocationTable::Plt, "DT_JMPREL", &mut found)?;
        }
        Ok(found)
    }

    fn table_of_relocations(
        &self,
        address: u64,
        size: u64,
        with_addends: bool,
        table: RelocationTable,
        field: &str,
        into: &mut Vec<Relocation>,
    ) -> Result<()> {
        if with_addends {
            self.push_rela(self.table_at(address, size, field)?, table, into);
        } else {
            self.push_rel(self.table_at(address, size, field)?, table, into);
        }
        Ok(())
    }

    fn push_rela(&self, entries: &[E::Rela], table: RelocationTable, into: &mut Vec<Relocation>) {
        let (endian, mips) = (self.endian, self.header.is_mips64el(self.endian));
        into.extend(entries.iter().map(|entry| Relocation {
            table,
            offset: entry.r_offset(endian).into(),
            kind: entry.r_type(endian, mips).0,
            symbol: entry.r_sym(endian, mips),
            addend: Some(entry.r_addend(endian).into()),
        }));
    }

    fn push_rel(&self, entries: &[E::Rel], table: RelocationTable, into: &mut Vec<Relocation>) {
        let endian = self.endian;
        into.extend(entries.iter().map(|entry| Relocation {
            table,
            offset: entry.r_offset(endian).into(),
            kind: entry.r_type(endian).0,
            symbol: entry.r_sym(endian),
            addend: None,
        }));
    }

    fn relative_words(&self, address: u64, size: u64, into: &mut Vec<Relocation>) -> Result<()> {
        let endian = self.endian;
        let words: &[E::Relr] = self.table_at(address, size, "DT_RELR, DT_RELRSZ")?;
        // A bit map of eight bytes names 63 words. Each has its addend in the file, which bounds how many can be meant.
        let loaded: u64 = self
            .segments
            .iter()
            .filter(|segment| segment.p_type(endian) == elf::PT_LOAD)
            .fold(0, |sum, segment| sum.saturating_add(segment.p_filesz(endian).into()));
        let len = self.data.len().unwrap_or(0);
        let most = loaded.min(len) / std::mem::size_of::<E::Word>() as u64;
        for offset in RelrIterator::<E>::new(endian, words) {
            if into.len() as u64 >= most {
                return Err(malformed("DT_RELR", "it names more words than the file has"));
            }
            let table = RelocationTable::Relative;
            into.push(Relocation { table, offset: offset.into(), kind: 0, symbol: 0, addend: None });
        }
        Ok(())
    }

    fn section_relocations(&self) -> Result<Vec<Relocation>> {
        let endian = self.endian;
        let is_object = self.header.e_type(endian) == elf::ET_REL;
        let mut found = Vec::new();
        for (index, section) in self.section_headers()?.iter().enumerate() {
            // Those that a linker has left in an executable for other tools are not for loading it.
            if !is_object && !section.sh_flags(endian).contains(elf::SHF_ALLOC) {
                continue;
            }
            let table =
                if is_object { RelocationTable::Section(section.sh_info(endian)) } else { RelocationTable::Eager };
            let wrong = |why: object::read::Error| malformed(format_args!("relocations in section {index}"), why);
            if let Some((entries, _)) = section.rela(endian, self.data).map_err(wrong)? {
                self.push_rela(entries, table, &mut found);
            }
            if let Some((entries, _)) = section.rel(endian, self.data).map_err(wrong)? {
                self.push_rel(entries, table, &mut found);
            }
        }
        Ok(found)
    }

    fn notes(&self) -> Result<Vec<Note>> {
        let endian = self.endian;
        let mut found = Vec::new();
        for segment in self.segments {
            if let Some(notes) = segment.notes(endian, self.data).map_err(|why| malformed("PT_NOTE", why))? {
                Self::push_notes(endian, notes, &mut found)?;
            }
        }
        if self.segments.is_empty() {
            for section in self.section_headers()? {
                if let Some(notes) = section.notes(endian, self.data).map_err(|why| malformed("SHT_NOTE", why))? {
                    Self::push_notes(endian, notes, &mut found)?;
                }
            }
        }
        Ok(found)
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

#[derive(Default)]
struct Versions<'d> {
    indices: Vec<u16>,
    names: HashMap<u16, (&'d [u8], Option<&'d [u8]>)>,
}

impl Versions<'_> {
    fn of(&self, symbol: usize) -> Option<Version> {
        let index = *self.indices.get(symbol)?;
        // 0 is local and 1 has no version; a definition of the object's own name has that index too.
        let (name, library) = self.names.get(&(index & 0x7fff)).filter(|_| index & 0x7fff > 1)?;
        Some(Version { name: name.to_vec(), library: library.map(<[u8]>::to_vec), is_hidden: index & 0x8000 != 0 })
    }
}
