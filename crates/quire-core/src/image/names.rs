//! What the specifications call the numbers in ELF files.

use object::elf::{
    DynamicTag, FileType, Machine, ProgramType, RelocationType, SectionType, SymbolBind, SymbolType, machine_names,
};

/// The constant of a kind that has this value; the kind is the prefix of its name, as in `DT_NEEDED`.
#[must_use]
pub fn elf(kind: &str, machine: u16, value: i64) -> Option<&'static str> {
    let machine = Machine(machine);
    let names = machine_names(machine);
    let (word, half, byte) = (u32::try_from(value).ok(), u16::try_from(value).ok(), u8::try_from(value).ok());
    match kind {
        "EM" => Machine(half?).name(),
        "ET" => names.et.name(FileType(half?)),
        "PT" => names.pt.name(ProgramType(word?)),
        "SHT" => names.sht.name(SectionType(word?)),
        "DT" => names.dt.name(DynamicTag(value)),
        "STB" => names.stb.name(SymbolBind(byte?)),
        "STT" => names.stt.name(SymbolType(byte?)),
        "R" => names.r.name(RelocationType(word?)),
        _ => None,
    }
}
