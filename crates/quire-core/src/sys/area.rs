//! Address space that this process owns: reserved, mapped piece by piece, given back on drop.
#![allow(unsafe_code)]

use std::mem::{ManuallyDrop, MaybeUninit};
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::sys::file::errno;
use crate::{Error, Result};

/// What may be done with mapped memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    None,
    Read,
    ReadWrite,
    ReadExecute,
}

impl Access {
    const fn prot(self) -> i32 {
        match self {
            Self::None => libc::PROT_NONE,
            Self::Read => libc::PROT_READ,
            Self::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
            Self::ReadExecute => libc::PROT_READ | libc::PROT_EXEC,
        }
    }
}

/// Whether stores reach the file or make private copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    Shared,
    Private,
}

/// An owned range of address space.
///
/// No Rust reference into it is ever made here or above: its memory is read and written by Python, by other
/// threads and by the kernel, and reached from Rust through system calls and raw pointers only. That is what
/// makes remapping parts of it a safe operation for Rust code; what remapping does to the user's data is the
/// concern of the caller.
#[derive(Debug)]
pub struct Area {
    addr: usize,
    len: usize,
}

impl Area {
    /// Reserve `len` bytes that fault when touched.
    pub fn reserve(len: usize) -> Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let addr = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        if addr == libc::MAP_FAILED {
            let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
            if errno == libc::ENOMEM {
                return Err(Error::Memory(format!(
                    "mmap: no room for {len} bytes of address space (RLIMIT_AS, or too large)"
                )));
            }
            return Err(Error::os("mmap", errno));
        }
        Ok(Self { addr: addr as usize, len })
    }

    /// Address space that somebody else has mapped and will unmap: it is never dropped.
    ///
    /// The caller promises that nothing else is there, and that no Rust reference points into it.
    #[must_use]
    pub const fn of_another(addr: usize, len: usize) -> ManuallyDrop<Self> {
        ManuallyDrop::new(Self { addr, len })
    }

    #[must_use]
    pub const fn addr(&self) -> usize {
        self.addr
    }

    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(super) fn at(&self, offset: usize, len: usize) -> *mut libc::c_void {
        assert!(offset <= self.len && len <= self.len - offset, "mapping outside its area");
        (self.addr + offset) as *mut libc::c_void
    }

    fn fixed(&self, offset: usize, len: usize, prot: i32, flags: i32, fd: i32, file_offset: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let want = self.at(offset, len);
        // SAFETY: the range lies in this area, which we own, and no Rust reference into it exists (see above).
        let got = unsafe {
            libc::mmap(want, len, prot, flags | libc::MAP_FIXED | libc::MAP_NORESERVE, fd, file_offset as i64)
        };
        if got == libc::MAP_FAILED { Err(map_error()) } else { Ok(()) }
    }

    /// Replace a part by a mapping of a file, in one step for anybody who touches it.
    pub fn map_file(
        &self,
        offset: usize,
        len: usize,
        fd: BorrowedFd<'_>,
        file_offset: u64,
        sharing: Sharing,
        access: Access,
    ) -> Result<()> {
        let flags = match sharing {
            Sharing::Shared => libc::MAP_SHARED,
            Sharing::Private => libc::MAP_PRIVATE,
        };
        self.fixed(offset, len, access.prot(), flags, fd.as_raw_fd(), file_offset)
    }

    /// Replace a part by private memory that reads zero, in small pages.
    pub fn map_zero(&self, offset: usize, len: usize, access: Access) -> Result<()> {
        self.fixed(offset, len, access.prot(), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)?;
        self.advise(offset, len, libc::MADV_NOHUGEPAGE);
        Ok(())
    }

    /// Give a part's memory back but keep its addresses; touching them faults.
    pub fn map_none(&self, offset: usize, len: usize) -> Result<()> {
        self.fixed(offset, len, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    }

    pub fn protect(&self, offset: usize, len: usize, access: Access) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the range is ours; changing its protection invalidates no Rust reference, since none exists.
        let rc = unsafe { libc::mprotect(self.at(offset, len), len, access.prot()) };
        if rc == 0 { Ok(()) } else { Err(map_error_of("mprotect")) }
    }

    /// Drop private copies of a part, so that it shows what lies below again.
    pub fn drop_private(&self, offset: usize, len: usize) -> Result<()> {
        // SAFETY: the range is ours, and no Rust reference into it exists.
        let rc = unsafe { libc::madvise(self.at(offset, len), len, libc::MADV_DONTNEED) };
        if rc == 0 { Ok(()) } else { Err(Error::last_os("madvise")) }
    }

    /// Keep a part out of forked children.
    pub fn dont_fork(&self, offset: usize, len: usize) -> Result<()> {
        // SAFETY: the range is ours; the advice changes what a later fork copies.
        let rc = unsafe { libc::madvise(self.at(offset, len), len, libc::MADV_DONTFORK) };
        if rc == 0 { Ok(()) } else { Err(Error::last_os("madvise(MADV_DONTFORK)")) }
    }

    /// Let the kernel drop private pages of a part when it needs memory; a write would keep them.
    pub fn free_lazily(&self, offset: usize, len: usize) -> Result<()> {
        // SAFETY: the range is ours, and no Rust reference into it exists. Callable in a signal handler.
        let rc = unsafe { libc::madvise(self.at(offset, len), len, libc::MADV_FREE) };
        if rc == 0 { Ok(()) } else { Err(Error::last_os("madvise(MADV_FREE)")) }
    }

    /// Whether each page of a part is in memory, as bytes whose lowest bit says so.
    pub fn residency(&self, offset: usize, len: usize, out: &mut [u8]) -> Result<()> {
        assert!(out.len() >= len.div_ceil(4096), "a byte for each page");
        // SAFETY: the range is ours; the vector has a byte for each of its pages.
        let rc = unsafe { libc::mincore(self.at(offset, len), len, out.as_mut_ptr()) };
        if rc == 0 { Ok(()) } else { Err(Error::last_os("mincore")) }
    }

    /// Copy bytes out by a system call, which a page that cannot be had ends early; returns how many were copied.
    #[must_use]
    pub fn copy_out(&self, offset: usize, into: &mut [u8]) -> usize {
        let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
        let remote = libc::iovec { iov_base: self.at(offset, into.len()), iov_len: into.len() };
        // SAFETY: the kernel writes to the slice only, and checks the other range itself.
        let n = unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
        usize::try_from(n).unwrap_or(0)
    }

    /// In a forked child: take back the addresses that were kept out of it, so that touching them faults.
    pub fn reclaim(&self) -> Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: NOREPLACE maps only where nothing is mapped.
        let got = unsafe { libc::mmap(self.addr as *mut libc::c_void, self.len, libc::PROT_NONE, flags, -1, 0) };
        if got as usize == self.addr { Ok(()) } else { Err(map_error()) }
    }

    /// Advice whose refusal changes speed only, so it is not an error.
    pub fn advise(&self, offset: usize, len: usize, advice: i32) -> bool {
        if len == 0 {
            return true;
        }
        // SAFETY: the range is ours; the advices used (NOHUGEPAGE, POPULATE_READ, and DONTNEED for pages that nobody
        // needs or that read zero) change no content that counts.
        unsafe { libc::madvise(self.at(offset, len), len, advice) == 0 }
    }

    /// Touch a part that shows file pages, so that its page table is filled: sixteen pages a fault, as the kernel maps
    /// around a fault as long as userfaultfd has no part in it.
    pub fn prefault(&self, offset: usize, len: usize) {
        const AROUND: usize = 16 * 4096;
        for at in (offset..offset + len).step_by(AROUND) {
            let byte = self.at(at, 1).cast::<u8>().cast_const();
            // SAFETY: one mapped readable byte of this area, read as volatile because others may store to it.
            unsafe { byte.read_volatile() };
        }
    }

    /// Read a file into a part. Short files are an error.
    pub fn read_file(&self, offset: usize, len: usize, fd: BorrowedFd<'_>, file_offset: u64) -> Result<()> {
        let mut done = 0;
        while done < len {
            let to = self.at(offset + done, len - done);
            // SAFETY: the destination lies in this area, and no Rust reference into it exists.
            let n = unsafe { libc::pread(fd.as_raw_fd(), to, len - done, (file_offset + done as u64) as i64) };
            match n {
                0 => {
                    return Err(Error::Malformed(format!(
                        "a layer file ends before offset {}",
                        file_offset + len as u64
                    )));
                }
                n if n > 0 => done += n as usize,
                _ if interrupted() => {}
                _ => return Err(Error::last_os("pread")),
            }
        }
        Ok(())
    }

    /// Copy bytes in.
    pub fn store(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: source and destination are valid for the length and cannot overlap, since no Rust slice lies in
        // the area. The caller has mapped the range writable; a range that is not faults like any store would.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.cast(), bytes.len()) };
    }

    /// Lend a part to somebody as bytes. The part must be memory that only this process's Rust code knows of, and that
    /// nobody else is lent at the time.
    pub fn with_bytes<T>(&self, offset: usize, len: usize, work: impl FnOnce(&mut [u8]) -> T) -> T {
        let at = self.at(offset, len).cast::<u8>();
        // SAFETY: mapped writable, never exported, and lent to one at a time: the caller's two duties.
        work(unsafe { std::slice::from_raw_parts_mut(at, len) })
    }

    /// Copy bytes out. The range must be mapped readable.
    pub fn load(&self, offset: usize, to: &mut [MaybeUninit<u8>]) {
        let from = self.at(offset, to.len()).cast::<MaybeUninit<u8>>().cast_const();
        // SAFETY: both are valid for the length and cannot overlap, since no Rust slice lies in the area.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
    }

    /// Whether a whole page reads zero. The page must be mapped readable.
    #[must_use]
    pub fn page_is_zero(&self, offset: usize) -> bool {
        let words = self.at(offset, 4096).cast::<u64>().cast_const();
        for i in 0..512 {
            // SAFETY: 512 aligned words of a page in this area. Other threads may store to it meanwhile, so each is
            // read as volatile and nothing is assumed to stay.
            if unsafe { words.add(i).read_volatile() } != 0 {
                return false;
            }
        }
        true
    }

    /// Whether a whole page holds exactly these bytes. The page must be mapped readable.
    #[must_use]
    pub fn page_equals(&self, offset: usize, bytes: &[u8]) -> bool {
        let words = self.at(offset, 4096).cast::<u64>().cast_const();
        bytes.len() == 4096
            && bytes.chunks_exact(8).enumerate().all(|(i, eight)| {
                let want = u64::from_ne_bytes(eight.try_into().expect("chunks of eight"));
                // SAFETY: 512 aligned words of a page in this area, read as volatile because others may store to it.
                unsafe { words.add(i).read_volatile() == want }
            })
    }

    /// Map more space directly behind the area, if it is free.
    pub fn extend(&mut self, new_len: usize) -> bool {
        let more = new_len - self.len;
        let want = (self.addr + self.len) as *mut libc::c_void;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: NOREPLACE maps only where nothing is mapped.
        let got = unsafe { libc::mmap(want, more, libc::PROT_NONE, flags, -1, 0) };
        if got == want {
            self.len = new_len;
            return true;
        }
        if got != libc::MAP_FAILED {
            // SAFETY: kernels without NOREPLACE may map elsewhere; that new mapping is ours and unused.
            unsafe { libc::munmap(got, more) };
        }
        false
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the whole range is ours and nobody holds a reference into it; views that Python exported keep the
        // owner of the area alive, so it cannot be dropped under them.
        unsafe { libc::munmap(self.addr as *mut libc::c_void, self.len) };
    }
}

pub(crate) fn interrupted() -> bool {
    errno() == libc::EINTR
}

fn map_error() -> Error {
    map_error_of("mmap")
}

fn map_error_of(call: &'static str) -> Error {
    let error = Error::last_os(call);
    if error.errno() == libc::ENOMEM {
        return error.hinted("too many VMAs (vm.max_map_count), address space (RLIMIT_AS) or memory");
    }
    error
}
