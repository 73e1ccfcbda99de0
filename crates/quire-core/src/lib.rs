//! Virtual memory mechanism: layers, page tables, snapshots, mappings and segments.
//!
//! No Python here. Imports point down: `sys` (one file per kernel facility), then `layer`, `table` and
//! `snapshot`, then `mapping`, `segment` and `live`. Unsafe code is allowed in the modules that say so.

#![deny(unsafe_code)]

pub mod error;
pub mod forking;
pub mod image;
pub mod layer;
pub mod layout;
pub mod lent;
pub mod live;
pub mod loader;
pub mod mapping;
pub mod pack;
pub mod pages;
pub mod procmaps;
pub mod publish;
pub mod purgeable;
pub mod region;
pub mod save;
pub mod segment;
pub mod snapshot;
pub mod source;
pub mod sys;
pub mod table;

pub use error::{Error, Result};
pub use layer::MAX_LAYERS;
pub use live::{LiveSegment, MirrorView};
pub use mapping::Mapping;
pub use pages::PAGE;
pub use purgeable::{Entry, Purgeable, Store};
pub use segment::Segment;
pub use snapshot::{Snapshot, Stats};
