//! What a first pass over compressed data has found, and what was touched of it (`notes`), kept in files that all processes
//! of a user share.
//!
//! Byte layout: docs/formats.md. The cache is an optimisation that must never be in the way: what cannot be read, written
//! or believed is treated as not there.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::sys::random::id128;
use crate::sys::user::effective_id;

const MAGIC: &[u8; 8] = b"QUIREIDX";
const VERSION: u32 = 1;
const HEADER: usize = 8 + 4 + 4 + 32 + 8;
const HASH: usize = 32;
/// The longest file that is read or written.
const FILE_MAX: u64 = 128 << 20;
/// All files together; the oldest go when there is more.
const TOTAL_MAX: u64 = 256 << 20;

/// The directory that holds the files, or would.
#[derive(Clone, Debug)]
pub struct Cache {
    path: PathBuf,
}

/// A file in the making.
pub struct Writer {
    kind: u32,
    key: [u8; 32],
    bytes: Vec<u8>,
}

impl Writer {
    pub fn new(kind: u32, key: &[u8; 32]) -> Self {
        let mut bytes = Vec::with_capacity(4096);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(&[0; 8]);
        Self { kind, key: *key, bytes }
    }

    pub fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// A length and as many bytes.
    pub fn bytes(&mut self, value: &[u8]) {
        self.u32(value.len() as u32);
        self.bytes.extend_from_slice(value);
    }

    /// What was written so far.
    #[cfg(test)]
    pub fn payload(&self) -> Vec<u8> {
        self.bytes[HEADER..].to_vec()
    }

    fn finish(mut self) -> Vec<u8> {
        let length = (self.bytes.len() + HASH) as u64;
        self.bytes[HEADER - 8..HEADER].copy_from_slice(&length.to_le_bytes());
        let hash = blake3::hash(&self.bytes);
        self.bytes.extend_from_slice(hash.as_bytes());
        self.bytes
    }
}

/// Reads what a `Writer` wrote; None where there is no more.
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(head)
    }

    pub fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    pub fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = self.u32()?;
        self.take(length as usize)
    }
}

/// The payload of a file, if it is whole and about these bytes.
fn payload(mut bytes: Vec<u8>, kind: u32, key: &[u8; 32]) -> Option<Vec<u8>> {
    let expected = Writer::new(kind, key).bytes;
    let length = bytes.len().checked_sub(HASH)?;
    if length < HEADER || bytes[..HEADER - 8] != expected[..HEADER - 8] {
        return None;
    }
    if bytes[HEADER - 8..HEADER] != (bytes.len() as u64).to_le_bytes() {
        return None;
    }
    if blake3::hash(&bytes[..length]).as_bytes()[..] != bytes[length..] {
        return None;
    }
    bytes.truncate(length);
    bytes.drain(..HEADER);
    Some(bytes)
}

impl Cache {
    /// # Args
    /// `path` is made when something is stored, readable for its owner only. One that exists is used only if it is ours
    /// and nobody else's.
    #[must_use]
    pub const fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// The directory, open, if only we can have put anything there.
    fn directory(&self) -> Option<File> {
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let directory = OpenOptions::new().read(true).custom_flags(flags).open(&self.path).ok()?;
        let status = directory.metadata().ok()?;
        (status.uid() == effective_id() && status.mode() & 0o077 == 0).then_some(directory)
    }

    pub fn load(&self, kind: u32, key: &[u8; 32]) -> Option<Vec<u8>> {
        let directory = self.directory()?;
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(inside(&directory, &name(kind, key))).ok()?;
        let status = file.metadata().ok()?;
        if !status.is_file() || status.uid() != effective_id() || status.len() > FILE_MAX {
            return None;
        }
        let mut bytes = Vec::new();
        file.take(FILE_MAX).read_to_end(&mut bytes).ok()?;
        payload(bytes, kind, key)
    }

    /// Whether it was stored. Nobody waits for the cache: without it the next first pass is a real one.
    pub fn store(&self, file: Writer) -> bool {
        self.try_store(file).is_some()
    }

    fn try_store(&self, file: Writer) -> Option<()> {
        let name = name(file.kind, &file.key);
        let bytes = file.finish();
        if bytes.len() as u64 > FILE_MAX {
            return None;
        }
        if !self.path.exists() {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.path).ok()?;
        }
        let directory = self.directory()?;
        let random: String = id128().ok()?.iter().map(|byte| format!("{byte:02x}")).collect();
        let temporary = inside(&directory, &format!(".{random}.tmp"));
        let written = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|mut file| file.write_all(&bytes))
            .and_then(|()| std::fs::rename(&temporary, inside(&directory, &name)));
        if written.is_err() {
            std::fs::remove_file(&temporary).ok()?;
        }
        prune(&directory)
    }
}

fn name(kind: u32, key: &[u8; 32]) -> String {
    let key: String = key.iter().take(20).map(|byte| format!("{byte:02x}")).collect();
    format!("{key}-{kind}.idx")
}

/// A path that goes through the directory that was checked, whatever its name leads to now.
fn inside(directory: &File, name: &str) -> PathBuf {
    Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name)
}

/// Remove the oldest files beyond the bound. What a crash left unfinished is among them.
fn prune(directory: &File) -> Option<()> {
    let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(inside(directory, ".")).ok()?.flatten() {
        let Ok(status) = entry.metadata() else { continue };
        let path = entry.path();
        if status.is_file() && path.extension().is_some_and(|ending| ending == "idx" || ending == "tmp") {
            files.push((status.modified().unwrap_or(SystemTime::UNIX_EPOCH), status.len(), path));
        }
    }
    files.sort();
    let mut total: u64 = files.iter().map(|(_, length, _)| length).sum();
    for (_, length, path) in files {
        if total <= TOTAL_MAX {
            break;
        }
        std::fs::remove_file(path).ok()?;
        total -= length;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_comes_back_and_no_damage_does() {
        let key = [7; 32];
        let mut out = Writer::new(2, &key);
        out.u64(99);
        out.bytes(b"abc");
        let file = out.finish();
        let good = payload(file.clone(), 2, &key).unwrap();
        let mut from = Reader::new(&good);
        assert_eq!((from.u64(), from.bytes(), from.u32()), (Some(99), Some(&b"abc"[..]), None));
        assert!(payload(file.clone(), 1, &key).is_none() && payload(file.clone(), 2, &[8; 32]).is_none());
        for at in 0..file.len() {
            let mut bad = file.clone();
            bad[at] ^= 1;
            assert!(payload(bad, 2, &key).is_none(), "byte {at}");
            assert!(payload(file[..at].to_vec(), 2, &key).is_none(), "cut at {at}");
        }
    }
}
