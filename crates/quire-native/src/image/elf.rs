//! `_native.ElfFile`.

use std::ffi::OsString;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use quire_core::image::Window;
use quire_core::image::elf::{self, RelocationTable, SymbolTable};

use super::text;
use crate::errors::Result;
use crate::source::Source;

#[pyclass(frozen, module = "quire._native")]
pub struct ElfFile(Window);

type Header = (bool, bool, u8, u8, u16, u16, u32, u64, u16, u64, u64, u32);
type Segment = (u32, u32, u64, u64, u64, u64, u64, u64);
type Section = (OsString, u32, u64, u64, u64, u64, u32, u32, u64, u64);
type Symbol = (OsString, u64, u64, u8, u8, u8, u32, Option<OsString>, Option<OsString>, bool);
type DynamicEntry = (i64, u64, Option<OsString>);
type Relocation = (&'static str, u64, u32, u32, Option<i64>, Option<u32>);

#[pymethods]
impl ElfFile {
    #[new]
    fn new(source: &Source, offset: u64, size: u64) -> Result<Self> {
        Ok(Self(Window::new(source.inner.clone(), offset, size)?))
    }

    fn header(&self, py: Python<'_>) -> Result<Header> {
        let found = py.detach(|| elf::header(&self.0))?;
        Ok((
            found.is_64,
            found.is_little_endian,
            found.os_abi,
            found.abi_version,
            found.kind,
            found.machine,
            found.flags,
            found.entry,
            found.header_bytes,
            found.segments_offset,
            found.sections_offset,
            found.section_count,
        ))
    }

    fn segments(&self, py: Python<'_>) -> Result<Vec<Segment>> {
        let found = py.detach(|| elf::segments(&self.0))?;
        Ok(found
            .into_iter()
            .map(|each| {
                let elf::Segment { kind, flags, offset, address, physical_address, file_size, memory_size, align } =
                    each;
                (kind, flags, offset, address, physical_address, file_size, memory_size, align)
            })
            .collect())
    }

    fn sections(&self, py: Python<'_>) -> Result<Vec<Section>> {
        let found = py.detach(|| elf::sections(&self.0))?;
        Ok(found
            .into_iter()
            .map(|each| {
                let elf::Section { name, kind, flags, address, offset, size, link, info, align, entry_size } = each;
                (text(name), kind, flags, address, offset, size, link, info, align, entry_size)
            })
            .collect())
    }

    fn interpreter(&self, py: Python<'_>) -> Result<Option<OsString>> {
        Ok(py.detach(|| elf::interpreter(&self.0))?.map(text))
    }

    fn dynamic(&self, py: Python<'_>) -> Result<Option<Vec<DynamicEntry>>> {
        let found = py.detach(|| elf::dynamic(&self.0))?;
        Ok(found
            .map(|entries| entries.into_iter().map(|entry| (entry.tag, entry.value, entry.name.map(text))).collect()))
    }

    fn symbols(&self, py: Python<'_>, dynamic: bool) -> Result<Vec<Symbol>> {
        let table = if dynamic { SymbolTable::Dynamic } else { SymbolTable::Static };
        let found = py.detach(|| elf::symbols(&self.0, table))?;
        Ok(found
            .into_iter()
            .map(|each| {
                let (version, library, is_hidden) = match each.version {
                    Some(version) => (Some(text(version.name)), version.library.map(text), version.is_hidden),
                    None => (None, None, false),
                };
                let elf::Symbol { name, value, size, kind, binding, other, section, .. } = each;
                (text(name), value, size, kind, binding, other, section, version, library, is_hidden)
            })
            .collect())
    }

    fn relocations(&self, py: Python<'_>) -> Result<Vec<Relocation>> {
        let found = py.detach(|| elf::relocations(&self.0))?;
        Ok(found
            .into_iter()
            .map(|each| {
                let (table, section) = match each.table {
                    RelocationTable::Eager => ("eager", None),
                    RelocationTable::Plt => ("plt", None),
                    RelocationTable::Relative => ("relr", None),
                    RelocationTable::Section(index) => ("section", Some(index)),
                };
                (table, each.offset, each.kind, each.symbol, each.addend, section)
            })
            .collect())
    }

    fn notes<'py>(&self, py: Python<'py>) -> Result<Vec<(OsString, u32, Bound<'py, PyBytes>)>> {
        let found = py.detach(|| elf::notes(&self.0))?;
        Ok(found.into_iter().map(|note| (text(note.name), note.kind, PyBytes::new(py, &note.description))).collect())
    }

    fn bytes_at<'py>(&self, py: Python<'py>, address: u64, size: u64) -> Result<Bound<'py, PyBytes>> {
        let found = py.detach(|| elf::bytes_at(&self.0, address, size))?;
        Ok(PyBytes::new(py, &found))
    }
}

/// The specifications' name of a number, or None.
#[pyfunction]
pub fn elf_name(kind: &str, machine: u16, value: i64) -> Option<&'static str> {
    quire_core::image::names::elf(kind, machine, value)
}
