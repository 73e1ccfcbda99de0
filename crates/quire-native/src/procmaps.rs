//! `_native.parse_maps`: the text of `/proc/PID/maps` and `smaps` as tuples.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString, PyTuple};
use quire_core::procmaps::Parsed;

/// `(rows, unknown lines)`; see the stub.
#[pyfunction]
pub fn parse_maps<'py>(text: &Bound<'py, PyBytes>) -> PyResult<(Vec<Bound<'py, PyTuple>>, Vec<Bound<'py, PyBytes>>)> {
    let py = text.py();
    // `bytes`, which nobody can change while they are read without the GIL.
    let bytes = text.as_bytes();
    let parsed = py.detach(|| Parsed::of(bytes));
    let at = |range: &Range<usize>| &bytes[range.clone()];
    let string = |range: &Range<usize>| PyString::new(py, &String::from_utf8_lossy(at(range)));
    let shapes =
        parsed.shapes.iter().map(|names| PyTuple::new(py, names.iter().map(string))).collect::<PyResult<Vec<_>>>()?;
    // Few protections, names and flags are distinct; what is the same is one object.
    let mut protections: HashMap<[u8; 4], Bound<'py, PyString>> = HashMap::new();
    let mut names: HashMap<&[u8], Bound<'py, PyBytes>> = HashMap::new();
    let mut texts: HashMap<Vec<(&[u8], &[u8])>, Bound<'py, PyTuple>> = HashMap::new();
    // Packed: twenty-odd numbers a VMA would take longer to make than all the rest.
    let figures: Vec<u8> = parsed.figures.iter().flat_map(|figure| figure.to_ne_bytes()).collect();
    let mut rows = Vec::with_capacity(parsed.vmas.len());
    for vma in &parsed.vmas {
        let protection = protections
            .entry(vma.protection)
            .or_insert_with(|| PyString::new(py, &String::from_utf8_lossy(&vma.protection)));
        let name = names.entry(at(&vma.name)).or_insert_with(|| PyBytes::new(py, at(&vma.name)));
        let ranges = &parsed.texts[vma.texts.clone()];
        let key: Vec<_> = ranges.iter().map(|(name, value)| (at(name), at(value))).collect();
        let texts = match texts.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let pairs = ranges.iter().map(|(name, value)| (string(name), PyBytes::new(py, at(value))));
                entry.insert(PyTuple::new(py, pairs.collect::<Vec<_>>())?)
            }
        };
        let row = (
            vma.start,
            vma.end,
            &*protection,
            vma.offset,
            vma.major,
            vma.minor,
            vma.inode,
            &*name,
            &shapes[vma.shape],
            PyBytes::new(py, &figures[8 * vma.figures.start..8 * vma.figures.end]),
            &*texts,
        );
        rows.push(row.into_pyobject(py)?);
    }
    let unknown = parsed.unknown.iter().map(|line| PyBytes::new(py, at(line))).collect();
    Ok((rows, unknown))
}
