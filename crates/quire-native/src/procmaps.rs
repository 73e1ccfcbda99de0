//! `_native.read_maps`: the text of `/proc/PID/maps` and `smaps` as columns.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::{BorrowedFd, RawFd};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyString, PyTuple};
use quire_core::procmaps::{Reader, Vma};

use crate::errors::Result;

type Column<'py, T> = Vec<Bound<'py, T>>;
type Files<'py> = (Vec<u64>, Vec<u32>, Vec<u32>, Vec<u64>, Column<'py, PyBytes>);
type Details<'py> = (Column<'py, PyTuple>, Column<'py, PyBytes>, Column<'py, PyTuple>);
type Parts<'py> = (Vec<u64>, Vec<u64>, Column<'py, PyString>, Files<'py>, Details<'py>, Column<'py, PyBytes>);

/// Columns, because a tuple for each VMA would take longer than parsing; see the stub.
#[pyfunction]
pub fn read_maps(py: Python<'_>, fd: RawFd) -> Result<Parts<'_>> {
    if fd < 0 {
        return Err(quire_core::Error::Invalid(format!("descriptor {fd}")).into());
    }
    // SAFETY: the caller keeps the descriptor open during the call; a wrong number makes the system calls fail.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let mut reader = Reader::default();
    while py.detach(|| reader.step(fd))? {
        py.check_signals()?;
    }
    let parsed = py.detach(|| reader.finish());
    // Few protections, names and texts are distinct; what is the same is one object.
    let strings: Column<'_, PyBytes> = parsed.strings.iter().map(|text| PyBytes::new(py, text)).collect();
    let string = |place: usize| PyString::new(py, &String::from_utf8_lossy(&parsed.strings[place]));
    let names_of = |shape: &Vec<usize>| PyTuple::new(py, shape.iter().map(|&name| string(name)));
    let shapes = parsed.shapes.iter().map(names_of).collect::<PyResult<Vec<_>>>()?;
    let mut protections: HashMap<[u8; 4], Bound<'_, PyString>> = HashMap::new();
    let mut texts: HashMap<&[(usize, usize)], Bound<'_, PyTuple>> = HashMap::new();
    let vmas = &parsed.vmas;
    let protection_of = |vma: &Vma| {
        let new = || PyString::new(py, &String::from_utf8_lossy(&vma.protection));
        protections.entry(vma.protection).or_insert_with(new).clone()
    };
    let texts_of = |vma: &Vma| {
        Ok(match texts.entry(&parsed.texts[vma.texts.clone()]) {
            Entry::Occupied(entry) => entry.get().clone(),
            Entry::Vacant(entry) => {
                let pairs = entry.key().iter().map(|&(name, value)| (string(name), strings[value].clone()));
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
            vmas.iter().map(|vma| strings[vma.name].clone()).collect(),
        ),
        (
            vmas.iter().map(|vma| shapes[vma.shape].clone()).collect(),
            // Twenty-odd numbers for each VMA: packed, until somebody asks.
            vmas.iter().map(|vma| PyBytes::new(py, &parsed.figures[vma.figures.clone()])).collect(),
            vmas.iter().map(texts_of).collect::<PyResult<_>>()?,
        ),
        parsed.unknown.iter().map(|line| PyBytes::new(py, line)).collect(),
    ))
}
