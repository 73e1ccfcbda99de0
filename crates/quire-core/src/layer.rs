//! Layers: sealed memfds (or saved files) holding pages, page-table nodes and a trailer.
//!
//! Byte layout: docs/formats.md. Content of a sealed layer is immutable, so it is read through ordinary slices;
//! content of a saved file can change under us, so its nodes are copied and its pages read with `pread`.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crate::pages::{FANOUT, MAX_PAGES, PAGE, PageRange};
use crate::sys::memfd::{self, Piece, Status};
use crate::table::Entry;
use crate::{Error, Result};

/// Layers in one snapshot, at most.
pub const MAX_LAYERS: usize = 64;
/// Imports of one layer, at most: the slots of an entry less the layer itself.
pub const MAX_IMPORTS: usize = MAX_LAYERS - 1;

const MAGIC: [u8; 8] = *b"QUIRELYR";
const VERSION: u32 = 1;
const FLAG_HASHED: u32 = 1;
const CRC_AT: usize = 4060;
/// Where the hash of a saved file stands in its trailer.
pub const HASH_AT: usize = 4064;

/// Mappings of at most so many pages are populated when they are made.
const POPULATE_PAGES: u64 = 4096;

/// A layer's random name. Anybody who has seen it can forge it; `Key` cannot be forged.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LayerId(pub [u8; 16]);

/// What identifies a layer to this process: its inode.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    pub dev: u64,
    pub ino: u64,
}

/// Who guarantees that the content stays.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// The kernel: a memfd with all four seals.
    Sealed,
    /// Nobody: a regular file.
    File,
}

/// The trailer, decoded and checked.
#[derive(Clone, Debug)]
pub struct Trailer {
    pub id: LayerId,
    pub hashed: bool,
    pub data_pages: u64,
    pub node_pages: u64,
    pub imports: Vec<LayerId>,
    pub size_bytes: u64,
    pub root: Entry,
}

impl Trailer {
    #[must_use]
    pub const fn file_bytes(&self) -> u64 {
        (self.data_pages + self.node_pages + 1) * PAGE
    }

    #[must_use]
    pub fn encode(&self) -> Box<[u8; PAGE as usize]> {
        let mut out = Box::new([0u8; PAGE as usize]);
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(12, &(if self.hashed { FLAG_HASHED } else { 0 }).to_le_bytes());
        put(16, &self.id.0);
        put(32, &self.data_pages.to_le_bytes());
        put(40, &self.node_pages.to_le_bytes());
        put(48, &(self.imports.len() as u64).to_le_bytes());
        put(56, &self.size_bytes.to_le_bytes());
        put(64, &self.root.raw().to_le_bytes());
        put(72, &PAGE.to_le_bytes());
        for (i, id) in self.imports.iter().enumerate() {
            put(128 + 16 * i, &id.0);
        }
        let crc = crc32fast::hash(&out[..CRC_AT]);
        out[CRC_AT..HASH_AT].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Decode the last page of a file of `file_bytes` bytes.
    pub fn decode(page: &[u8], file_bytes: u64) -> Result<Self> {
        let bad = |text: String| Err(Error::Malformed(format!("layer trailer: {text}")));
        if page.len() != PAGE as usize {
            return bad(format!("{} bytes", page.len()));
        }
        let u32_at = |at: usize| u32::from_le_bytes(page[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().expect("eight bytes"));
        let id_at = |at: usize| LayerId(page[at..at + 16].try_into().expect("sixteen bytes"));
        if page[..8] != MAGIC {
            return bad("wrong magic".to_owned());
        }
        if u32_at(8) != VERSION {
            return bad(format!("version {} is not {VERSION}", u32_at(8)));
        }
        let crc = crc32fast::hash(&page[..CRC_AT]);
        if u32_at(CRC_AT) != crc {
            return bad("wrong checksum".to_owned());
        }
        if page[80..128].iter().any(|b| *b != 0) || page[128 + 16 * MAX_IMPORTS..CRC_AT].iter().any(|b| *b != 0) {
            return bad("bytes that have no meaning are not zero".to_owned());
        }
        let flags = u32_at(12);
        if flags & !FLAG_HASHED != 0 {
            return bad(format!("unknown flags {flags:#x}"));
        }
        if flags & FLAG_HASHED == 0 && page[HASH_AT..].iter().any(|b| *b != 0) {
            return bad("a hash where none is announced".to_owned());
        }
        if u64_at(72) != PAGE {
            return bad(format!("page size {}", u64_at(72)));
        }
        let (data_pages, node_pages, count) = (u64_at(32), u64_at(40), u64_at(48));
        if data_pages > MAX_PAGES || node_pages > MAX_PAGES {
            return bad(format!("{data_pages} data pages and {node_pages} nodes"));
        }
        if count > MAX_IMPORTS as u64 {
            return bad(format!("{count} imports"));
        }
        if page[128 + 16 * count as usize..128 + 16 * MAX_IMPORTS].iter().any(|b| *b != 0) {
            return bad(format!("more import ids than the {count} announced"));
        }
        let id = id_at(16);
        let imports: Vec<LayerId> = (0..count as usize).map(|i| id_at(128 + 16 * i)).collect();
        for (i, import) in imports.iter().enumerate() {
            if *import == id || import.0 == [0; 16] || imports[..i].contains(import) {
                return bad(format!("import {} is its own, empty or repeated", i + 1));
            }
        }
        if id.0 == [0; 16] {
            return bad("empty id".to_owned());
        }
        let size_bytes = u64_at(56);
        if size_bytes > MAX_PAGES * PAGE {
            return bad(format!("a snapshot of {size_bytes} bytes"));
        }
        let root = Entry::from_raw(u64_at(64));
        if size_bytes == 0 && root != Entry::ZERO {
            return bad("a root without a size".to_owned());
        }
        let trailer = Self { id, hashed: flags & FLAG_HASHED != 0, data_pages, node_pages, imports, size_bytes, root };
        if trailer.file_bytes() != file_bytes {
            return bad(format!("describes {} bytes, the file has {file_bytes}", trailer.file_bytes()));
        }
        Ok(trailer)
    }
}

/// A read-only mapping of an immutable file.
#[derive(Debug)]
struct Mapped {
    addr: usize,
    len: usize,
}

impl Mapped {
    fn new(fd: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Self> {
        // One call for a few thousand pages is far cheaper than their faults. A file with holes is left alone: populating
        // would fill them, at our cost.
        let whole = memfd::status(fd)?;
        let dense = whole.allocated_bytes >= whole.size;
        let populate = if dense && len as u64 <= POPULATE_PAGES * PAGE { libc::MAP_POPULATE } else { 0 };
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | populate;
        // SAFETY: a new private read-only mapping at an address of the kernel's choice.
        let addr =
            unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, flags, fd.as_raw_fd(), offset as i64) };
        if addr == libc::MAP_FAILED {
            return Err(Error::last_os("mmap"));
        }
        Ok(Self { addr: addr as usize, len })
    }

    /// # Safety
    /// The file must be immutable and no shorter than the mapping, for good.
    unsafe fn bytes(&self) -> &[u8] {
        // SAFETY: mapped readable for `len` bytes until drop; immutable by the caller's word.
        unsafe { std::slice::from_raw_parts(self.addr as *const u8, self.len) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: our mapping, and every slice of it borrows `self`.
        unsafe { libc::munmap(self.addr as *mut libc::c_void, self.len) };
    }
}

#[derive(Debug)]
enum Nodes {
    None,
    Mapped(OnceLock<Mapped>),
    Copied(Box<[u64]>),
}

/// Where pages of a layer made by rewriting came from: known to the process that made it, and to nobody else.
#[derive(Debug, Default, Clone)]
pub struct Origins {
    /// (first page here, pages, origin number, first page there), ascending.
    pub runs: Vec<(u64, u64, u64, u64)>,
}

/// One open layer. Shared by all snapshots of this process that use it.
#[derive(Debug)]
pub struct Layer {
    fd: Arc<OwnedFd>,
    key: Key,
    number: u64,
    backing: Backing,
    trailer: Trailer,
    nodes: Nodes,
    data: OnceLock<Mapped>,
    origins: Origins,
    gathered: bool,
    dense: OnceLock<bool>,
}

static OPEN: Mutex<Option<HashMap<Key, Weak<Layer>>>> = Mutex::new(None);

pub(crate) fn lock() -> MutexGuard<'static, Option<HashMap<Key, Weak<Layer>>>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn next_number() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// Everything a new layer consists of besides its data pages, which are in the file already.
pub struct Draft {
    /// Shared, so that whoever wrote the data pages still has them if sealing fails.
    pub fd: Arc<OwnedFd>,
    pub data_pages: u64,
    pub nodes: Vec<u64>,
    pub imports: Vec<LayerId>,
    pub size_bytes: u64,
    pub root: Entry,
    pub origins: Origins,
    /// The pages were gathered from a writer that does not map them from here.
    pub gathered: bool,
}

impl Layer {
    /// Write nodes and trailer behind the data pages and seal the file for good. After an error it can be repeated.
    pub fn seal(draft: Draft) -> Result<Arc<Self>> {
        let trailer = Trailer {
            id: LayerId(crate::sys::random::id128()?),
            hashed: false,
            data_pages: draft.data_pages,
            node_pages: draft.nodes.len() as u64 / FANOUT,
            imports: draft.imports,
            size_bytes: draft.size_bytes,
            root: draft.root,
        };
        // What an earlier attempt wrote behind the data pages must not stay behind the trailer.
        if memfd::status(draft.fd.as_fd())?.size > trailer.data_pages * PAGE {
            memfd::truncate(draft.fd.as_fd(), trailer.data_pages * PAGE)?;
        }
        let encoded = trailer.encode();
        let nodes = Piece { addr: draft.nodes.as_ptr() as usize, len: draft.nodes.len() * 8 };
        memfd::write_pieces(draft.fd.as_fd(), trailer.data_pages * PAGE, &[nodes, Piece::of(&encoded[..])])?;
        memfd::add_seals(draft.fd.as_fd(), memfd::SEALS_IMMUTABLE)?;
        let status = memfd::status(draft.fd.as_fd())?;
        let mut layer = Self::sealed(draft.fd, &status, trailer);
        layer.origins = draft.origins;
        layer.gathered = draft.gathered;
        Ok(layer.enlisted())
    }

    /// Check a descriptor from outside with the kernel and open it as a layer.
    pub fn receive(fd: OwnedFd) -> Result<Arc<Self>> {
        verify_sealed(fd.as_fd())?;
        let status = memfd::status(fd.as_fd())?;
        let key = Key { dev: status.dev, ino: status.ino };
        if let Some(layer) = lock().as_ref().and_then(|open| open.get(&key)).and_then(Weak::upgrade) {
            return Ok(layer);
        }
        let trailer = read_trailer(fd.as_fd(), status.size)?;
        Ok(Self::sealed(Arc::new(fd), &status, trailer).enlisted())
    }

    /// A layer in a sealed memfd, whose nodes are mapped when they are first asked for.
    fn sealed(fd: Arc<OwnedFd>, status: &Status, trailer: Trailer) -> Self {
        let nodes = if trailer.node_pages > 0 { Nodes::Mapped(OnceLock::new()) } else { Nodes::None };
        Self::opened(fd, status, Backing::Sealed, trailer, nodes)
    }

    fn opened(fd: Arc<OwnedFd>, status: &Status, backing: Backing, trailer: Trailer, nodes: Nodes) -> Self {
        Self {
            fd,
            key: Key { dev: status.dev, ino: status.ino },
            number: next_number(),
            backing,
            trailer,
            nodes,
            data: OnceLock::new(),
            origins: Origins::default(),
            gathered: false,
            dense: OnceLock::new(),
        }
    }

    /// Open a saved file. The caller has checked its hash if it wants to; structure is checked here.
    pub fn open_file(fd: OwnedFd) -> Result<Arc<Self>> {
        let status = memfd::status(fd.as_fd())?;
        if !status.regular {
            return Err(Error::Malformed("not a regular file".to_owned()));
        }
        let trailer = read_trailer(fd.as_fd(), status.size)?;
        crate::sys::memory::ensure(trailer.node_pages * PAGE, "the page table of the file")?;
        let mut nodes = vec![0u64; (trailer.node_pages * FANOUT) as usize];
        for (i, node) in nodes.chunks_exact_mut(FANOUT as usize).enumerate() {
            let mut page = [0u8; PAGE as usize];
            if !memfd::read_exact(fd.as_fd(), &mut page, (trailer.data_pages + i as u64) * PAGE)? {
                return Err(Error::Malformed("the file ends within its page table".to_owned()));
            }
            for (entry, bytes) in node.iter_mut().zip(page.chunks_exact(8)) {
                *entry = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
            }
        }
        let nodes = Nodes::Copied(nodes.into_boxed_slice());
        Ok(Arc::new(Self::opened(Arc::new(fd), &status, Backing::File, trailer, nodes)))
    }

    /// Let other snapshots of this process find the layer by its inode.
    fn enlisted(self) -> Arc<Self> {
        let layer = Arc::new(self);
        lock().get_or_insert_with(HashMap::new).insert(layer.key, Arc::downgrade(&layer));
        layer
    }

    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    #[must_use]
    pub const fn key(&self) -> Key {
        self.key
    }

    #[must_use]
    pub const fn trailer(&self) -> &Trailer {
        &self.trailer
    }

    #[must_use]
    pub const fn backing(&self) -> Backing {
        self.backing
    }

    /// Whether the file has no holes, so that mapping and touching it takes no more memory than it has.
    fn is_dense(&self) -> Result<bool> {
        if let Some(&dense) = self.dense.get() {
            return Ok(dense);
        }
        let dense = self.allocated_bytes()? >= self.trailer.file_bytes();
        // Held while the process forks: a child would wait for ever for who was in between.
        let _no_fork = lock();
        Ok(*self.dense.get_or_init(|| dense))
    }

    /// Whether the pages were gathered from a writer that does not map them from here.
    #[must_use]
    pub const fn is_gathered(&self) -> bool {
        self.gathered
    }

    /// Ask the kernel again whether the content is immutable.
    pub fn verify(&self) -> Result<()> {
        match self.backing {
            Backing::Sealed => verify_sealed(self.fd()),
            Backing::File => Err(Error::NotImmutable(
                "the snapshot was loaded from a file, which others can change; load(path, copy=True) copies it to sealed memory".to_owned(),
            )),
        }
    }

    /// Bytes of memory the file takes.
    pub fn allocated_bytes(&self) -> Result<u64> {
        Ok(memfd::status(self.fd())?.allocated_bytes)
    }

    /// The 512 entries of a node.
    pub fn node(&self, index: u64) -> Result<&[u64]> {
        if index >= self.trailer.node_pages {
            return Err(Error::Malformed(format!("node {index} of {}", self.trailer.node_pages)));
        }
        let at = (index * FANOUT) as usize;
        match &self.nodes {
            Nodes::None => Err(Error::Malformed("a layer without nodes".to_owned())),
            Nodes::Copied(nodes) => Ok(&nodes[at..at + FANOUT as usize]),
            Nodes::Mapped(cell) => {
                let mapped =
                    get_or_map(cell, self.fd(), self.trailer.data_pages * PAGE, self.trailer.node_pages * PAGE)?;
                // SAFETY: only sealed layers are mapped, and the seals forbid changing and shrinking them.
                let bytes = unsafe { mapped.bytes() };
                let node = &bytes[at * 8..(at + FANOUT as usize) * 8];
                // SAFETY: the mapping is page aligned, `at` a multiple of 512 words, and any bits are a valid u64.
                Ok(unsafe { std::slice::from_raw_parts(node.as_ptr().cast::<u64>(), FANOUT as usize) })
            }
        }
    }

    /// A data page: borrowed from a sealed layer that is small enough to have its page table filled at once, else
    /// read into `buf`, which costs less than the fault of a page that is looked at once.
    pub fn page<'a>(&'a self, index: u64, buf: &'a mut [u8; PAGE as usize]) -> Result<&'a [u8]> {
        if self.backing == Backing::Sealed && self.trailer.data_pages <= POPULATE_PAGES && self.is_dense()? {
            return self.run(index, 1);
        }
        if index >= self.trailer.data_pages {
            return Err(Error::Malformed(format!("data page {index} of {}", self.trailer.data_pages)));
        }
        if memfd::read_exact(self.fd(), &mut buf[..], index * PAGE)? {
            Ok(&buf[..])
        } else {
            Err(Error::Malformed("the file was cut short after it was loaded".to_owned()))
        }
    }

    /// Which data pages of a range are not holes.
    pub fn data_ranges(&self, within: PageRange) -> Result<Vec<PageRange>> {
        memfd::data_ranges(self.fd(), within)
    }

    /// Consecutive data pages of a sealed layer.
    pub fn run(&self, index: u64, len: u64) -> Result<&[u8]> {
        if self.backing != Backing::Sealed || index > self.trailer.data_pages || len > self.trailer.data_pages - index {
            return Err(Error::Malformed(format!("a run of {len} pages at {index} of {}", self.trailer.data_pages)));
        }
        let mapped = get_or_map(&self.data, self.fd(), 0, self.trailer.data_pages * PAGE)?;
        // SAFETY: a sealed layer, see `node`.
        Ok(&unsafe { mapped.bytes() }[(index * PAGE) as usize..((index + len) * PAGE) as usize])
    }

    /// A number for a run's content that survives rewriting: (layer number, page, pages for which it counts on).
    #[must_use]
    pub fn origin(&self, index: u64) -> (u64, u64, u64) {
        let runs = &self.origins.runs;
        let at = runs.partition_point(|run| run.0 <= index);
        if at > 0 {
            let (first, len, number, there) = runs[at - 1];
            if index < first + len {
                return (number, there + (index - first), first + len - index);
            }
        }
        let next = runs.get(at).map_or(u64::MAX, |run| run.0);
        (self.number, index, next - index)
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        if let Some(open) = lock().as_mut() {
            if open.get(&self.key).is_some_and(|weak| weak.strong_count() == 0) {
                open.remove(&self.key);
            }
        }
    }
}

fn get_or_map<'a>(cell: &'a OnceLock<Mapped>, fd: BorrowedFd<'_>, offset: u64, len: u64) -> Result<&'a Mapped> {
    if let Some(mapped) = cell.get() {
        return Ok(mapped);
    }
    let mapped = Mapped::new(fd, offset, len as usize)?;
    // Held while the process forks: a child would wait for ever for who was in between.
    let _no_fork = lock();
    Ok(cell.get_or_init(|| mapped))
}

/// Whether the kernel guarantees that the content of a descriptor never changes.
pub fn verify_sealed(fd: BorrowedFd<'_>) -> Result<()> {
    let Some(seals) = memfd::seals(fd) else {
        return Err(Error::NotImmutable("the descriptor is no memfd".to_owned()));
    };
    if seals & memfd::SEALS_IMMUTABLE != memfd::SEALS_IMMUTABLE {
        return Err(Error::NotImmutable(format!(
            "the memfd has seals {seals:#x}, not all of {:#x} (WRITE, SHRINK, GROW, SEAL)",
            memfd::SEALS_IMMUTABLE
        )));
    }
    if !memfd::is_tmpfs(fd) {
        return Err(Error::Malformed("the memfd has huge pages (hugetlbfs); layers have ordinary ones".to_owned()));
    }
    Ok(())
}

fn read_trailer(fd: BorrowedFd<'_>, size: u64) -> Result<Trailer> {
    if size < PAGE || size % PAGE != 0 {
        return Err(Error::Malformed(format!("a layer of {size} bytes")));
    }
    let mut page = [0u8; PAGE as usize];
    if !memfd::read_exact(fd, &mut page, size - PAGE)? {
        return Err(Error::Malformed("the layer ends before its trailer".to_owned()));
    }
    Trailer::decode(&page, size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trailer() -> Trailer {
        Trailer {
            id: LayerId([7; 16]),
            hashed: false,
            data_pages: 5,
            node_pages: 1,
            imports: vec![LayerId([1; 16]), LayerId([2; 16])],
            size_bytes: 9000,
            root: Entry::node(0, 0),
        }
    }

    #[test]
    fn trailer_survives_a_round_trip() {
        let decoded = Trailer::decode(&trailer().encode()[..], 7 * PAGE).unwrap();
        assert_eq!((decoded.data_pages, decoded.node_pages, decoded.size_bytes), (5, 1, 9000));
        assert_eq!((decoded.imports, decoded.root), (trailer().imports, Entry::node(0, 0)));
    }

    #[test]
    fn every_flipped_byte_of_a_trailer_is_noticed() {
        let good = trailer().encode();
        for at in 0..PAGE as usize {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            assert!(Trailer::decode(&bad[..], 7 * PAGE).is_err(), "byte {at}");
        }
    }

    #[test]
    fn origins_are_found_by_run() {
        let draft = Draft {
            fd: Arc::new(memfd::create(c"t").unwrap()),
            data_pages: 0,
            nodes: Vec::new(),
            imports: Vec::new(),
            size_bytes: 0,
            root: Entry::ZERO,
            origins: Origins { runs: vec![(2, 3, 99, 40)] },
            gathered: false,
        };
        let layer = Layer::seal(draft).unwrap();
        assert_eq!(layer.origin(3), (99, 41, 2));
        assert_eq!(layer.origin(1), (layer.number, 1, 1));
        assert_eq!(layer.origin(5).1, 5);
    }
}
