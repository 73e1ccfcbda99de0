//! `_native.PeFile`.

use std::ffi::OsString;

use pyo3::prelude::*;
use quire_core::image::Window;
use quire_core::image::pe;

use super::text;
use crate::errors::Result;
use crate::source::Source;

#[pyclass(frozen, module = "quire._native")]
pub struct PeFile(Window);

type Header = ((bool, u16, u16, u32, u64, u32, u32), (u32, u32, u16, u16, u64, u64), Vec<(u32, u32)>);
type Section = (OsString, u32, u32, u32, u32, u32);
type Import = (OsString, Option<OsString>, u16, u64, bool);
type Export = (Option<OsString>, u32, u32, Option<OsString>);
type Tls = (u64, u64, u64, u32, Vec<u64>);

#[pymethods]
impl PeFile {
    #[new]
    fn new(source: &Source, offset: u64, size: u64) -> Result<Self> {
        Ok(Self(Window::new(source.inner.clone(), offset, size)?))
    }

    fn header(&self, py: Python<'_>) -> Result<Header> {
        let found = py.detach(|| pe::header(&self.0))?;
        Ok((
            (
                found.is_64,
                found.machine,
                found.characteristics,
                found.entry,
                found.image_base,
                found.section_align,
                found.file_align,
            ),
            (
                found.image_size,
                found.headers_size,
                found.subsystem,
                found.dll_characteristics,
                found.stack_reserve,
                found.stack_commit,
            ),
            found.directories,
        ))
    }

    fn sections(&self, py: Python<'_>) -> Result<Vec<Section>> {
        let found = py.detach(|| pe::sections(&self.0))?;
        Ok(found
            .into_iter()
            .map(|each| {
                let pe::Section { name, address, memory_size, offset, file_size, flags } = each;
                (text(name), address, memory_size, offset, file_size, flags)
            })
            .collect())
    }

    fn imports(&self, py: Python<'_>) -> Result<Vec<Import>> {
        let found = py.detach(|| pe::imports(&self.0))?;
        Ok(found
            .into_iter()
            .map(|each| (text(each.library), each.name.map(text), each.number, each.slot, each.is_delayed))
            .collect())
    }

    fn exports(&self, py: Python<'_>) -> Result<Vec<Export>> {
        let found = py.detach(|| pe::exports(&self.0))?;
        Ok(found
            .into_iter()
            .map(|each| (each.name.map(text), each.ordinal, each.address, each.forward.map(text)))
            .collect())
    }

    fn relocations(&self, py: Python<'_>) -> Result<Vec<(u32, u16)>> {
        Ok(py.detach(|| pe::relocations(&self.0))?)
    }

    fn tls(&self, py: Python<'_>) -> Result<Option<Tls>> {
        let found = py.detach(|| pe::tls(&self.0))?;
        Ok(found.map(|tls| (tls.start, tls.end, tls.index, tls.zero_fill, tls.callbacks)))
    }
}
