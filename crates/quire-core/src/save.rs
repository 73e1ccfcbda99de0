//! Saving a snapshot to a file, and loading it again.
#![allow(unsafe_code)]

use std::ffi::{CString, OsString};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::layer::{Draft, HASH_AT, Layer, LayerId, Origins, Trailer};
use crate::pages::{PAGE, PageRange};
use crate::snapshot::Snapshot;
use crate::sys::memfd::{self, Piece};
use crate::table::build::{Patch, Table, Target, build};
use crate::table::walk::Source;
use crate::{Error, Result};

const CHUNK_PAGES: u64 = 256;

/// Write a snapshot to a file as one layer with a hash. The file appears complete or not at all.
pub fn save(snapshot: &Snapshot, path: &Path) -> Result<()> {
    check_path(path)?;
    let dir = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let (file, named) =
        match OpenOptions::new().write(true).read(true).mode(0o666).custom_flags(libc::O_TMPFILE).open(dir) {
            Ok(file) => (file, None),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => {
                let name = sibling(path)?;
                let file = OpenOptions::new()
                    .write(true)
                    .read(true)
                    .create_new(true)
                    .open(&name)
                    .map_err(io_at("open", &name))?;
                (file, Some(name))
            }
            Err(error) => return Err(io_at("open", dir)(error)),
        };
    let written = write_hashed(snapshot, &file).and_then(|()| file.sync_all().map_err(io("fsync")));
    let placed = written.and_then(|()| place(&file, named.as_deref(), path));
    if let (Err(error), Some(name)) = (&placed, &named) {
        // The name may be gone already, if it was placed and a later step failed; the first error is what counts.
        return match std::fs::remove_file(name) {
            Ok(()) => Err(error.clone()),
            Err(other) if other.kind() == std::io::ErrorKind::NotFound => Err(error.clone()),
            Err(other) => Err(error.clone().hinted(&format!("and {} stays: {other}", name.display()))),
        };
    }
    placed?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io("fsync"))
}

fn io(call: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::os(call, error.raw_os_error().unwrap_or(libc::EIO))
}

/// The same, with the path that the caller gave.
fn io_at<'a>(call: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> Error + 'a {
    move |error| io(call)(error).hinted(&path.display().to_string())
}

fn check_path(path: &Path) -> Result<()> {
    if path.as_os_str().as_bytes().contains(&0) {
        return Err(Error::Invalid("a path with a NUL byte".to_owned()));
    }
    Ok(())
}

fn sibling(path: &Path) -> Result<PathBuf> {
    let random = crate::sys::random::id128()?;
    let mut name = OsString::from(".quire-");
    name.push(random.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    Ok(path.with_file_name(name))
}

/// Give the finished file its name, replacing what was there in one step.
fn place(file: &File, named: Option<&Path>, path: &Path) -> Result<()> {
    if let Some(name) = named {
        return std::fs::rename(name, path).map_err(io_at("rename", path));
    }
    match link(file, path) {
        Err(error) if error.errno() == libc::EEXIST => {
            let name = sibling(path)?;
            link(file, &name)?;
            std::fs::rename(&name, path).map_err(|error| {
                let failed = io_at("rename", path)(error);
                match std::fs::remove_file(&name) {
                    Ok(()) => failed,
                    Err(other) => failed.hinted(&format!("and {} stays: {other}", name.display())),
                }
            })
        }
        other => other,
    }
}

fn link(file: &File, path: &Path) -> Result<()> {
    let to_c = |bytes: &[u8]| CString::new(bytes).map_err(|_| Error::Invalid("a path with a NUL byte".to_owned()));
    let from = to_c(format!("/proc/self/fd/{}", file.as_raw_fd()).as_bytes())?;
    let to = to_c(path.as_os_str().as_bytes())?;
    // SAFETY: both are NUL-terminated strings that outlive the call.
    let rc =
        unsafe { libc::linkat(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), libc::AT_SYMLINK_FOLLOW) };
    if rc == 0 { Ok(()) } else { Err(Error::last_os("linkat").hinted(&path.display().to_string())) }
}

/// Call `write` with the pages that hold data, in page order, and return the table that describes them.
fn compact(snapshot: &Snapshot, mut write: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<(Table, u64)> {
    let mut patches = Vec::new();
    let mut written = 0;
    let mut buf = vec![0u8; (CHUNK_PAGES * PAGE) as usize];
    for extent in snapshot.extents()? {
        let Source::Layer { layer, index } = extent.source else { continue };
        let layer = &snapshot.layers()[layer as usize];
        // Holes read zero and need not be stored; only long runs have any.
        let named = PageRange::new(index, extent.pages.len);
        let stored = if named.len < CHUNK_PAGES { vec![named] } else { layer.data_ranges(named)? };
        for part in stored {
            let pages = PageRange::new(extent.pages.start + (part.start - index), part.len);
            patches.push(Patch { pages, target: Target::Own { index: written } });
            let mut at = part.start;
            while at < part.end() {
                let n = CHUNK_PAGES.min(part.end() - at);
                let chunk = &mut buf[..(n * PAGE) as usize];
                if !memfd::read_exact(layer.fd(), chunk, at * PAGE)? {
                    return Err(Error::Malformed("a layer ends within its pages".to_owned()));
                }
                write(written * PAGE, chunk)?;
                written += n;
                at += n;
            }
        }
    }
    Ok((build(None, snapshot.pages(), &patches, &[], &[])?, written))
}

fn write_hashed(snapshot: &Snapshot, file: &File) -> Result<()> {
    let mut hash = blake3::Hasher::new();
    let mut put = |offset: u64, bytes: &[u8]| {
        hash.update(bytes);
        memfd::write_pieces(file.as_fd(), offset, &[Piece::of(bytes)])
    };
    let (table, data_pages) = compact(snapshot, &mut put)?;
    let mut nodes = Vec::with_capacity(table.nodes.len() * 8);
    table.nodes.iter().for_each(|entry| nodes.extend_from_slice(&entry.to_le_bytes()));
    if !nodes.is_empty() {
        put(data_pages * PAGE, &nodes)?;
    }
    let trailer = Trailer {
        id: LayerId(crate::sys::random::id128()?),
        hashed: true,
        data_pages,
        node_pages: table.own.nodes,
        imports: Vec::new(),
        size_bytes: snapshot.size_bytes(),
        root: table.root,
    };
    let mut page = trailer.encode();
    hash.update(&page[..HASH_AT]);
    page[HASH_AT..].copy_from_slice(hash.finalize().as_bytes());
    memfd::write_pieces(file.as_fd(), (data_pages + table.own.nodes) * PAGE, &[Piece::of(&page[..])])
}

/// A sealed copy of a snapshot in one layer.
pub fn copy_to_memory(snapshot: &Snapshot) -> Result<Snapshot> {
    crate::publish::ensure_memory(snapshot.data_pages(), "the copy")?;
    let fd = memfd::create(c"quire-layer")?;
    let (table, data_pages) =
        compact(snapshot, |offset, bytes| memfd::write_pieces(fd.as_fd(), offset, &[Piece::of(bytes)]))?;
    let count = table.own;
    let layer = Layer::seal(Draft {
        fd: Arc::new(fd),
        data_pages,
        nodes: table.nodes,
        imports: Vec::new(),
        size_bytes: snapshot.size_bytes(),
        root: table.root,
        origins: Origins::default(),
        gathered: false,
    })?;
    Snapshot::trusted(vec![layer], vec![count])
}

/// Open a saved snapshot. Without `copy` its pages are mapped from the file as they are touched, and whoever can
/// write the file can change them; with it they are copied to sealed memory. `check` compares the hash.
pub fn load(path: &Path, copy: bool, check: bool) -> Result<Snapshot> {
    check_path(path)?;
    // NONBLOCK so that a FIFO does not make us wait for a writer.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(io_at("open", path))?;
    let fd = OwnedFd::from(file);
    read_trailer(&fd)?;
    let fd = if copy { into_memory(fd)? } else { fd };
    if check {
        check_hash(&fd)?;
    }
    if copy {
        memfd::add_seals(fd.as_fd(), memfd::SEALS_IMMUTABLE)?;
        return Snapshot::receive(vec![fd]);
    }
    Snapshot::from_layers(vec![Layer::open_file(fd)?])
}

/// The file's bytes in a new memfd.
fn into_memory(fd: OwnedFd) -> Result<OwnedFd> {
    let size = memfd::status(fd.as_fd())?.size;
    crate::publish::ensure_memory(size / PAGE, "loading the file")?;
    let memory = memfd::create(c"quire-layer")?;
    each_chunk(&fd, size, |offset, bytes| memfd::write_pieces(memory.as_fd(), offset, &[Piece::of(bytes)]))?;
    Ok(memory)
}

/// The last page of a file that may be a saved snapshot, if it looks like one.
fn read_trailer(fd: &OwnedFd) -> Result<Vec<u8>> {
    let status = memfd::status(fd.as_fd())?;
    if !status.regular {
        return Err(Error::Malformed("not a regular file".to_owned()));
    }
    if status.size < PAGE || status.size % PAGE != 0 {
        return Err(Error::Malformed(format!("a saved snapshot of {} bytes", status.size)));
    }
    // Saved files have no holes. No file system packs data this well, and reading terabytes of nothing takes hours.
    if status.size > status.allocated_bytes.saturating_mul(1024).saturating_add(1 << 30) {
        return Err(Error::Malformed(format!("a file of {} bytes that is almost all holes", status.size)));
    }
    let mut page = vec![0u8; PAGE as usize];
    if !memfd::read_exact(fd.as_fd(), &mut page, status.size - PAGE)? {
        return Err(Error::Malformed("the file ends before its trailer".to_owned()));
    }
    if !Trailer::decode(&page, status.size)?.hashed {
        return Err(Error::Malformed("the file carries no hash".to_owned()));
    }
    Ok(page)
}

/// Compare the hash in a trailer with the file's content.
fn check_hash(fd: &OwnedFd) -> Result<()> {
    let trailer = read_trailer(fd)?;
    let size = memfd::status(fd.as_fd())?.size;
    let mut hash = blake3::Hasher::new();
    each_chunk(fd, size - PAGE, |_, bytes| {
        hash.update(bytes);
        Ok(())
    })?;
    hash.update(&trailer[..HASH_AT]);
    if hash.finalize().as_bytes()[..] == trailer[HASH_AT..] {
        Ok(())
    } else {
        Err(Error::Malformed("the file's hash does not match its content".to_owned()))
    }
}

fn each_chunk(fd: &OwnedFd, size: u64, mut with: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
    let mut buf = vec![0u8; (CHUNK_PAGES * PAGE) as usize];
    let mut at = 0;
    while at < size {
        let n = (CHUNK_PAGES * PAGE).min(size - at) as usize;
        if !memfd::read_exact(fd.as_fd(), &mut buf[..n], at)? {
            return Err(Error::Malformed("the file was cut short while it was read".to_owned()));
        }
        with(at, &buf[..n])?;
        at += n as u64;
    }
    Ok(())
}
