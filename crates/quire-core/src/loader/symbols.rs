//! The symbol table of a shared object, its hash tables and the versions of its symbols.

use object::elf::{self, Rela64, Sym64};
use object::{LittleEndian as LE, ReadRef, U16, U32};

use super::dynamic::{Dynamic, Object, RELOCATIONS};
use super::plan::{Whole, malformed};
use crate::Result;

const SYMBOL: u64 = size_of::<Sym64<LE>>() as u64;
/// Words of a hash chain that are read at once: nothing tells how long the last chain is, and code may stand behind it.
const CHAIN_STEP: u64 = 1024;

impl<'d, R: ReadRef<'d>> Object<R> {
    /// Check the symbol table and its hash tables.
    pub fn symbols(&mut self, dynamic: &Dynamic, names_bytes: u64) -> Result<&'d [Sym64<LE>]> {
        let Some(address) = dynamic.get(elf::DT_SYMTAB) else {
            return Err(malformed("DT_SYMTAB", "is missing, which the dynamic linker counts on"));
        };
        let hashed = dynamic.get(elf::DT_GNU_HASH).map(|table| self.gnu_hash(table)).transpose()?;
        let listed = dynamic.get(elf::DT_HASH).map(|table| self.hash(table)).transpose()?;
        let (offset, room) = self.rest("DT_SYMTAB", address)?;
        // A table for lookups does not tell of symbols that are only needed, if there are no others.
        let used = self.last_used(dynamic)? + 1;
        let count = listed.unwrap_or(0).max(hashed.unwrap_or(0)).max(used);
        if count > room / SYMBOL {
            return Err(malformed("DT_SYMTAB", format_args!("{count} symbols are not within the segment")));
        }
        self.eager.push(offset..offset + count * SYMBOL);
        let table = self.file.slice::<Sym64<LE>>("DT_SYMTAB", offset, count)?;
        for (number, symbol) in table.iter().enumerate() {
            if u64::from(symbol.st_name.get(LE)) >= names_bytes.max(1) {
                return Err(malformed("DT_SYMTAB", format_args!("the name of symbol {number} is outside DT_STRTAB")));
            }
            if symbol.st_type() == elf::STT_GNU_IFUNC && symbol.st_shndx.get(LE) != elf::SHN_UNDEF {
                self.whole = Some(Whole::IndirectFunctions);
                if !self.is_code(symbol.st_value.get(LE)) {
                    let what = format_args!("the resolver of symbol {number} is not in code");
                    return Err(malformed("DT_SYMTAB", what));
                }
            }
        }
        Ok(table)
    }

    /// Check that the version of every symbol is one of the tables of versions. `highest`: the last of them.
    pub fn symbol_versions(&mut self, dynamic: &Dynamic, symbols: &[Sym64<LE>], highest: u16) -> Result<()> {
        let field = "DT_VERSYM";
        let Some(address) = dynamic.get(elf::DT_VERSYM) else {
            return if highest == 0 { Ok(()) } else { Err(malformed(field, "is missing, and there are versions")) };
        };
        let offset = self.table(field, address, 2 * symbols.len() as u64)?;
        let versions = self.file.slice::<U16<LE>>(field, offset, symbols.len() as u64)?;
        let wrong = versions.iter().position(|version| version.get(LE) & 0x7fff > highest.max(1));
        match wrong.filter(|_| highest > 0) {
            Some(number) => Err(malformed(field, format_args!("the version of symbol {number} does not exist"))),
            None => Ok(()),
        }
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
        let head = self.file.slice::<U32<LE>>("DT_HASH", offset, 2)?;
        let (buckets, chains) = (u64::from(head[0].get(LE)), u64::from(head[1].get(LE)));
        let at = self.table("DT_HASH", address, 4 * (2 + buckets + chains))?;
        let links = self.file.slice::<U32<LE>>("DT_HASH", at + 8, buckets + chains)?;
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
        let head = self.file.slice::<U32<LE>>(field, offset, 4)?;
        let [buckets, base, bloom, shift] = [0, 1, 2, 3].map(|at| u64::from(head[at].get(LE)));
        if buckets == 0 || !bloom.is_power_of_two() || shift >= 64 {
            return Err(malformed(field, format_args!("{buckets} buckets, {bloom} words of filter, shift {shift}")));
        }
        let chains_at = 16 + 8 * bloom + 4 * buckets;
        if chains_at > room {
            return Err(malformed(field, "is not within the segment"));
        }
        let starts = self.file.slice::<U32<LE>>(field, offset + 16 + 8 * bloom, buckets)?;
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
            let length = self.chain(field, offset + first, room.saturating_sub(first) / 4)?;
            last += length;
            end = first + 4 * length;
        }
        self.eager.push(offset..offset + end);
        Ok(last)
    }

    /// How many words the hash chain at an offset has, of at most so many.
    fn chain(&self, field: &str, offset: u64, most: u64) -> Result<u64> {
        for at in (0..most).step_by(CHAIN_STEP as usize) {
            let part = self.file.slice::<U32<LE>>(field, offset + 4 * at, CHAIN_STEP.min(most - at))?;
            if let Some(end) = part.iter().position(|hash| hash.get(LE) & 1 != 0) {
                return Ok(at + end as u64 + 1);
            }
        }
        Err(malformed(field, "its last chain does not end"))
    }
}
