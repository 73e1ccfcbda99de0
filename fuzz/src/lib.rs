//! What the fuzz targets share: layer files that can be bent, a second reading of the format, and checks.

pub mod exercise;
pub mod files;
pub mod honest;
pub mod memory;
pub mod model;
pub mod recipe;
pub mod seeds;

pub use quire_core::pages::PAGE;

/// A page as bytes.
pub type Page = [u8; PAGE as usize];
