//! The relocations of a shared object: where the dynamic linker writes while it links.

use object::elf::{self, Rela64, RelocationType, Sym64};
use object::{LittleEndian as LE, ReadRef, U64};

use super::dynamic::Object;
use super::plan::{Segment, Whole, malformed};
use crate::Result;

#[cfg(target_arch = "x86_64")]
mod kinds {
    use object::elf::{self, RelocationType};

    pub const NONE: RelocationType = elf::R_X86_64_NONE;
    pub const RELATIVE: RelocationType = elf::R_X86_64_RELATIVE;
    pub const COPY: RelocationType = elf::R_X86_64_COPY;
    pub const IRELATIVE: RelocationType = elf::R_X86_64_IRELATIVE;
    pub const TLSDESC: RelocationType = elf::R_X86_64_TLSDESC;
    /// Of variables that each thread has.
    pub const TLS: [RelocationType; 3] = [elf::R_X86_64_DTPMOD64, elf::R_X86_64_TPOFF64, TLSDESC];
    /// Those that write four bytes.
    pub const SHORT: [RelocationType; 3] = [elf::R_X86_64_32, elf::R_X86_64_PC32, elf::R_X86_64_SIZE32];
}
#[cfg(target_arch = "aarch64")]
mod kinds {
    use object::elf::{self, RelocationType};

    pub const NONE: RelocationType = elf::R_AARCH64_NONE;
    pub const RELATIVE: RelocationType = elf::R_AARCH64_RELATIVE;
    pub const COPY: RelocationType = elf::R_AARCH64_COPY;
    pub const IRELATIVE: RelocationType = elf::R_AARCH64_IRELATIVE;
    pub const TLSDESC: RelocationType = elf::R_AARCH64_TLSDESC;
    /// Of variables that each thread has.
    pub const TLS: [RelocationType; 3] = [elf::R_AARCH64_TLS_DTPMOD, elf::R_AARCH64_TLS_TPREL, TLSDESC];
    /// Those that write four bytes.
    pub const SHORT: [RelocationType; 1] = [elf::R_AARCH64_ABS32];
}

/// Bytes that a relocation writes.
fn width(kind: RelocationType) -> u64 {
    match kind {
        kinds::TLSDESC => 16,
        kind if kinds::SHORT.contains(&kind) => 4,
        _ => 8,
    }
}

impl<'d, R: ReadRef<'d>> Object<R> {
    /// Check a table of relocations with addends. The first `relative` of it are said to add the load address only.
    pub fn relocations(
        &mut self,
        field: &str,
        address: u64,
        bytes: u64,
        relative: u64,
        symbols: &[Sym64<LE>],
        text: bool,
    ) -> Result<()> {
        let offset = self.table(field, address, bytes)?;
        let entries = self.file.slice::<Rela64<LE>>(field, offset, bytes / size_of::<Rela64<LE>>() as u64)?;
        let mut indirect = false;
        let mut targets = Targets::new(&self.segments, text);
        for (number, entry) in entries.iter().enumerate() {
            let wrong = |what: std::fmt::Arguments<'_>| malformed(field, format_args!("entry {number} {what}"));
            let info = entry.r_info.get(LE);
            let (kind, symbol) = (RelocationType(info as u32), info >> 32);
            if (number as u64) < relative && kind != kinds::RELATIVE {
                return Err(wrong(format_args!("is not relative, though it is among the first {relative}")));
            }
            if kind == kinds::NONE {
                continue;
            }
            if kind == kinds::COPY {
                return Err(wrong(format_args!("is a copy relocation, which only programs have")));
            }
            if kind == kinds::IRELATIVE {
                indirect = true;
                let resolver = entry.r_addend.get(LE);
                if u64::try_from(resolver).is_err() || !self.is_code(resolver as u64) {
                    return Err(wrong(format_args!("has a resolver at {resolver:#x}, which is not in code")));
                }
            }
            let used = usize::try_from(symbol).ok().and_then(|symbol| symbols.get(symbol));
            let used = used.ok_or_else(|| wrong(format_args!("uses symbol {symbol}, which does not exist")))?;
            if kinds::TLS.contains(&kind) && !self.may_be_tls(symbol, used) {
                return Err(wrong(format_args!("is for thread-local memory, and symbol {symbol} has none (PT_TLS)")));
            }
            targets.check(field, entry.r_offset.get(LE), width(kind))?;
        }
        if indirect {
            self.whole = Some(Whole::IndirectFunctions);
        }
        Ok(())
    }

    /// Whether a symbol may be in a block that each thread gets. The dynamic linker divides by the alignment of that block.
    fn may_be_tls(&self, number: u64, symbol: &Sym64<LE>) -> bool {
        if number == 0 || symbol.st_shndx.get(LE) != elf::SHN_UNDEF {
            return self.has_tls;
        }
        symbol.st_type() == elf::STT_TLS
    }

    pub fn relative(&mut self, address: u64, bytes: u64, text: bool) -> Result<()> {
        let field = "DT_RELR";
        let offset = self.table(field, address, bytes)?;
        let mut targets = Targets::new(&self.segments, text);
        let mut next: Option<u64> = None;
        for entry in self.file.slice::<U64<LE>>(field, offset, bytes / 8)? {
            let entry = entry.get(LE);
            if entry & 1 == 0 {
                targets.check(field, entry, 8)?;
                next = Some(entry.saturating_add(8));
                continue;
            }
            // The dynamic linker counts from address 0 of the process then.
            let start = next.ok_or_else(|| malformed(field, "it begins with a bitmap, which belongs to no address"))?;
            for bit in (1..64).filter(|bit| entry >> bit & 1 != 0) {
                targets.check(field, start.saturating_add(8 * (bit - 1)), 8)?;
            }
            next = Some(start.saturating_add(8 * 63));
        }
        Ok(())
    }
}

/// Where relocations may point: into the memory of a segment that is written, or of any if there are text relocations.
struct Targets<'a> {
    segments: &'a [Segment],
    text: bool,
    last: usize,
}

impl<'a> Targets<'a> {
    const fn new(segments: &'a [Segment], text: bool) -> Self {
        Self { segments, text, last: 0 }
    }

    fn check(&mut self, field: &str, address: u64, bytes: u64) -> Result<()> {
        let holds = |segment: &Segment| {
            (segment.writable || self.text)
                && address
                    .checked_sub(segment.address)
                    .is_some_and(|inside| inside <= segment.memory_bytes && bytes <= segment.memory_bytes - inside)
        };
        if holds(&self.segments[self.last]) {
            return Ok(());
        }
        self.last = self.segments.iter().position(holds).ok_or_else(|| {
            malformed(field, format_args!("a relocation of address {address:#x}, which is not writable memory of it"))
        })?;
        Ok(())
    }
}
