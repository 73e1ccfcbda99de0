//! Symbol tables, and the versions of symbols.

use std::collections::HashMap;

use object::elf;
use object::read::elf::{FileHeader, HashTable, SectionHeader, Sym};
use object::{Endianness, ReadRef, StringTable};

use super::super::{Names, malformed};
use super::{Places, Symbol, Version, View};
use crate::Result;

const VERSION_NAMES_MAX: usize = 1 << 16;

impl<'d, E: FileHeader<Endian = Endianness>, R: ReadRef<'d>> View<'d, E, R> {
    pub(super) fn dynamic_symbols(&self) -> Result<Vec<Symbol>> {
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
        let mut names = Names::of(self.data);
        symbols
            .iter()
            .enumerate()
            .map(|(index, symbol)| {
                let version = versions.of(index, &mut names)?;
                self.symbol(index, symbol, strings, None, version, &mut names)
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
        names: &mut Names,
    ) -> Result<Symbol> {
        let name = match symbol.st_name(self.endian) {
            0 => &[],
            _ => symbol
                .name(self.endian, strings)
                .map_err(|why| malformed(format_args!("st_name of symbol {index}"), why))?,
        };
        Ok(Symbol {
            name: names.take(name, "st_name")?,
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

    pub(super) fn static_symbols(&self) -> Result<Vec<Symbol>> {
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
        let mut copied = Names::of(self.data);
        symbols
            .iter()
            .enumerate()
            .map(|(index, symbol)| {
                let section = if symbol.st_shndx(endian) == elf::SHN_XINDEX {
                    extended.get(index).map(|section| section.get(endian))
                } else {
                    None
                };
                self.symbol(index, symbol, strings, section, None, &mut copied)
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
}

#[derive(Default)]
struct Versions<'d> {
    indices: Vec<u16>,
    names: HashMap<u16, (&'d [u8], Option<&'d [u8]>)>,
}

impl Versions<'_> {
    fn of(&self, symbol: usize, names: &mut Names) -> Result<Option<Version>> {
        let Some(index) = self.indices.get(symbol) else { return Ok(None) };
        // 0 is local and 1 has no version; a definition of the object's own name has that index too.
        let Some((name, library)) = self.names.get(&(index & 0x7fff)).filter(|_| index & 0x7fff > 1) else {
            return Ok(None);
        };
        Ok(Some(Version {
            name: names.take(name, "DT_VERSYM")?,
            library: library.map(|library| names.take(library, "DT_VERNEED")).transpose()?,
            is_hidden: index & 0x8000 != 0,
        }))
    }
}
