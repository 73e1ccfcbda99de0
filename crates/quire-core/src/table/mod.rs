//! The page table: a persistent radix tree in the nodes of layers.

pub mod build;
pub mod diff;
pub mod entry;
pub mod walk;

pub use entry::{Entry, Kind, level_for, span};
