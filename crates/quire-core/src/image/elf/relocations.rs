//! What the dynamic linker, or a linker, changes.

use object::read::elf::{FileHeader, ProgramHeader, Rel, Rela, RelrIterator, SectionHeader};
use object::{Endianness, ReadRef, elf};

use super::super::malformed;
use super::{Places, Relocation, RelocationTable, View};
use crate::Result;

impl<'d, E: FileHeader<Endian = Endianness>, R: ReadRef<'d>> View<'d, E, R> {
    pub(super) fn relocations(&self) -> Result<Vec<Relocation>> {
        match self.places()? {
            Some(places) => self.dynamic_relocations(&places),
            None => self.section_relocations(),
        }
    }

    pub(super) fn dynamic_relocations(&self, places: &Places) -> Result<Vec<Relocation>> {
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
}
