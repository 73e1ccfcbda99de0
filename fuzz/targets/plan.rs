//! What is checked of a shared object before the dynamic linker gets it, from bytes that anybody may have written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use object::read::ReadCache;
use quire_core::Error;
use quire_core::loader::Plan;
use quire_fuzz::memory;

/// Tags of entries that are always there: strings, symbols, their sizes, hash tables, relocations.
const PIECES: [u8; 8] = [5, 6, 10, 4, 7, 8, 9, 23];

/// A header and three program headers around the input: all of the file can be written and executed at address 0, and the
/// dynamic section, which begins behind them, has the entries that the first bytes choose, before those of the input.
fn framed(data: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 3 * 56;
    let (head, rest) = data.split_at(data.len().min(1 + 2 * PIECES.len()));
    let entries: Vec<u64> = head
        .get(1..)
        .unwrap_or(&[])
        .chunks_exact(2)
        .zip(PIECES)
        .flat_map(|(place, tag)| [u64::from(tag), HEADERS + 8 * u64::from(u16::from_le_bytes([place[0], place[1]]))])
        .collect();
    let chosen = u64::from(head.first().copied().unwrap_or(0)) * 16;
    let bytes = HEADERS + 8 * entries.len() as u64 + rest.len() as u64 + 16;
    let mut out = b"\x7fELF\x02\x01\x01".to_vec();
    out.resize(16, 0);
    let machine = if cfg!(target_arch = "aarch64") { 183u16 } else { 62 };
    out.extend([3u16, machine, 1, 0].iter().flat_map(|half| half.to_le_bytes()));
    out.extend([0u64, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    out.extend([0; 4]);
    out.extend([64u16, 56, 3, 64, 0, 0].iter().flat_map(|half| half.to_le_bytes()));
    let dynamic = (8 * entries.len() as u64 + chosen).min(bytes - HEADERS);
    for (kind, start, size) in [(1u32, 0, bytes), (2, HEADERS, dynamic), (7, HEADERS, 8)] {
        out.extend([kind, 7].iter().flat_map(|word| word.to_le_bytes()));
        out.extend([start, start, start, size, size, 8].iter().flat_map(|word| u64::to_le_bytes(*word)));
    }
    out.extend(entries.iter().flat_map(|word| word.to_le_bytes()));
    out.extend(rest);
    out.extend([0; 16]);
    out
}

/// Bytes, and a file that is read in parts, are judged alike; what is planned is within the file.
fn judge(data: &[u8]) {
    let at_once = Plan::read(data);
    let in_parts = Plan::read(&ReadCache::new(std::io::Cursor::new(data)));
    match (at_once, in_parts) {
        (Ok(one), Ok(other)) => {
            assert_eq!(one, other);
            let len = data.len() as u64;
            assert!(one.eager.iter().all(|range| range.start < range.end && range.end <= len), "{one:?}");
            assert!(one.eager.windows(2).all(|pair| pair[0].end < pair[1].start), "{one:?}");
            assert!(one.constructor_tags.iter().all(|place| place + 8 <= len), "{one:?}");
            assert!(one.lazy_ranges(4096).iter().all(|range| range.start < range.end && range.end <= len), "{one:?}");
        }
        (Err(Error::Malformed(one)), Err(Error::Malformed(other))) => assert_eq!(one, other),
        (one, other) => panic!("wrong: {one:?} at once, {other:?} in parts"),
    }
}

fuzz_target!(|data: &[u8]| {
    memory::bounded(|| {
        judge(data);
        judge(&framed(data));
    });
});
