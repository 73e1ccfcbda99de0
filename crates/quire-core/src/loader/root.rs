//! A shared object that does nothing but need others: the dynamic linker maps all of them before it links any, and then
//! finds each among what is loaded, by its `DT_SONAME`.

use std::ffi::CString;

use object::elf::{self, Dyn64, DynamicTag, FileHeader64, Ident, ProgramFlags, ProgramHeader64, ProgramType, Sym64};
use object::pod::{bytes_of, bytes_of_slice};
use object::{I64, LittleEndian as LE, U16, U32, U64};

use super::plan::machine;
use crate::pages::PAGE;

const SEGMENTS: usize = 3;
/// A hash table with one bucket, which is empty: no name is found here.
const HASH: [u32; 4] = [1, 1, 0, 0];
/// Entries beside those of `DT_NEEDED`, with the one that ends them.
const OTHER_ENTRIES: usize = 6;

/// The bytes of an object that needs these names, in their order.
///
/// One segment, which is written to and not executed: headers, a symbol table and a hash table without symbols, the
/// dynamic section, names.
pub fn object(needed: &[CString]) -> Vec<u8> {
    let headers = size_of::<FileHeader64<LE>>() + SEGMENTS * size_of::<ProgramHeader64<LE>>();
    let symbols = headers;
    let hash = symbols + size_of::<Sym64<LE>>();
    let dynamic = hash + size_of_val(&HASH);
    let dynamic_bytes = (needed.len() + OTHER_ENTRIES) * size_of::<Dyn64<LE>>();
    let names_at = dynamic + dynamic_bytes;

    let mut names = vec![0];
    let mut entries = Vec::with_capacity(needed.len() + OTHER_ENTRIES);
    for name in needed {
        entries.push(entry(elf::DT_NEEDED, names.len()));
        names.extend_from_slice(name.as_bytes_with_nul());
    }
    entries.extend([
        entry(elf::DT_HASH, hash),
        entry(elf::DT_STRTAB, names_at),
        entry(elf::DT_SYMTAB, symbols),
        entry(elf::DT_STRSZ, names.len()),
        entry(elf::DT_SYMENT, size_of::<Sym64<LE>>()),
        entry(elf::DT_NULL, 0),
    ]);

    let size = names_at + names.len();
    let segments: [ProgramHeader64<LE>; SEGMENTS] = [
        segment(elf::PT_LOAD, 0, size, PAGE as usize),
        segment(elf::PT_DYNAMIC, dynamic, dynamic_bytes, 8),
        // Without it the dynamic linker would make stacks executable.
        segment(elf::PT_GNU_STACK, 0, 0, 16),
    ];
    let mut bytes = Vec::with_capacity(size);
    bytes.extend_from_slice(bytes_of(&file_header()));
    bytes.extend_from_slice(bytes_of_slice(&segments));
    bytes.resize(hash, 0);
    bytes.extend(HASH.iter().flat_map(|word| word.to_le_bytes()));
    bytes.extend_from_slice(bytes_of_slice(&entries));
    bytes.extend_from_slice(&names);
    bytes
}

fn file_header() -> FileHeader64<LE> {
    FileHeader64 {
        e_ident: Ident {
            magic: elf::ELFMAG,
            class: elf::ELFCLASS64,
            data: elf::ELFDATA2LSB,
            version: elf::FileVersion(1),
            os_abi: elf::ELFOSABI_NONE,
            abi_version: 0,
            padding: [0; 7],
        },
        e_type: U16::new(LE, elf::ET_DYN),
        e_machine: U16::new(LE, elf::Machine(machine::NUMBER)),
        e_version: U32::new(LE, 1),
        e_entry: U64::new(LE, 0),
        e_phoff: U64::new(LE, size_of::<FileHeader64<LE>>() as u64),
        e_shoff: U64::new(LE, 0),
        e_flags: U32::new(LE, elf::FileFlags(0)),
        e_ehsize: U16::new(LE, size_of::<FileHeader64<LE>>() as u16),
        e_phentsize: U16::new(LE, size_of::<ProgramHeader64<LE>>() as u16),
        e_phnum: U16::new(LE, SEGMENTS as u16),
        e_shentsize: U16::new(LE, 0),
        e_shnum: U16::new(LE, 0),
        e_shstrndx: U16::new(LE, elf::SymbolSection(0)),
    }
}

fn segment(kind: ProgramType, at: usize, len: usize, align: usize) -> ProgramHeader64<LE> {
    let [at, len] = [at, len].map(|number| U64::new(LE, number as u64));
    ProgramHeader64 {
        p_type: U32::new(LE, kind),
        p_flags: U32::new(LE, ProgramFlags(elf::PF_R.0 | elf::PF_W.0)),
        p_offset: at,
        p_vaddr: at,
        p_paddr: at,
        p_filesz: len,
        p_memsz: len,
        p_align: U64::new(LE, align as u64),
    }
}

fn entry(tag: DynamicTag, value: usize) -> Dyn64<LE> {
    Dyn64 { d_tag: I64::new(LE, tag), d_val: U64::new(LE, value as u64) }
}

#[cfg(test)]
mod tests {
    use super::super::plan::Plan;
    use super::*;

    #[test]
    fn is_an_object_like_others() {
        for count in [0, 1, 500] {
            let needed: Vec<_> = (0..count).map(|at| CString::new(format!("/proc/1/fd/{at}")).unwrap()).collect();
            let bytes = object(&needed);
            let plan = Plan::read(&bytes[..]).unwrap();
            let names: Vec<_> = needed.iter().map(|name| name.as_bytes().to_vec()).collect();
            assert_eq!(plan.linkage.needed, names);
            assert_eq!((plan.whole, plan.init, plan.init_array.is_empty()), (None, None, true));
            assert!(!plan.segments[0].executable);
        }
    }
}
