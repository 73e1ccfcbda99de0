//! The last page of a layer, from bytes that anybody may have written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quire_core::layer::Trailer;
use quire_fuzz::{PAGE, Page, memory, seeds};

/// Whatever is accepted says the same when it is written again.
fn judge(page: &[u8], file_bytes: u64) {
    let Ok(trailer) = Trailer::decode(page, file_bytes) else { return };
    assert_eq!(trailer.file_bytes(), file_bytes);
    let again = trailer.encode();
    assert_eq!(again[..4060].len(), page[..4060].len());
    let known = |at: usize| at < 80 || (128..128 + 16 * trailer.imports.len()).contains(&at);
    assert!((0..4060).filter(|at| known(*at)).all(|at| again[at] == page[at]), "a field got lost");
    let second = Trailer::decode(&again[..], file_bytes);
    assert!(trailer.hashed || second.is_ok(), "what was accepted is refused: {second:?}");
}

// Only this target writes the seeds; they are those of all.
fuzz_target!(init: seeds::write_if_asked(), |data: &[u8]| {
    memory::bounded(|| {
        judge(data, data.len() as u64);
        // Short inputs are fields; the rest of the page, the checksum and the length are made to fit.
        let mut page: Page = [0; PAGE as usize];
        let len = data.len().min(4060);
        page[..len].copy_from_slice(&data[..len]);
        page[..8].copy_from_slice(b"QUIRELYR");
        page[8..12].copy_from_slice(&1u32.to_le_bytes());
        page[72..80].copy_from_slice(&PAGE.to_le_bytes());
        let crc = crc32fast::hash(&page[..4060]);
        page[4060..4064].copy_from_slice(&crc.to_le_bytes());
        let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("eight bytes"));
        let bytes = word(32).wrapping_add(word(40)).wrapping_add(1).wrapping_mul(PAGE);
        judge(&page, bytes);
    });
});
