//! The kernel, one file per facility. Nothing above this module makes a system call.

pub mod alloc;
pub mod area;
pub mod calls;
pub mod dl;
pub mod file;
pub mod fork;
pub mod futex;
pub mod hold;
pub mod lazyfree;
pub mod memfd;
pub mod memory;
pub mod pagemap;
pub mod private;
pub mod probe;
pub mod process;
pub mod psi;
pub mod random;
pub mod signals;
pub mod socket;
pub mod sysv;
pub mod threads;
pub mod tracking;
pub mod uffd;
pub mod user;
