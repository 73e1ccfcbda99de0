//! Layer files as sparse pages that can be bent before they are written.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use quire_core::sys::memfd::{self, Piece};

use crate::{PAGE, Page};

const CRC_AT: usize = 4060;
const HASH_AT: usize = 4064;

/// Where fields of the trailer stand.
pub mod field {
    pub const VERSION: usize = 8;
    pub const FLAGS: usize = 12;
    pub const ID: usize = 16;
    pub const DATA_PAGES: usize = 32;
    pub const NODE_PAGES: usize = 40;
    pub const IMPORTS: usize = 48;
    pub const SIZE: usize = 56;
    pub const ROOT: usize = 64;
    pub const PAGE_SIZE: usize = 72;
    pub const IMPORT_IDS: usize = 128;
}

/// One layer file, as it will be written.
#[derive(Clone)]
pub struct File {
    /// Pages before the trailer that hold something.
    pub pages: BTreeMap<u64, Rc<Page>>,
    pub trailer: Box<Page>,
    /// Where the trailer is written.
    pub trailer_at: u64,
    /// Bytes after the trailer; negative if the file is cut short.
    pub tail: i64,
    pub seals: i32,
    pub wrong_crc: bool,
    pub wrong_hash: bool,
    /// The honest file that this is, while nothing was bent.
    pristine: Option<Rc<OwnedFd>>,
}

impl File {
    /// A file with nothing but a trailer that says so.
    pub fn empty(id: [u8; 16]) -> Self {
        let mut trailer = Box::new([0; PAGE as usize]);
        trailer[..8].copy_from_slice(b"QUIRELYR");
        trailer[field::VERSION] = 1;
        trailer[field::ID..field::ID + 16].copy_from_slice(&id);
        trailer[field::PAGE_SIZE..field::PAGE_SIZE + 8].copy_from_slice(&PAGE.to_le_bytes());
        Self {
            pages: BTreeMap::new(),
            trailer,
            trailer_at: 0,
            tail: 0,
            seals: memfd::SEALS_IMMUTABLE,
            wrong_crc: false,
            wrong_hash: false,
            pristine: None,
        }
    }

    /// The content of an honest file.
    pub fn read(fd: BorrowedFd<'_>) -> Self {
        let owned = fd.try_clone_to_owned().expect("dup");
        let last = memfd::status(fd).expect("fstat").size / PAGE - 1;
        let mut file = Self::empty([0; 16]);
        let page_at = |at: u64| {
            let mut page = [0; PAGE as usize];
            assert!(memfd::read_exact(fd, &mut page, at * PAGE).expect("pread"));
            page
        };
        let mut at = next_data(fd, 0);
        while at < last {
            file.pages.insert(at, Rc::new(page_at(at)));
            at = next_data(fd, at + 1);
        }
        *file.trailer = page_at(last);
        file.trailer_at = last;
        file.pristine = Some(Rc::new(owned));
        file
    }

    /// To be called before anything is bent.
    pub fn bend(&mut self) -> &mut Self {
        self.pristine = None;
        self
    }

    pub fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.trailer[at..at + 8].try_into().expect("eight bytes"))
    }

    pub fn set_word(&mut self, at: usize, value: u64) {
        self.trailer[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    pub fn id(&self) -> [u8; 16] {
        self.trailer[field::ID..field::ID + 16].try_into().expect("sixteen bytes")
    }

    pub fn data_pages(&self) -> u64 {
        self.word(field::DATA_PAGES)
    }

    pub fn node_pages(&self) -> u64 {
        self.word(field::NODE_PAGES)
    }

    /// The content of a page before the trailer.
    pub fn page(&self, at: u64) -> Page {
        self.pages.get(&at).map_or([0; PAGE as usize], |page| **page)
    }

    pub fn entry(&self, node: u64, at: usize) -> u64 {
        let Some(page) = self.pages.get(&self.data_pages().wrapping_add(node)) else { return 0 };
        u64::from_le_bytes(page[at * 8..at * 8 + 8].try_into().expect("eight bytes"))
    }

    pub fn set_entry(&mut self, node: u64, at: usize, value: u64) {
        let number = self.data_pages().wrapping_add(node);
        if number < self.trailer_at {
            let page = self.pages.entry(number).or_insert_with(|| Rc::new([0; PAGE as usize]));
            Rc::make_mut(page)[at * 8..at * 8 + 8].copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Give the file other numbers of pages, moving the nodes along.
    pub fn reshape(&mut self, data_pages: u64, node_pages: u64) {
        let old = self.data_pages();
        let nodes = self.pages.split_off(&old.min(1 << 40));
        self.pages.retain(|at, _| *at < data_pages);
        self.pages.extend(
            nodes.into_iter().map(|(at, page)| (at - old + data_pages, page)).filter(|n| n.0 < data_pages + node_pages),
        );
        self.set_word(field::DATA_PAGES, data_pages);
        self.set_word(field::NODE_PAGES, node_pages);
        self.trailer_at = data_pages + node_pages;
    }

    /// The trailer with its checksum, and with the hash of everything before it if it announces one.
    pub fn finished_trailer(&self) -> Box<Page> {
        let mut out = self.trailer.clone();
        let crc = crc32fast::hash(&out[..CRC_AT]) ^ u32::from(self.wrong_crc);
        out[CRC_AT..HASH_AT].copy_from_slice(&crc.to_le_bytes());
        if out[field::FLAGS] & 1 == 1 && self.trailer_at <= 1 << 14 {
            let mut hash = blake3::Hasher::new();
            for at in 0..self.trailer_at {
                hash.update(&self.page(at));
            }
            hash.update(&out[..HASH_AT]);
            out[HASH_AT..].copy_from_slice(hash.finalize().as_bytes());
            out[HASH_AT] ^= u8::from(self.wrong_hash);
        }
        out
    }

    /// Whether the file can be written here: its length is one that the kernel takes.
    pub fn len(&self) -> Option<u64> {
        let len = self.trailer_at.checked_add(1)?.checked_mul(PAGE)?.checked_add_signed(self.tail)?;
        (len < 1 << 62).then_some(len)
    }

    pub fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// Write everything to a new file.
    pub fn write(&self, fd: BorrowedFd<'_>) -> bool {
        let Some(len) = self.len() else { return false };
        let put = |at: u64, page: &Page| memfd::write_pieces(fd, at * PAGE, &[Piece::of(page)]).is_ok();
        self.pages.iter().filter(|(at, _)| **at < self.trailer_at).all(|(at, page)| put(*at, page))
            && put(self.trailer_at, &self.finished_trailer())
            && memfd::truncate(fd, len).is_ok()
    }

    /// A memfd with the content and the seals.
    pub fn memfd(&self) -> Option<OwnedFd> {
        let fd = memfd::create(c"fuzz").expect("memfd_create");
        if !self.write(fd.as_fd()) {
            return None;
        }
        if self.seals != 0 {
            memfd::add_seals(fd.as_fd(), self.seals).expect("F_ADD_SEALS");
        }
        Some(fd)
    }
}

/// The first page at or after this one that is no hole.
fn next_data(fd: BorrowedFd<'_>, page: u64) -> u64 {
    // SAFETY: plain system call on a descriptor we borrow; nobody else uses its file position.
    let at = unsafe { libc::lseek(fd.as_raw_fd(), (page * PAGE) as i64, libc::SEEK_DATA) };
    u64::try_from(at).map_or(u64::MAX, |at| at / PAGE)
}

/// The descriptors of files, so that a file that two sets share is one inode.
#[derive(Default)]
pub struct Descriptors(HashMap<*const File, Option<OwnedFd>>);

impl Descriptors {
    /// Descriptors of all files; None if one cannot be written here.
    pub fn of(&mut self, files: &[Rc<File>]) -> Option<Vec<OwnedFd>> {
        files
            .iter()
            .map(|file| {
                if let Some(honest) = &file.pristine {
                    return Some(honest.try_clone().expect("dup"));
                }
                let fd = self.0.entry(Rc::as_ptr(file)).or_insert_with(|| file.memfd());
                fd.as_ref().map(|fd| fd.try_clone().expect("dup"))
            })
            .collect()
    }
}
