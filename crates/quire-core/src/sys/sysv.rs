//! System V shared memory: made, attached into areas, removed when the last process detaches.
#![allow(unsafe_code)]

use crate::sys::area::Area;
use crate::{Error, Result};

/// The id of a segment. Attaching one that is marked for removal is still possible on Linux.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedId(pub i32);

impl SharedId {
    pub fn create(len: usize) -> Result<Self> {
        // SAFETY: plain system call.
        let id = unsafe { libc::shmget(libc::IPC_PRIVATE, len, libc::IPC_CREAT | 0o600) };
        if id < 0 {
            return Err(Error::last_os("shmget").hinted("see kernel.shmmax, kernel.shmall and kernel.shmmni"));
        }
        Ok(Self(id))
    }

    /// Mark for removal: it is destroyed with its last attachment, crashes included.
    pub fn remove(self) -> Result<()> {
        // SAFETY: IPC_RMID takes no buffer.
        let rc = unsafe { libc::shmctl(self.0, libc::IPC_RMID, std::ptr::null_mut()) };
        if rc == 0 { Ok(()) } else { Err(Error::last_os("shmctl(IPC_RMID)")) }
    }

    /// Attach all of it over the first bytes of an area, which must be at least as large.
    pub fn attach(self, area: &Area, read_only: bool) -> Result<()> {
        let size = self.size()?;
        if size > area.len() as u64 {
            return Err(Error::Malformed(format!("System V segment {} has {size} bytes, not {}", self.0, area.len())));
        }
        let flags = libc::SHM_REMAP | if read_only { libc::SHM_RDONLY } else { 0 };
        // SAFETY: the area is ours, large enough, and no Rust reference into it exists, so it may be replaced.
        let at = unsafe { libc::shmat(self.0, area.addr() as *const libc::c_void, flags) };
        if at as isize == -1 { Err(Error::last_os("shmat")) } else { Ok(()) }
    }

    /// Bytes, as they were asked for.
    pub fn size(self) -> Result<u64> {
        // SAFETY: an all-zero shmid_ds is a valid value of the plain C struct.
        let mut info: libc::shmid_ds = unsafe { std::mem::zeroed() };
        // SAFETY: IPC_STAT fills the struct, which outlives the call.
        if unsafe { libc::shmctl(self.0, libc::IPC_STAT, &raw mut info) } != 0 {
            return Err(Error::last_os("shmctl(IPC_STAT)"));
        }
        Ok(info.shm_segsz as u64)
    }
}
