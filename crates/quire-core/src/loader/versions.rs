//! The tables of symbol versions: that their entries stay in place and come to an end.

use std::ops::Range;

use object::elf::{Verdaux, Verdef, Vernaux, Verneed};
use object::{LittleEndian as LE, Pod, ReadRef};

use super::plan::{Bytes, malformed};
use crate::Result;

/// More versions than any library has.
const MOST: u64 = 1 << 16;

/// Offset in the file, and how many bytes the segment has from there on.
type Place = Option<(u64, u64)>;

pub struct Tables<R> {
    pub file: Bytes<R>,
    pub need: Place,
    pub need_count: u64,
    pub define: Place,
    pub define_count: u64,
    pub names_bytes: u64,
}

/// Follow both tables as the dynamic linker does. Returns the ranges of the file that they take.
pub fn check<'d, R: ReadRef<'d>>(tables: &Tables<R>) -> Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    if let Some((offset, room)) = tables.need {
        let mut table = Table { tables, field: "DT_VERNEED", offset, room, end: 0 };
        let (mut at, mut more) = (0, tables.need_count > 0);
        table.limit(tables.need_count)?;
        for _ in 0..tables.need_count {
            if !more {
                break;
            }
            let entry: &Verneed<LE> = table.entry(at)?;
            table.name(entry.vn_file.get(LE))?;
            let mut aux = at + u64::from(entry.vn_aux.get(LE));
            for left in (0..entry.vn_cnt.get(LE)).rev() {
                let version: &Vernaux<LE> = table.entry(aux)?;
                table.name(version.vna_name.get(LE))?;
                aux = table.step(aux, version.vna_next.get(LE), left > 0)?;
            }
            more = entry.vn_next.get(LE) != 0;
            at += u64::from(entry.vn_next.get(LE));
        }
        found.push(offset..offset + table.end);
    }
    if let Some((offset, room)) = tables.define {
        let mut table = Table { tables, field: "DT_VERDEF", offset, room, end: 0 };
        let (mut at, mut more) = (0, tables.define_count > 0);
        table.limit(tables.define_count)?;
        for _ in 0..tables.define_count {
            if !more {
                break;
            }
            let entry: &Verdef<LE> = table.entry(at)?;
            let mut aux = at + u64::from(entry.vd_aux.get(LE));
            for left in (0..entry.vd_cnt.get(LE)).rev() {
                let name: &Verdaux<LE> = table.entry(aux)?;
                table.name(name.vda_name.get(LE))?;
                aux = table.step(aux, name.vda_next.get(LE), left > 0)?;
            }
            more = entry.vd_next.get(LE) != 0;
            at += u64::from(entry.vd_next.get(LE));
        }
        found.push(offset..offset + table.end);
    }
    Ok(found)
}

struct Table<'a, R> {
    tables: &'a Tables<R>,
    field: &'static str,
    offset: u64,
    room: u64,
    /// Of what was read.
    end: u64,
}

impl<'d, R: ReadRef<'d>> Table<'_, R> {
    fn limit(&self, count: u64) -> Result<()> {
        if count <= MOST { Ok(()) } else { Err(malformed(self.field, format_args!("{count} entries"))) }
    }

    fn entry<T: Pod>(&mut self, at: u64) -> Result<&'d T> {
        let end = at + size_of::<T>() as u64;
        if end > self.room {
            return Err(malformed(self.field, format_args!("an entry at {at:#x} is not within the segment")));
        }
        self.end = self.end.max(end);
        Ok(&self.tables.file.slice::<T>(self.field, self.offset + at, 1)?[0])
    }

    fn name(&self, name: u32) -> Result<()> {
        if u64::from(name) < self.tables.names_bytes {
            return Ok(());
        }
        Err(malformed(self.field, format_args!("a name at {name:#x} is outside DT_STRTAB")))
    }

    /// The next entry of a chain that has more of them. The dynamic linker ends it at 0 and counts on nothing else.
    fn step(&self, at: u64, next: u32, is_expected: bool) -> Result<u64> {
        match (next, is_expected) {
            (0, true) => Err(malformed(self.field, format_args!("its entries end at {at:#x}, before they should"))),
            (1.., false) => Err(malformed(self.field, format_args!("its entries go on at {at:#x}, after the last"))),
            _ => Ok(at + u64::from(next)),
        }
    }
}
