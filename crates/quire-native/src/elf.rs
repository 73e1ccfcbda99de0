//! `_native.elf_linkage`: what a shared object needs.
#![allow(unsafe_code)]

use std::ffi::OsString;
use std::os::fd::{BorrowedFd, RawFd};
use std::os::unix::ffi::OsStringExt;

use pyo3::prelude::*;
use quire_core::elf::Linkage;

use crate::errors::Result;

type Strings = (Option<OsString>, Vec<OsString>, Option<OsString>, Option<OsString>);

/// `(soname, needed, rpath, runpath)`; the descriptor is borrowed for the call.
#[pyfunction]
pub fn elf_linkage(py: Python<'_>, fd: RawFd) -> Result<Strings> {
    if fd < 0 {
        return Err(quire_core::Error::Invalid(format!("descriptor {fd} is negative")).into());
    }
    // SAFETY: the number is not -1; a caller that passes a descriptor that is not open gets EBADF from its duplication.
    let file = unsafe { BorrowedFd::borrow_raw(fd) };
    let found = py.detach(|| Linkage::of_file(file))?;
    let needed = found.needed.into_iter().map(OsString::from_vec).collect();
    let text = |name: Option<Vec<u8>>| name.map(OsString::from_vec);
    Ok((text(found.soname), needed, text(found.rpath), text(found.runpath)))
}
