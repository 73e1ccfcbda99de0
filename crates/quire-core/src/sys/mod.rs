//! The kernel, one file per facility. Nothing above this module makes a system call.

pub mod area;
pub mod file;
pub mod fork;
pub mod futex;
pub mod hold;
pub mod lazyfree;
pub mod memfd;
pub mod memory;
pub mod pagemap;
pub mod probe;
pub mod psi;
pub mod random;
pub mod signals;
pub mod sysv;
pub mod tracking;
pub mod uffd;
pub mod user;
