//! `_native.ElfFile` and its like: the tables of program files.

pub mod elf;
pub mod macho;
pub mod pe;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

/// Names in files are bytes; Python gets them as it gets paths.
fn text(name: Vec<u8>) -> OsString {
    OsString::from_vec(name)
}
