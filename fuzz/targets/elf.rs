//! What a shared object needs, from bytes that anybody may have written.
#![no_main]

use std::os::fd::AsFd;

use libfuzzer_sys::fuzz_target;
use quire_core::Error;
use quire_core::elf::Linkage;
use quire_core::sys::memfd;
use quire_fuzz::memory;

/// A 64-bit little-endian header and two program headers: all of the file is loaded at address 0, and the dynamic
/// section begins behind them.
fn framed(data: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    let entries = u64::from(data.first().copied().unwrap_or(0)) * 16;
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    out.resize(16, 0);
    out.extend([3, 0, 62, 0, 1, 0, 0, 0]);
    out.extend([0u64, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    out.extend([0, 0, 0, 0]);
    out.extend([64u16, 56, 2, 64, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    let bytes = HEADERS + data.len() as u64;
    for (kind, start, size) in [(1u64, 0, bytes), (2, HEADERS, entries.min(data.len() as u64) / 16 * 16)] {
        out.extend([kind, start, start, start, size, size, 8].iter().flat_map(|word| word.to_le_bytes()));
    }
    out.extend(data.get(1..).unwrap_or(&[]));
    out.push(0);
    out
}

/// Bytes and a file of them are read alike, and refused with the documented error.
fn judge(data: &[u8]) {
    let from_bytes = Linkage::read(data);
    let file = memfd::create(c"fuzz").expect("memfd_create");
    memfd::write_all(file.as_fd(), data, 0).expect("pwrite");
    match (from_bytes, Linkage::of_file(file.as_fd())) {
        (Ok(one), Ok(other)) => assert_eq!(one, other),
        (Err(Error::Malformed(_)), Err(Error::Malformed(_))) => {}
        (one, other) => panic!("wrong: {one:?} from bytes, {other:?} from a file"),
    }
}

fuzz_target!(|data: &[u8]| {
    memory::bounded(|| {
        judge(data);
        judge(&framed(data));
    });
});
