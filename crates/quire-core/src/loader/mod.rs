//! Loading shared objects whose code is filled in when it is first touched. docs/images.md has the whole picture.

mod dynamic;
mod group;
mod library;
pub mod plan;
mod reader;
mod relocations;
mod root;
mod symbols;
mod versions;

pub use group::Group;
pub use library::{Library, OpenError, Share};
pub use plan::{Linkage, Plan, Whole};
