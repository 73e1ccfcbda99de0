//! Publishing: gathering changed pages into a new sealed layer, with the table of the new version.

use std::os::fd::AsFd;
use std::sync::Arc;

use crate::layer::{Draft, Layer, MAX_LAYERS, Origins};
use crate::pages::{PAGE, PageRange, pages_for, push_merged};
use crate::snapshot::{Count, Snapshot};
use crate::sys::area::Area;
use crate::sys::memfd::{self, Piece};
use crate::table::build::{Patch, Target, build};
use crate::table::walk::{Extent, Source};
use crate::{Error, Result};

/// A new version with more layers than this moves the `LEAVING` that hold least into its own.
const LAYERS_BEFORE_MERGING: usize = 56;
const LEAVING: usize = 32;
/// Smaller needs are not worth asking the kernel how much memory is left.
const CHECK_MEMORY_PAGES: u64 = 1 << 14;

/// What a new version is made of.
pub struct Edition<'a> {
    /// The live memory.
    pub area: &'a Area,
    pub size_bytes: u64,
    /// The version before, of which everything not named below is kept.
    pub tip: Option<&'a Snapshot>,
    /// Pages to take from the live memory; ascending and disjoint.
    pub changed: &'a [PageRange],
    /// Pages that other new layers hold already (or that are zero), with those layers.
    pub rewritten: &'a [Patch],
    pub others: &'a [Arc<Layer>],
    /// Layers of the tip, by index, whose pages and nodes move into the new layer; empty for none.
    pub leaving: &'a [bool],
}

/// A new version, and what it took.
pub struct Published {
    pub snapshot: Snapshot,
    pub pages_copied: u64,
    pub nodes_written: u64,
}

/// A range of pages to be written, and from where.
struct Item {
    pages: PageRange,
    source: Option<Source>,
}

impl Edition<'_> {
    /// Write and seal the new layer. On error nothing has changed but for memory that was given back.
    pub fn publish(&self) -> Result<Published> {
        let pages = pages_for(self.size_bytes);
        let mut patches = Vec::with_capacity(self.changed.len() + self.rewritten.len());
        let mut pieces = Vec::with_capacity(self.changed.len());
        let mut origins = Origins::default();
        let mut written = 0;
        for item in self.items()? {
            match item.source {
                None => self.take_live(item.pages, &mut written, &mut patches, &mut pieces),
                Some(source) => self.take_old(&item, source, &mut written, &mut patches, &mut pieces, &mut origins)?,
            }
        }
        patches.extend_from_slice(self.rewritten);
        patches.sort_unstable_by_key(|patch| patch.pages.start);
        let table = build(self.tip, pages, &patches, self.others, self.leaving)?;
        let fd = memfd::create(c"quire-layer")?;
        memfd::write_pieces(fd.as_fd(), 0, &pieces)?;
        let nodes_written = table.own.nodes;
        let top = Layer::seal(Draft {
            fd: Arc::new(fd),
            data_pages: written,
            nodes: table.nodes,
            imports: table.imports,
            size_bytes: self.size_bytes,
            root: table.root,
            origins,
            gathered: true,
        })?;
        let mut layers = vec![top];
        let mut counts = vec![table.own];
        let mut keep = |layer: &Arc<Layer>, count: &Count| {
            if !count.is_zero() {
                layers.push(Arc::clone(layer));
                counts.push(*count);
            }
        };
        self.others.iter().zip(&table.others).for_each(|(layer, count)| keep(layer, count));
        if let Some(tip) = self.tip {
            tip.layers().iter().zip(&table.old).for_each(|(layer, count)| keep(layer, count));
        }
        let snapshot = Snapshot::trusted(layers, counts)?;
        Ok(Published { snapshot, pages_copied: written, nodes_written })
    }

    /// Everything to be written, in page order.
    fn items(&self) -> Result<Vec<Item>> {
        let mut items: Vec<Item> = self.changed.iter().map(|&pages| Item { pages, source: None }).collect();
        let Some(tip) = self.tip else { return Ok(items) };
        if self.leaving.iter().any(|leaves| *leaves) {
            let mut covered = self.changed.to_vec();
            covered.extend(self.rewritten.iter().map(|patch| patch.pages));
            covered.sort_unstable();
            for Extent { pages, source } in tip.extents()? {
                let Source::Layer { layer, .. } = source else { continue };
                if self.leaving[layer as usize] {
                    for part in crate::pages::subtract(&[pages], &covered) {
                        items.push(Item { pages: part, source: Some(source.skip(part.start - pages.start)) });
                    }
                }
            }
            items.sort_unstable_by_key(|item| item.pages.start);
        }
        Ok(items)
    }

    /// Take pages from the live memory; those that are all zero take no room.
    fn take_live(&self, pages: PageRange, written: &mut u64, patches: &mut Vec<Patch>, pieces: &mut Vec<Piece>) {
        let mut at = pages.start;
        while at < pages.end() {
            let zero = self.area.page_is_zero((at * PAGE) as usize);
            let mut end = at + 1;
            while end < pages.end() && self.area.page_is_zero((end * PAGE) as usize) == zero {
                end += 1;
            }
            let run = PageRange::between(at, end);
            if zero {
                patches.push(Patch { pages: run, target: Target::Zero });
            } else {
                patches.push(Patch { pages: run, target: Target::Own { index: *written } });
                pieces.push(Piece { addr: self.area.addr() + run.byte_offset(), len: run.byte_len() });
                *written += run.len;
            }
            at = end;
        }
    }

    /// Take pages from a layer that leaves.
    fn take_old(
        &self,
        item: &Item,
        source: Source,
        written: &mut u64,
        patches: &mut Vec<Patch>,
        pieces: &mut Vec<Piece>,
        origins: &mut Origins,
    ) -> Result<()> {
        let (Some(tip), Source::Layer { layer, index }) = (self.tip, source) else {
            return Err(Error::Malformed("a page to be moved has no layer".to_owned()));
        };
        let layer = &tip.layers()[layer as usize];
        pieces.push(Piece::of(layer.run(index, item.pages.len)?));
        patches.push(Patch { pages: item.pages, target: Target::Own { index: *written } });
        origins.extend(layer, index, item.pages.len, *written);
        *written += item.pages.len;
        Ok(())
    }
}

impl Origins {
    /// Record that `len` pages at `here` are copies of pages of `layer` from `index` on.
    pub fn extend(&mut self, layer: &Layer, index: u64, len: u64, here: u64) {
        let mut skip = 0;
        while skip < len {
            let (number, there, counts_for) = layer.origin(index + skip);
            let n = counts_for.min(len - skip);
            self.runs.push((here + skip, n, number, there));
            skip += n;
        }
    }
}

/// Pages of a range that the tip has as data, ascending and merged.
pub fn data_in(tip: &Snapshot, range: PageRange) -> Result<Vec<PageRange>> {
    let mut out = Vec::new();
    for extent in tip.extents_in(range)? {
        if extent.source != Source::Zero {
            push_merged(&mut out, extent.pages);
        }
    }
    Ok(out)
}

/// The pages among `candidates` whose live content differs from the tip.
pub fn differing(area: &Area, tip: Option<&Snapshot>, candidates: &[PageRange]) -> Result<Vec<PageRange>> {
    let known_pages = tip.map_or(0, Snapshot::pages);
    let mut out = Vec::new();
    let mut buf = [0; PAGE as usize];
    for candidate in candidates {
        if let Some(tip) = tip {
            for extent in tip.extents_in(*candidate)? {
                for page in extent.pages.start..extent.pages.end() {
                    let offset = (page * PAGE) as usize;
                    let same = match extent.source.skip(page - extent.pages.start) {
                        Source::Zero => area.page_is_zero(offset),
                        Source::Layer { layer, index } => {
                            area.page_equals(offset, tip.layers()[layer as usize].page(index, &mut buf)?)
                        }
                    };
                    if !same {
                        push_merged(&mut out, PageRange::new(page, 1));
                    }
                }
            }
        }
        for page in candidate.start.max(known_pages)..candidate.end() {
            if !area.page_is_zero((page * PAGE) as usize) {
                push_merged(&mut out, PageRange::new(page, 1));
            }
        }
    }
    Ok(out)
}

/// Which of a version's layers have to go: so that the next one, with so many new layers, has few enough, and, once
/// the garbage in gathered layers passes an eighth of the content, so that little of it is left.
///
/// Only gathered layers go for their garbage, because only their pages are mapped by no writer; and only those that
/// nobody else holds, because the others would stay.
pub fn leaving(tip: &Snapshot, new_layers: usize) -> Result<Vec<bool>> {
    let layers = tip.layers();
    let mut leaving = vec![false; layers.len()];
    if layers.len() + new_layers >= LAYERS_BEFORE_MERGING {
        let mut by_data: Vec<usize> = (0..layers.len()).collect();
        by_data.sort_by_key(|&i| tip.counts()[i].data);
        let keep_at_most = (MAX_LAYERS - 1).saturating_sub(new_layers);
        let count = LEAVING.max(layers.len().saturating_sub(keep_at_most)).min(layers.len());
        by_data[..count].iter().for_each(|&i| leaving[i] = true);
    }
    let mut wasteful = Vec::new();
    let mut garbage = 0;
    for (i, (layer, count)) in layers.iter().zip(tip.counts()).enumerate() {
        if layer.is_gathered() && !leaving[i] && Arc::strong_count(layer) == 1 {
            let unused = layer.trailer().data_pages.saturating_sub(count.data);
            garbage += unused;
            wasteful.push((unused * 100 / (unused + count.data + 1), unused, i));
        }
    }
    if garbage * 8 > tip.data_pages() {
        wasteful.sort_unstable_by_key(|entry| std::cmp::Reverse(*entry));
        for (_, unused, i) in wasteful {
            if garbage * 32 <= tip.data_pages() {
                break;
            }
            leaving[i] = true;
            garbage -= unused;
        }
    }
    Ok(if leaving.contains(&true) { leaving } else { Vec::new() })
}

/// Refuse to start what would certainly end in an out-of-memory kill.
pub fn ensure_memory(pages: u64, what: &str) -> Result<()> {
    if pages >= CHECK_MEMORY_PAGES { crate::sys::memory::ensure(pages * PAGE, what) } else { Ok(()) }
}
