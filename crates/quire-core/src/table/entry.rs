//! One page-table entry; the bits are in docs/formats.md.

use crate::layer::MAX_LAYERS;
use crate::pages::FANOUT;

const INDEX_BITS: u32 = 48;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
const SLOT_MASK: u64 = (MAX_LAYERS as u64 - 1) << INDEX_BITS;
const KIND_RUN: u64 = 1 << 62;
const KIND_NODE: u64 = 2 << 62;

/// An entry as it stands in a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry(u64);

/// What an entry says. Slot 0 is the layer that holds the entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Zero,
    Run { slot: u8, index: u64 },
    Node { slot: u8, index: u64 },
}

impl Entry {
    pub const ZERO: Self = Self(0);

    #[must_use]
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    #[must_use]
    pub const fn run(slot: u8, index: u64) -> Self {
        Self(KIND_RUN | (slot as u64) << INDEX_BITS | index)
    }

    #[must_use]
    pub const fn node(slot: u8, index: u64) -> Self {
        Self(KIND_NODE | (slot as u64) << INDEX_BITS | index)
    }

    /// The slot, whatever the kind.
    #[must_use]
    pub const fn slot(self) -> u8 {
        ((self.0 & SLOT_MASK) >> INDEX_BITS) as u8
    }

    /// The same entry with another slot.
    #[must_use]
    pub const fn with_slot(self, slot: u8) -> Self {
        Self(self.0 & !SLOT_MASK | (slot as u64) << INDEX_BITS)
    }

    /// None for an invalid entry.
    #[must_use]
    pub const fn decode(self) -> Option<Kind> {
        if self.0 == 0 {
            return Some(Kind::Zero);
        }
        let slot = ((self.0 & SLOT_MASK) >> INDEX_BITS) as u8;
        let index = self.0 & INDEX_MASK;
        match self.0 & !(SLOT_MASK | INDEX_MASK) {
            KIND_RUN => Some(Kind::Run { slot, index }),
            KIND_NODE => Some(Kind::Node { slot, index }),
            _ => None,
        }
    }
}

/// Pages that an entry at a level covers: 512^level.
#[must_use]
pub const fn span(level: u32) -> u64 {
    1 << (9 * level)
}

/// The level of the root entry of a table for so many pages: the smallest, at least 1, that covers them.
#[must_use]
pub const fn level_for(pages: u64) -> u32 {
    let mut level = 1;
    while span(level) < pages {
        level += 1;
    }
    level
}

const _: () = assert!(span(1) == FANOUT);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_a_round_trip() {
        for (slot, index) in [(0, 0), (63, INDEX_MASK), (5, 12345)] {
            assert_eq!(Entry::run(slot, index).decode(), Some(Kind::Run { slot, index }));
            assert_eq!(Entry::node(slot, index).decode(), Some(Kind::Node { slot, index }));
        }
        assert_eq!(Entry::ZERO.decode(), Some(Kind::Zero));
    }

    #[test]
    fn reserved_bits_and_kinds_are_refused() {
        for raw in [1, 3 << 62, KIND_RUN | 1 << 54, KIND_NODE | 1 << 61, 5 << 48] {
            assert_eq!(Entry::from_raw(raw).decode(), None, "{raw:#x}");
        }
    }

    #[test]
    fn levels() {
        assert_eq!([1, 512, 513, 1 << 18, (1 << 18) + 1, 1 << 35].map(level_for), [1, 1, 2, 2, 3, 4]);
    }
}
