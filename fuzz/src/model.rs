//! A second reading of docs/formats.md, as plain as can be: which pages a set of files means, if it is right.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use quire_core::layer::Trailer;
use quire_core::sys::memfd;

use crate::files::File;
use crate::{PAGE, Page};

/// A run of pages: its start, its length, and the file and page it comes from.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub start: u64,
    pub len: u64,
    pub from: (usize, u64),
}

/// A right snapshot.
pub struct Model {
    pub files: Vec<Rc<File>>,
    pub size_bytes: u64,
    pub pages: u64,
    /// Ascending; what is between reads zero.
    pub pieces: Vec<Piece>,
}

type Judged<T> = std::result::Result<T, String>;

fn ensure(right: bool, what: &str) -> Judged<()> {
    if right { Ok(()) } else { Err(what.to_owned()) }
}

struct Walk<'a> {
    files: &'a [Rc<File>],
    trailers: Vec<Trailer>,
    pages: u64,
    pieces: Vec<Piece>,
    nodes: HashSet<(usize, u64)>,
    used: HashSet<usize>,
}

impl Walk<'_> {
    fn entry(&mut self, holder: usize, raw: u64, level: u32, base: u64) -> Judged<()> {
        if raw == 0 {
            return Ok(());
        }
        ensure(base < self.pages, "an entry beyond the last page")?;
        ensure(raw >> 54 & 0xff == 0, "reserved bits")?;
        let (kind, slot, index) = (raw >> 62, (raw >> 48 & 63) as usize, raw & ((1 << 48) - 1));
        let layer = if slot == 0 {
            holder
        } else {
            let imports = &self.trailers[holder].imports;
            let id = imports.get(slot - 1).ok_or("a slot without an import")?;
            self.trailers.iter().position(|trailer| trailer.id == *id).ok_or("an import that is missing")?
        };
        let covers = 512u64.pow(level);
        match kind {
            1 => {
                let len = covers.min(self.pages - base);
                ensure(index + len <= self.trailers[layer].data_pages, "a run out of range")?;
                self.used.insert(layer);
                self.pieces.push(Piece { start: base, len, from: (layer, index) });
                Ok(())
            }
            2 => {
                ensure(level > 0, "a node at level 0")?;
                ensure(index < self.trailers[layer].node_pages, "a node out of range")?;
                ensure(self.nodes.insert((layer, index)), "a node named twice")?;
                self.used.insert(layer);
                let entries: Vec<u64> = (0..512).map(|i| self.files[layer].entry(index, i)).collect();
                ensure(entries.iter().any(|entry| *entry != 0), "an empty node")?;
                for (i, entry) in entries.into_iter().enumerate() {
                    self.entry(layer, entry, level - 1, base + i as u64 * (covers / 512))?;
                }
                Ok(())
            }
            _ => Err("an invalid kind".to_owned()),
        }
    }
}

impl Model {
    /// Judge a set of files, top layer first. `sealed`: they are memfds, not a saved file.
    pub fn read(files: &[Rc<File>], sealed: bool) -> Judged<Self> {
        ensure((1..=64).contains(&files.len()), "the number of layers")?;
        let mut trailers = Vec::new();
        for file in files {
            let all = memfd::SEALS_IMMUTABLE;
            ensure(!sealed || file.seals & all == all, "seals")?;
            ensure(file.tail == 0, "the length")?;
            let len = file.len().ok_or("the length")?;
            trailers.push(Trailer::decode(&file.finished_trailer()[..], len).map_err(|error| format!("{error:?}"))?);
        }
        let ids: HashSet<_> = trailers.iter().map(|trailer| trailer.id).collect();
        ensure(ids.len() == files.len(), "an id twice")?;
        let top = trailers[0].clone();
        ensure(top.size_bytes > 0, "no top layer")?;
        let pages = top.size_bytes.div_ceil(PAGE);
        let mut level = 1;
        while 512u64.pow(level) < pages {
            level += 1;
        }
        let mut walk =
            Walk { files, trailers, pages, pieces: Vec::new(), nodes: HashSet::new(), used: HashSet::from([0]) };
        walk.entry(0, top.root.raw(), level, 0)?;
        ensure(walk.used.len() == files.len(), "a layer that is not used")?;
        let mut by_source: Vec<(usize, u64, u64)> =
            walk.pieces.iter().map(|piece| (piece.from.0, piece.from.1, piece.len)).collect();
        by_source.sort_unstable();
        let twice = by_source.windows(2).any(|two| two[0].0 == two[1].0 && two[0].1 + two[0].2 > two[1].1);
        ensure(!twice, "a data page named twice")?;
        Ok(Self { files: files.to_vec(), size_bytes: top.size_bytes, pages, pieces: walk.pieces })
    }

    /// Pages that come from a file.
    pub fn data_pages(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len).sum()
    }

    /// The content of a page.
    pub fn page(&self, number: u64) -> Page {
        let at = self.pieces.partition_point(|piece| piece.start <= number);
        match at.checked_sub(1).map(|at| self.pieces[at]) {
            Some(piece) if number - piece.start < piece.len => {
                self.files[piece.from.0].page(piece.from.1 + number - piece.start)
            }
            _ => [0; PAGE as usize],
        }
    }

    /// Page numbers worth looking at: all near the ends of pieces, `most` at most.
    pub fn interesting(&self, most: usize) -> Vec<u64> {
        let mut out = vec![0, self.pages - 1, self.pages / 2];
        for piece in &self.pieces {
            if out.len() >= most {
                break;
            }
            let end = piece.start + piece.len;
            out.extend(piece.start.saturating_sub(1)..(piece.start + 4).min(end));
            out.extend(end.saturating_sub(2).max(piece.start)..(end + 1).min(self.pages));
        }
        out.sort_unstable();
        out.dedup();
        out
    }

    /// The pages at which two snapshots differ, by content.
    pub fn differing(&self, other: &Self) -> Vec<u64> {
        let common = self.pages.min(other.pages);
        let mut candidates: Vec<u64> = [self, other]
            .iter()
            .flat_map(|model| model.pieces.iter().flat_map(|piece| piece.start..piece.start + piece.len))
            .filter(|number| *number < common)
            .collect();
        candidates.sort_unstable();
        candidates.dedup();
        let mut known: HashMap<u64, bool> = HashMap::new();
        candidates.retain(|&n| *known.entry(n).or_insert_with(|| self.page(n) != other.page(n)));
        candidates
    }
}
