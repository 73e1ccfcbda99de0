//! Loading shared objects whose code is filled in when it is first touched. docs/images.md has the whole picture.

mod dynamic;
mod library;
pub mod plan;
mod reader;
mod relocations;
mod symbols;
mod versions;

pub use library::{Library, OpenError, Share};
pub use plan::{Linkage, Plan, Whole};
