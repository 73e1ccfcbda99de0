//! The tables of symbol versions: that their entries stay in place and come to an end.

use std::ops::Range;

use object::elf::{Verdaux, Verdef, Vernaux, Verneed};
use object::{LittleEndian as LE, Pod, ReadRef};

use super::plan::{Bytes, malformed};
use crate::Result;

/// The fewest bytes that an entry of any table takes.
const ENTRY_BYTES: u64 = size_of::<Verdaux<LE>>() as u64;

/// Offset in the file, and how many bytes the segment has from there on.
type Place = Option<(u64, u64)>;

pub struct Tables<'a, R> {
    pub file: Bytes<R>,
    pub need: Place,
    pub define: Place,
    /// Where in the file the string table is.
    pub names: u64,
    pub names_bytes: u64,
    /// The names of `DT_NEEDED`.
    pub needed: &'a [Vec<u8>],
}

pub struct Versions {
    /// Ranges of the file that the tables take.
    pub ranges: Vec<Range<u64>>,
    /// The highest number that a version has; 0 if there is none.
    pub highest: u16,
}

/// Follow both tables as the dynamic linker does: to the entry that says that it is the last, however many there should be.
pub fn check<'d, R: ReadRef<'d>>(tables: &Tables<'_, R>) -> Result<Versions> {
    let mut versions = Versions { ranges: Vec::new(), highest: 0 };
    if let Some((offset, room)) = tables.need {
        let mut table = Table::new(tables, "DT_VERNEED", offset, room);
        let mut at = Some(0);
        while let Some(start) = at {
            let entry: &Verneed<LE> = table.entry(start)?;
            let library = table.name(entry.vn_file.get(LE))?;
            // The dynamic linker ends the process if it has not loaded the library of a version.
            if !tables.needed.iter().any(|needed| needed == library) {
                let library = String::from_utf8_lossy(library);
                return Err(malformed(table.field, format_args!("{library:?} has versions, but is not in DT_NEEDED")));
            }
            let mut aux = Some(start + u64::from(entry.vn_aux.get(LE)));
            while let Some(place) = aux {
                let version: &Vernaux<LE> = table.entry(place)?;
                table.name(version.vna_name.get(LE))?;
                versions.highest = versions.highest.max(version.vna_other.get(LE).0 & 0x7fff);
                aux = next(place, version.vna_next.get(LE));
            }
            at = next(start, entry.vn_next.get(LE));
        }
        versions.ranges.push(offset..offset + table.end);
    }
    if let Some((offset, room)) = tables.define {
        let mut table = Table::new(tables, "DT_VERDEF", offset, room);
        let mut at = Some(0);
        while let Some(start) = at {
            let entry: &Verdef<LE> = table.entry(start)?;
            versions.highest = versions.highest.max(entry.vd_ndx.get(LE).0 & 0x7fff);
            // Of its names only the first is read; the others are those of earlier versions.
            let name: &Verdaux<LE> = table.entry(start + u64::from(entry.vd_aux.get(LE)))?;
            table.name(name.vda_name.get(LE))?;
            at = next(start, entry.vd_next.get(LE));
        }
        versions.ranges.push(offset..offset + table.end);
    }
    Ok(versions)
}

/// Where the next entry of a chain is.
fn next(at: u64, step: u32) -> Option<u64> {
    (step != 0).then(|| at + u64::from(step))
}

struct Table<'a, R> {
    tables: &'a Tables<'a, R>,
    field: &'static str,
    offset: u64,
    room: u64,
    /// Of what was read.
    end: u64,
    /// How many entries may still come, since entries do not overlap.
    left: u64,
}

impl<'a, 'd, R: ReadRef<'d>> Table<'a, R> {
    const fn new(tables: &'a Tables<'a, R>, field: &'static str, offset: u64, room: u64) -> Self {
        Self { tables, field, offset, room, end: 0, left: room / ENTRY_BYTES }
    }

    fn entry<T: Pod>(&mut self, at: u64) -> Result<&'d T> {
        let end = at + size_of::<T>() as u64;
        if end > self.room {
            return Err(malformed(self.field, format_args!("an entry at {at:#x} is not within the segment")));
        }
        self.left = self.left.checked_sub(1).ok_or_else(|| malformed(self.field, "its entries do not end"))?;
        self.end = self.end.max(end);
        Ok(&self.tables.file.slice::<T>(self.field, self.offset + at, 1)?[0])
    }

    fn name(&self, name: u32) -> Result<&'d [u8]> {
        if u64::from(name) >= self.tables.names_bytes {
            return Err(malformed(self.field, format_args!("a name at {name:#x} is outside DT_STRTAB")));
        }
        let (start, end) = (self.tables.names + u64::from(name), self.tables.names + self.tables.names_bytes);
        self.tables.file.name(self.field, start..end)
    }
}
