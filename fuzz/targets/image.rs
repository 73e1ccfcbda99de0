//! Program files of every format, from bytes that anybody may have written.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use quire_core::image::{Window, elf, macho, pe};
use quire_core::source::{Filled, Plain, ReadAt};
use quire_core::{Error, Result};
use quire_fuzz::memory;

struct Bytes(Vec<u8>);

impl ReadAt for Bytes {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Filled {
        let start = offset as usize;
        into.copy_from_slice(&self.0[start..start + into.len()]);
        Ok(())
    }
}

/// An answer, or the one documented refusal.
fn judge<T>(answer: Result<T>) {
    match answer {
        Ok(_) | Err(Error::Malformed(_)) => {}
        Err(other) => panic!("wrong: {other}"),
    }
}

fn ask_everything(data: Vec<u8>) {
    let size = data.len() as u64;
    let window = Window::new(Arc::new(Plain(Arc::new(Bytes(data)))), 0, size).expect("all of it");
    judge(elf::header(&window));
    judge(elf::segments(&window));
    judge(elf::sections(&window));
    judge(elf::interpreter(&window));
    judge(elf::dynamic(&window));
    judge(elf::symbols(&window, elf::SymbolTable::Dynamic));
    judge(elf::symbols(&window, elf::SymbolTable::Static));
    judge(elf::relocations(&window));
    judge(elf::notes(&window));
    judge(elf::bytes_at(&window, 0x1000, 64));
    judge(pe::header(&window));
    judge(pe::sections(&window));
    judge(pe::imports(&window));
    judge(pe::exports(&window));
    judge(pe::relocations(&window));
    judge(pe::tls(&window));
    judge(macho::members(&window));
    judge(macho::header(&window));
    judge(macho::segments(&window));
    judge(macho::symbols(&window));
    judge(macho::exports(&window));
    judge(macho::fixups(&window));
}

/// A Mach-O file of 64 bits whose load commands are the input.
fn framed(data: &[u8]) -> Vec<u8> {
    let commands = u32::from(data.first().copied().unwrap_or(0));
    let mut out = Vec::new();
    for word in [0xfeed_facf, 0x0100_000c, 0, 6, commands, data.len().saturating_sub(1) as u32, 0, 0] {
        out.extend(u32::to_le_bytes(word));
    }
    out.extend(data.get(1..).unwrap_or(&[]));
    out
}

fuzz_target!(|data: &[u8]| {
    memory::bounded(|| {
        ask_everything(data.to_vec());
        ask_everything(framed(data));
    });
});
