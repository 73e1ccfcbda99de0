//! `_native.parse_maps`: the text of `/proc/PID/maps` and `smaps` as columns.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::Range;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString, PyTuple};
use quire_core::procmaps::{Parsed, Vma};

type Column<'py, T> = Vec<Bound<'py, T>>;
/// Names and values of lines.
type Told<'a> = Vec<(&'a [u8], &'a [u8])>;
type Files<'py> = (Vec<u64>, Vec<u32>, Vec<u32>, Vec<u64>, Column<'py, PyBytes>);
type Details<'py> = (Column<'py, PyTuple>, Column<'py, PyBytes>, Column<'py, PyTuple>);
type Parts<'py> = (Vec<u64>, Vec<u64>, Column<'py, PyString>, Files<'py>, Details<'py>, Column<'py, PyBytes>);

/// Columns, because a tuple for each VMA would take longer than parsing; see the stub.
#[pyfunction]
pub fn parse_maps<'py>(text: &Bound<'py, PyBytes>) -> PyResult<Parts<'py>> {
    let py = text.py();
    // `bytes`, which nobody can change while they are read without the GIL.
    let bytes = text.as_bytes();
    let (parsed, packed) = py.detach(|| {
        let parsed = Parsed::of(bytes);
        // Twenty-odd numbers for each VMA: packed, until somebody asks.
        let packed: Vec<u8> = parsed.figures.iter().flat_map(|figure| figure.to_ne_bytes()).collect();
        (parsed, packed)
    });
    let at = |range: &Range<usize>| &bytes[range.clone()];
    let string = |range: &Range<usize>| PyString::new(py, &String::from_utf8_lossy(at(range)));
    let shapes =
        parsed.shapes.iter().map(|names| PyTuple::new(py, names.iter().map(string))).collect::<PyResult<Vec<_>>>()?;
    // Few protections, names and flags are distinct; what is the same is one object.
    let mut protections: HashMap<[u8; 4], Bound<'py, PyString>> = HashMap::new();
    let mut names: HashMap<&[u8], Bound<'py, PyBytes>> = HashMap::new();
    let mut texts: HashMap<Told<'_>, Bound<'py, PyTuple>> = HashMap::new();
    let vmas = &parsed.vmas;
    let protection_of = |vma: &Vma| {
        let new = || PyString::new(py, &String::from_utf8_lossy(&vma.protection));
        protections.entry(vma.protection).or_insert_with(new).clone()
    };
    let name_of = |vma: &Vma| names.entry(at(&vma.name)).or_insert_with(|| PyBytes::new(py, at(&vma.name))).clone();
    let texts_of = |vma: &Vma| {
        let key: Vec<_> = parsed.texts[vma.texts.clone()].iter().map(|(name, value)| (at(name), at(value))).collect();
        Ok(match texts.entry(key) {
            Entry::Occupied(entry) => entry.get().clone(),
            Entry::Vacant(entry) => {
                let pairs = parsed.texts[vma.texts.clone()].iter();
                let pairs = pairs.map(|(name, value)| (string(name), PyBytes::new(py, at(value))));
                entry.insert(PyTuple::new(py, pairs.collect::<Vec<_>>())?).clone()
            }
        })
    };
    Ok((
        vmas.iter().map(|vma| vma.start).collect(),
        vmas.iter().map(|vma| vma.end).collect(),
        vmas.iter().map(protection_of).collect(),
        (
            vmas.iter().map(|vma| vma.offset).collect(),
            vmas.iter().map(|vma| vma.major).collect(),
            vmas.iter().map(|vma| vma.minor).collect(),
            vmas.iter().map(|vma| vma.inode).collect(),
            vmas.iter().map(name_of).collect(),
        ),
        (
            vmas.iter().map(|vma| shapes[vma.shape].clone()).collect(),
            vmas.iter().map(|vma| PyBytes::new(py, &packed[8 * vma.figures.start..8 * vma.figures.end])).collect(),
            vmas.iter().map(texts_of).collect::<PyResult<_>>()?,
        ),
        parsed.unknown.iter().map(|line| PyBytes::new(py, at(line))).collect(),
    ))
}
