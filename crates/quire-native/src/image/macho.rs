//! `_native.MachOFile`.

use std::ffi::OsString;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use quire_core::image::Window;
use quire_core::image::macho::{self, FixupKind, Need};

use super::text;
use crate::errors::Result;
use crate::source::Source;

#[pyclass(frozen, module = "quire._native")]
pub struct MachOFile(Window);

type Member = (u32, u32, u64, u64, u32);
type Needed = Vec<(OsString, &'static str)>;
type Names = (Option<OsString>, Needed, Vec<OsString>, Option<OsString>);
type Header<'py> = ((bool, bool, u32, u32, u32, u32), Names, Option<u64>, Option<Bound<'py, PyBytes>>);
type Section = (OsString, OsString, u64, u64, u32, u32, u32);
type Segment = (OsString, u64, u64, u64, u64, u32, u32, Vec<Section>);
type Symbol = (OsString, u8, u8, u16, u64);
type Export = (OsString, u64, u64, Option<(u64, OsString)>);
type Fixup = (&'static str, u64, Option<OsString>, i32, i64);

/// The programs in a universal file, or None if it is none.
#[pyfunction]
pub fn macho_members(py: Python<'_>, source: &Source, size: u64) -> Result<Option<Vec<Member>>> {
    let window = Window::new(source.inner.clone(), 0, size)?;
    let found = py.detach(|| macho::members(&window))?;
    Ok(found.map(|members| {
        members
            .into_iter()
            .map(|member| (member.cpu_type, member.cpu_subtype, member.offset, member.size, member.align))
            .collect()
    }))
}

#[pymethods]
impl MachOFile {
    #[new]
    fn new(source: &Source, offset: u64, size: u64) -> Result<Self> {
        Ok(Self(Window::new(source.inner.clone(), offset, size)?))
    }

    fn header<'py>(&self, py: Python<'py>) -> Result<Header<'py>> {
        let found = py.detach(|| macho::header(&self.0))?;
        let need = |need| match need {
            Need::Plain => "plain",
            Need::Weak => "weak",
            Need::Reexported => "reexported",
            Need::Upward => "upward",
            Need::Lazy => "lazy",
        };
        let needed = found.needed.into_iter().map(|(name, how)| (text(name), need(how))).collect();
        Ok((
            (found.is_64, found.is_little_endian, found.cpu_type, found.cpu_subtype, found.kind, found.flags),
            (found.name.map(text), needed, found.run_paths.into_iter().map(text).collect(), found.linker.map(text)),
            found.entry,
            found.uuid.map(|uuid| PyBytes::new(py, &uuid)),
        ))
    }

    fn segments(&self, py: Python<'_>) -> Result<Vec<Segment>> {
        let section = |each: macho::Section| {
            let macho::Section { name, segment, address, size, offset, align, flags } = each;
            (text(name), text(segment), address, size, offset, align, flags)
        };
        let found = py.detach(|| macho::segments(&self.0))?;
        Ok(found
            .into_iter()
            .map(|each| {
                let macho::Segment { name, address, memory_size, offset, file_size, protection, flags, sections } =
                    each;
                let sections = sections.into_iter().map(section).collect();
                (text(name), address, memory_size, offset, file_size, protection, flags, sections)
            })
            .collect())
    }

    fn symbols(&self, py: Python<'_>) -> Result<Vec<Symbol>> {
        let found = py.detach(|| macho::symbols(&self.0))?;
        Ok(found
            .into_iter()
            .map(|each| (text(each.name), each.kind, each.section, each.description, each.value))
            .collect())
    }

    fn exports(&self, py: Python<'_>) -> Result<Vec<Export>> {
        let found = py.detach(|| macho::exports(&self.0))?;
        Ok(found
            .into_iter()
            .map(|each| {
                let forward = each.forward.map(|(library, name)| (library, text(name)));
                (text(each.name), each.flags, each.address, forward)
            })
            .collect())
    }

    fn fixups(&self, py: Python<'_>) -> Result<Vec<Fixup>> {
        let found = py.detach(|| macho::fixups(&self.0))?;
        let kind = |kind| match kind {
            FixupKind::Rebase => "rebase",
            FixupKind::Bind => "bind",
            FixupKind::LazyBind => "lazy",
            FixupKind::WeakBind => "weak",
        };
        Ok(found
            .into_iter()
            .map(|each| (kind(each.kind), each.address, each.name.map(text), each.library, each.addend))
            .collect())
    }
}
