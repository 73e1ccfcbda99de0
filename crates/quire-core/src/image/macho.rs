//! Mach-O files: programs and libraries of macOS, alone or several in a universal file.

use std::collections::HashSet;

use object::macho::{self, FatArch32, FatArch64, MachHeader32, MachHeader64};
use object::read::macho::{
    Bind, FatArch, Fixup as Chained, LoadCommandData, LoadCommandVariant, MachHeader, MachOFatFile, Nlist,
    Section as _, Segment as _,
};
use object::{BigEndian, Endianness, FileKind, ReadRef};

use super::{Names, Window, malformed};
use crate::Result;

/// More programs than any file has; Java classes share the magic, and in them the number is a version of at least 45.
const MEMBERS_MAX: u32 = 44;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub cpu_type: u32,
    pub cpu_subtype: u32,
    pub offset: u64,
    pub size: u64,
    /// Of the alignment, the logarithm.
    pub align: u32,
}

/// How a library is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    Plain,
    Weak,
    Reexported,
    Upward,
    Lazy,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub is_64: bool,
    pub is_little_endian: bool,
    pub cpu_type: u32,
    pub cpu_subtype: u32,
    pub kind: u32,
    pub flags: u32,
    pub name: Option<Vec<u8>>,
    pub needed: Vec<(Vec<u8>, Need)>,
    pub run_paths: Vec<Vec<u8>>,
    pub linker: Option<Vec<u8>>,
    /// Offset in the file of the first instruction.
    pub entry: Option<u64>,
    pub uuid: Option<[u8; 16]>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    pub name: Vec<u8>,
    pub address: u64,
    pub memory_size: u64,
    pub offset: u64,
    pub file_size: u64,
    pub protection: u32,
    pub flags: u32,
    pub sections: Vec<Section>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    pub name: Vec<u8>,
    pub segment: Vec<u8>,
    pub address: u64,
    pub size: u64,
    pub offset: u32,
    /// Of the alignment, the logarithm.
    pub align: u32,
    pub flags: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Symbol {
    pub name: Vec<u8>,
    pub kind: u8,
    pub section: u8,
    pub description: u16,
    pub value: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    pub name: Vec<u8>,
    pub flags: u64,
    /// Relative to the beginning of the image; of a resolver's stub; 0 for what another library has.
    pub address: u64,
    /// Number of that library, and the name there if it is another.
    pub forward: Option<(u64, Vec<u8>)>,
}

/// What becomes of a word when the image is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FixupKind {
    /// The distance from the preferred address is added.
    Rebase,
    Bind,
    /// Bound at the first call.
    LazyBind,
    /// Bound to whichever definition of the name comes first.
    WeakBind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fixup {
    pub kind: FixupKind,
    pub address: u64,
    pub name: Option<Vec<u8>>,
    /// Number of the library, from 1 in the order of the header; what is not positive has a meaning of its own.
    pub library: i32,
    pub addend: i64,
}

macro_rules! ask {
    ($window:expr, $view:ident => $body:expr) => {
        $window.ask(|data| match FileKind::parse(data) {
            Ok(FileKind::MachO32) => {
                let $view = View::<MachHeader32<Endianness>, _>::new(data)?;
                $body
            }
            Ok(FileKind::MachO64) => {
                let $view = View::<MachHeader64<Endianness>, _>::new(data)?;
                $body
            }
            _ => Err(malformed("magic", "the first bytes are not those of a Mach-O file")),
        })
    };
}

/// The programs in a universal file; None if the file is none, as the classes of Java, which begin with the same bytes.
///
/// # Errors
/// Malformed: the list is cut, or a program is not within the file, or overlaps another or the list; Page, as
/// everywhere here.
pub fn members(window: &Window) -> Result<Option<Vec<Member>>> {
    window.ask(|data| {
        let head: &macho::FatHeader = data.read_at(0).map_err(|()| malformed("fat_header", "the file is too short"))?;
        let count = head.nfat_arch.get(BigEndian);
        if count == 0 || count > MEMBERS_MAX {
            return Ok(None);
        }
        let found = match head.magic.get(BigEndian) {
            macho::FAT_MAGIC => fat::<FatArch32, _>(data)?,
            macho::FAT_MAGIC_64 => fat::<FatArch64, _>(data)?,
            _ => return Ok(None),
        };
        let mut spans: Vec<(u64, u64)> = vec![(0, 8 + 20 * u64::from(count))];
        for (index, member) in found.iter().enumerate() {
            let field = format!("fat_arch {index}");
            let end = member.offset.checked_add(member.size).filter(|end| *end <= window.size());
            let end = end.ok_or_else(|| malformed(&field, "it is not within the file"))?;
            if spans.iter().any(|(start, stop)| member.offset < *stop && *start < end) {
                return Err(malformed(&field, "it overlaps another, or the list"));
            }
            spans.push((member.offset, end));
        }
        Ok(Some(found))
    })
}

fn fat<'d, F: FatArch, R: ReadRef<'d>>(data: R) -> Result<Vec<Member>> {
    let file = MachOFatFile::<F>::parse(data).map_err(|why| malformed("nfat_arch", why))?;
    let members = file.arches().iter().map(|arch| Member {
        cpu_type: arch.cputype().0,
        cpu_subtype: arch.cpusubtype().0,
        offset: arch.offset().into(),
        size: arch.size().into(),
        align: arch.align(),
    });
    Ok(members.collect())
}

/// # Errors
/// Malformed: the header or a load command is cut, or a name in one does not end.
pub fn header(window: &Window) -> Result<Header> {
    ask!(window, view => view.describe())
}

/// # Errors
/// Malformed: a load command is cut.
pub fn segments(window: &Window) -> Result<Vec<Segment>> {
    ask!(window, view => view.segments())
}

/// # Errors
/// Malformed: the symbol table or its names lie outside of the file.
pub fn symbols(window: &Window) -> Result<Vec<Symbol>> {
    ask!(window, view => view.symbols())
}

/// What the trie of exports has.
///
/// # Errors
/// Malformed: the trie lies outside of the file, is cut, or comes back to a node.
pub fn exports(window: &Window) -> Result<Vec<Export>> {
    ask!(window, view => view.exports())
}

/// In the order in which dyld does them: rebases, then binds, then those that may wait; chained ones by segment.
///
/// # Errors
/// Malformed: what tells of them lies outside of the file, names no segment, or more places than the file has words.
pub fn fixups(window: &Window) -> Result<Vec<Fixup>> {
    ask!(window, view => view.fixups())
}

struct View<'d, M: MachHeader<Endian = Endianness>, R: ReadRef<'d>> {
    data: R,
    header: &'d M,
    endian: Endianness,
}

type Command<'d> = LoadCommandData<'d, Endianness>;

impl<'d, M: MachHeader<Endian = Endianness>, R: ReadRef<'d>> View<'d, M, R> {
    fn new(data: R) -> Result<Self> {
        let header = M::parse(data, 0).map_err(|why| malformed("mach_header", why))?;
        let endian = header.endian().map_err(|why| malformed("magic", why))?;
        Ok(Self { data, header, endian })
    }

    fn commands(&self) -> Result<Vec<Command<'d>>> {
        let field = "ncmds, sizeofcmds";
        let mut commands = self.header.load_commands(self.endian, self.data, 0).map_err(|why| malformed(field, why))?;
        let mut found = Vec::new();
        while let Some(command) = commands.next().map_err(|why| malformed(field, why))? {
            found.push(command);
        }
        Ok(found)
    }

    fn describe(&self) -> Result<Header> {
        let (header, endian) = (self.header, self.endian);
        let mut found = Header {
            is_64: header.is_type_64(),
            is_little_endian: header.is_little_endian(),
            cpu_type: header.cputype(endian).0,
            cpu_subtype: header.cpusubtype(endian).0,
            kind: header.filetype(endian).0,
            flags: header.flags(endian).0,
            name: None,
            needed: Vec::new(),
            run_paths: Vec::new(),
            linker: None,
            entry: None,
            uuid: None,
        };
        for (index, command) in self.commands()?.into_iter().enumerate() {
            let wrong = |why: object::read::Error| malformed(format_args!("load command {index}"), why);
            let text = |name| command.string(endian, name).map(<[u8]>::to_vec).map_err(wrong);
            match command.variant().map_err(wrong)? {
                LoadCommandVariant::IdDylib(library) => found.name = Some(text(library.dylib.name)?),
                LoadCommandVariant::Dylib(library) => {
                    let need = match command.cmd() {
                        macho::LC_LOAD_WEAK_DYLIB => Need::Weak,
                        macho::LC_REEXPORT_DYLIB => Need::Reexported,
                        macho::LC_LOAD_UPWARD_DYLIB => Need::Upward,
                        macho::LC_LAZY_LOAD_DYLIB => Need::Lazy,
                        _ => Need::Plain,
                    };
                    found.needed.push((text(library.dylib.name)?, need));
                }
                LoadCommandVariant::LoadDylinker(linker) => found.linker = Some(text(linker.name)?),
                LoadCommandVariant::Rpath(path) => found.run_paths.push(text(path.path)?),
                LoadCommandVariant::EntryPoint(entry) => found.entry = Some(entry.entryoff.get(endian)),
                LoadCommandVariant::Uuid(uuid) => found.uuid = Some(uuid.uuid),
                _ => {}
            }
        }
        Ok(found)
    }

    fn raw_segments(&self) -> Result<Vec<(&'d M::Segment, &'d [u8])>> {
        let mut found = Vec::new();
        for (index, command) in self.commands()?.into_iter().enumerate() {
            let segment = M::Segment::from_command(command)
                .map_err(|why| malformed(format_args!("load command {index}"), why))?;
            found.extend(segment);
        }
        Ok(found)
    }

    fn segments(&self) -> Result<Vec<Segment>> {
        let endian = self.endian;
        self.raw_segments()?
            .into_iter()
            .map(|(segment, rest)| {
                let sections = segment
                    .sections(endian, rest)
                    .map_err(|why| malformed(format_args!("nsects of {}", lossy(segment.name())), why))?;
                Ok(Segment {
                    name: segment.name().to_vec(),
                    address: segment.vmaddr(endian).into(),
                    memory_size: segment.vmsize(endian).into(),
                    offset: segment.fileoff(endian).into(),
                    file_size: segment.filesize(endian).into(),
                    protection: segment.initprot(endian).0,
                    flags: segment.flags(endian).0,
                    sections: sections
                        .iter()
                        .map(|section| Section {
                            name: section.name().to_vec(),
                            segment: section.segment_name().to_vec(),
                            address: section.addr(endian).into(),
                            size: section.size(endian).into(),
                            offset: section.offset(endian),
                            align: section.align(endian),
                            flags: section.flags(endian).0,
                        })
                        .collect(),
                })
            })
            .collect()
    }

    fn symbols(&self) -> Result<Vec<Symbol>> {
        let endian = self.endian;
        for command in self.commands()? {
            let Some(table) = command.symtab().map_err(|why| malformed("LC_SYMTAB", why))? else { continue };
            let read = |offset: u32, size: u64, field: &str| {
                let bytes = self.data.read_bytes_at(offset.into(), size);
                bytes.map_err(|()| malformed(field, "past the end of the file"))
            };
            let each = size_of::<M::Nlist>() as u64;
            let bytes = read(table.symoff.get(endian), u64::from(table.nsyms.get(endian)) * each, "symoff, nsyms")?;
            let entries: &[M::Nlist] = object::pod::slice_from_all_bytes(bytes)
                .map_err(|()| malformed("nsyms", "not a whole number of entries"))?;
            let text = read(table.stroff.get(endian), table.strsize.get(endian).into(), "stroff, strsize")?;
            let strings = object::StringTable::new(text, 0, text.len() as u64);
            let mut names = Names::of(self.data);
            return entries
                .iter()
                .enumerate()
                .map(|(index, symbol)| {
                    let name = match symbol.n_strx(endian) {
                        0 => &[],
                        _ => symbol
                            .name(endian, strings)
                            .map_err(|why| malformed(format_args!("n_strx of symbol {index}"), why))?,
                    };
                    Ok(Symbol {
                        name: names.take(name, "n_strx")?,
                        kind: symbol.n_type().0,
                        section: symbol.n_sect(),
                        description: symbol.n_desc(endian).0,
                        value: symbol.n_value(endian).into(),
                    })
                })
                .collect();
        }
        Ok(Vec::new())
    }

    fn exports(&self) -> Result<Vec<Export>> {
        for command in self.commands()? {
            let wrong = |why: object::read::Error| malformed("the exports trie", why);
            let bytes = if let Some(info) = command.dyld_info().map_err(wrong)? {
                info.export_data(self.endian, self.data).map_err(wrong)?
            } else if let Some(trie) = command.dyld_exports_trie().map_err(wrong)? {
                trie.data(self.endian, self.data).map_err(wrong)?
            } else {
                continue;
            };
            if !bytes.is_empty() {
                return Trie { bytes, names: Names::of(self.data) }.walk();
            }
        }
        Ok(Vec::new())
    }

    fn fixups(&self) -> Result<Vec<Fixup>> {
        let segments = self.raw_segments()?;
        // Every place is a word of the file; opcodes may repeat, so that a few bytes could tell of more.
        let most = self.data.len().unwrap_or(0) / 4;
        let mut found =
            Found { segments: segments.iter().map(|each| self.span(each.0)).collect(), most, fixups: Vec::new() };
        let mut names = Names::of(self.data);
        for command in self.commands()? {
            let wrong = |why: object::read::Error| malformed("LC_DYLD_INFO", why);
            if let Some(info) = command.dyld_info().map_err(wrong)? {
                let word = M::pointer_size();
                for each in info.rebases(self.endian, self.data, word).map_err(wrong)? {
                    let each = each.map_err(wrong)?;
                    found.push(FixupKind::Rebase, each.segment_index.into(), each.segment_offset, None, 0, 0)?;
                }
                let (endian, data) = (self.endian, self.data);
                for (kind, binds) in [
                    (FixupKind::Bind, info.binds(endian, data, word).map_err(wrong)?),
                    (FixupKind::WeakBind, info.weak_binds(endian, data, word).map_err(wrong)?),
                    (FixupKind::LazyBind, info.lazy_binds(endian, data, word).map_err(wrong)?),
                ] {
                    for each in binds {
                        let Bind { segment_index, segment_offset, dylib, symbol, addend, .. } = each.map_err(wrong)?;
                        let name = names.take(symbol, "LC_DYLD_INFO")?;
                        found.push(kind, segment_index.into(), segment_offset, Some(name), dylib.0, addend)?;
                    }
                }
            }
            let wrong = |why: object::read::Error| malformed("LC_DYLD_CHAINED_FIXUPS", why);
            if let Some(command) = command.dyld_chained_fixups().map_err(wrong)? {
                let fixups = command.chained_fixups(self.endian, self.data).map_err(wrong)?;
                let mut imports = Vec::new();
                for import in fixups.imports(self.endian).map_err(wrong)? {
                    imports.push(import.map_err(wrong)?);
                }
                let base = segments.iter().find(|each| each.0.name() == b"__TEXT");
                let base = base.map_or(0, |each| each.0.vmaddr(self.endian).into());
                for starts in fixups.segments(self.endian).map_err(wrong)? {
                    let starts = starts.map_err(wrong)?;
                    let index = starts.index() as usize;
                    let field = "LC_DYLD_CHAINED_FIXUPS";
                    let segment = segments
                        .get(index)
                        .ok_or_else(|| malformed(field, format_args!("there is no segment {index}")))?
                        .0;
                    let bytes = segment
                        .data(self.endian, self.data)
                        .map_err(|()| malformed(field, format_args!("segment {index} is not in the file")))?;
                    for each in starts.fixups(self.endian, base, bytes) {
                        let (offset, fixup) = each.map_err(wrong)?;
                        let Chained::Bind(bind) = fixup else {
                            found.push(FixupKind::Rebase, index, offset, None, 0, 0)?;
                            continue;
                        };
                        let import = imports
                            .get(bind.ordinal as usize)
                            .ok_or_else(|| malformed(field, format_args!("there is no import {}", bind.ordinal)))?;
                        let name = names.take(import.name, field)?;
                        let addend = import.addend.wrapping_add(bind.addend.into());
                        found.push(FixupKind::Bind, index, offset, Some(name), import.dylib.0, addend)?;
                    }
                }
            }
        }
        Ok(found.fixups)
    }

    /// Address, and size in memory.
    fn span(&self, segment: &M::Segment) -> (u64, u64) {
        (segment.vmaddr(self.endian).into(), segment.vmsize(self.endian).into())
    }
}

fn lossy(name: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(name)
}

struct Found {
    segments: Vec<(u64, u64)>,
    most: u64,
    fixups: Vec<Fixup>,
}

impl Found {
    fn push(
        &mut self,
        kind: FixupKind,
        segment: usize,
        offset: u64,
        name: Option<Vec<u8>>,
        library: i32,
        addend: i64,
    ) -> Result<()> {
        let field = format_args!("fixup {}", self.fixups.len());
        let place = self.segments.get(segment).filter(|(_, size)| offset < *size);
        let address = place.and_then(|(address, _)| address.checked_add(offset));
        let Some(address) = address else {
            return Err(malformed(field, format_args!("{offset:#x} of segment {segment} is in no segment")));
        };
        if self.fixups.len() as u64 >= self.most {
            return Err(malformed(field, "there are more than the file has words"));
        }
        self.fixups.push(Fixup { kind, address, name, library, addend });
        Ok(())
    }
}

/// A walk of our own, because that of `object` follows a node as often as it is pointed to: a trie whose nodes share their
/// children takes it exponential time.
struct Trie<'d> {
    bytes: &'d [u8],
    names: Names,
}

impl Trie<'_> {
    fn walk(mut self) -> Result<Vec<Export>> {
        let mut found = Vec::new();
        let mut seen = HashSet::from([0]);
        let mut todo = vec![(0, Vec::new())];
        while let Some((mut at, name)) = todo.pop() {
            let terminal = self.number(&mut at)?;
            if terminal != 0 {
                let mut inside = at;
                found.push(self.export(&mut inside, &name)?);
                at = usize::try_from(terminal)
                    .ok()
                    .and_then(|size| at.checked_add(size))
                    .ok_or_else(|| wrong("it overflows"))?;
            }
            let children = *self.bytes.get(at).ok_or_else(|| wrong("a node is cut"))?;
            at += 1;
            let first = todo.len();
            for _ in 0..children {
                let edge = self.text(&mut at)?;
                let child = self.number(&mut at)?;
                let child = usize::try_from(child).map_err(|_| wrong("a child is outside of it"))?;
                if !seen.insert(child) {
                    return Err(wrong("it comes to a node twice"));
                }
                let mut longer = name.clone();
                longer.extend(edge);
                todo.push((child, self.names.take(&longer, "the exports trie")?));
            }
            todo[first..].reverse();
        }
        Ok(found)
    }

    fn export(&mut self, at: &mut usize, name: &[u8]) -> Result<Export> {
        let flags = self.number(at)?;
        let name = name.to_vec();
        if flags & macho::EXPORT_SYMBOL_FLAGS_REEXPORT.0 != 0 {
            let library = self.number(at)?;
            let other = self.text(at)?.to_vec();
            return Ok(Export { name, flags, address: 0, forward: Some((library, other)) });
        }
        Ok(Export { name, flags, address: self.number(at)?, forward: None })
    }

    fn text(&self, at: &mut usize) -> Result<&[u8]> {
        let rest = self.bytes.get(*at..).unwrap_or_default();
        let end = rest.iter().position(|byte| *byte == 0).ok_or_else(|| wrong("a name does not end"))?;
        *at += end + 1;
        Ok(&rest[..end])
    }

    /// An unsigned LEB128.
    fn number(&self, at: &mut usize) -> Result<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.bytes.get(*at).ok_or_else(|| wrong("a node is cut"))?;
            *at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(wrong("a number is too long"))
    }
}

fn wrong(why: &str) -> crate::Error {
    malformed("the exports trie", why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walked(bytes: &[u8]) -> Result<Vec<Export>> {
        Trie { bytes, names: Names::of(bytes) }.walk()
    }

    #[test]
    fn exports_are_found_in_the_order_of_the_trie() {
        // The root with two children: `_a` at 0x10, and `_b`, which another library has as `_c`.
        let bytes = b"\0\x02_a\0\x0a_b\0\x0e\x02\0\x10\0\x05\x08\x02_c\0\0";
        let found = walked(bytes).expect("well-formed");
        assert_eq!(found.len(), 2);
        assert_eq!((&found[0].name[..], found[0].address, &found[0].forward), (&b"_a"[..], 0x10, &None));
        assert_eq!((&found[1].name[..], &found[1].forward), (&b"_b"[..], &Some((2, b"_c".to_vec()))));
        for len in 1..bytes.len() - 1 {
            assert!(walked(&bytes[..len]).is_err(), "cut to {len}");
        }
    }

    #[test]
    fn shared_nodes_are_refused_at_once() {
        // Each node of eight bytes has two children, both the next one: 2^14 ways to the last, of which none is walked.
        let mut bytes = Vec::new();
        for next in (1..15u8).map(|node| node * 8) {
            bytes.extend([0, 2, b'a', 0, next, b'b', 0, next]);
        }
        bytes.extend([0, 0]);
        let error = walked(&bytes).expect_err("shared").to_string();
        assert!(error.contains("twice"), "{error}");
    }
}
