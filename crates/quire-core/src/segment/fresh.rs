//! The first stage: shared mappings of unsealed memfds, one for each stripe. Nothing is tracked.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::frozen::Frozen;
use super::tracking;
use crate::layer::{Draft, Layer, LayerId, Origins};
use crate::layout::vma_budget;
use crate::pages::{FANOUT, PAGE, PageRange, bridge, intersection, pages_for, push_merged, total};
use crate::snapshot::{Count, Snapshot, Stats};
use crate::sys::area::{Access, Area, Sharing};
use crate::sys::hold::{Hold, What};
use crate::sys::memfd::{self, Piece};
use crate::table::Entry;
use crate::table::build::{Patch, Target, build};
use crate::{Error, Result};

/// A segment is cut into at most this many stripes when it is made, each of which can be given back by itself.
const STRIPES: u64 = 16;
/// Smaller stripes are not worth a descriptor.
const STRIPE_PAGES_AT_LEAST: u64 = 1024;
/// A hole of fewer pages is stored as zeros, so that runs stay long.
pub(super) const HOLE_PAGES: u64 = 16;

/// Pages in one stripe of a segment of so many pages: a multiple of 512.
pub(super) fn stripe_pages(pages: u64) -> u64 {
    pages.div_ceil(STRIPES).next_multiple_of(FANOUT).max(STRIPE_PAGES_AT_LEAST)
}

/// The stripes of a segment.
pub(super) fn stripes_of(pages: u64) -> impl Iterator<Item = PageRange> {
    let each = stripe_pages(pages);
    (0..pages.div_ceil(each)).map(move |i| PageRange::between(i * each, ((i + 1) * each).min(pages)))
}

#[derive(Debug)]
struct Stripe {
    pages: PageRange,
    fd: Arc<OwnedFd>,
    /// The file, once it is sealed.
    layer: Option<Arc<Layer>>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Fresh {
    stripes: Vec<Stripe>,
    /// Parts from the first page on whose mapping is private already, and which of them are sparse. Between calls there
    /// are any only if a freeze failed half-way; the next one goes on behind them.
    private: Vec<(PageRange, bool)>,
    /// The version, if a freeze failed behind its completion.
    tip: Option<(Arc<Snapshot>, Stats)>,
}

impl Fresh {
    /// Map zero-filled memory files over the first pages of an area.
    pub fn new(area: &Area, pages: u64) -> Result<Self> {
        let mut fresh = Self { stripes: Vec::new(), private: Vec::new(), tip: None };
        for stripe in stripes_of(pages) {
            let fd = memfd::create(c"quire-segment")?;
            memfd::truncate(fd.as_fd(), stripe.len * PAGE)?;
            fresh.stripes.push(Stripe { pages: stripe, fd: Arc::new(fd), layer: None });
        }
        for stripe in &fresh.stripes {
            stripe.map(area, stripe.pages)?;
        }
        Ok(fresh)
    }

    pub fn is_partly_private(&self) -> bool {
        !self.private.is_empty()
    }

    /// Whether all of so many pages are mapped privately.
    pub fn is_private(&self, pages: u64) -> bool {
        self.private_pages() == pages
    }

    fn private_pages(&self) -> u64 {
        self.private.last().map_or(0, |(part, _)| part.end())
    }

    pub fn grow(&mut self, area: &Area, more: PageRange) -> Result<()> {
        if more.len == 0 {
            return Ok(());
        }
        let Some(last) = self.stripes.last_mut() else {
            return Err(Error::Invalid("a segment without stripes".to_owned()));
        };
        memfd::truncate(last.fd.as_fd(), (more.end() - last.pages.start) * PAGE)?;
        last.map(area, more)?;
        last.pages.len = more.end() - last.pages.start;
        Ok(())
    }

    /// Write through the files: a full memory is an error and not a signal.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        for stripe in &self.stripes {
            let (start, end) = (stripe.pages.start * PAGE, stripe.pages.end() * PAGE);
            let (from, to) = (offset.max(start), (offset + bytes.len() as u64).min(end));
            if from < to {
                let part = &bytes[(from - offset) as usize..(to - offset) as usize];
                memfd::write_pieces(stripe.fd.as_fd(), from - start, &[Piece::of(part)])?;
            }
        }
        Ok(())
    }

    pub fn memory(&self) -> Result<super::Memory> {
        let mut bytes = 0;
        for stripe in &self.stripes {
            bytes += memfd::status(stripe.fd.as_fd())?.allocated_bytes;
        }
        Ok(super::Memory { layer_bytes: bytes, live_bytes: bytes, ..super::Memory::default() })
    }

    pub fn check(&self, pages: u64) -> Result<()> {
        let mut at = 0;
        for stripe in &self.stripes {
            if stripe.pages.start != at || memfd::status(stripe.fd.as_fd())?.size < stripe.pages.len * PAGE {
                return Err(Error::Malformed(format!("stripe {:?} does not follow page {at}", stripe.pages)));
            }
            at = stripe.pages.end();
        }
        if at == pages { Ok(()) } else { Err(Error::Malformed(format!("stripes end at page {at} of {pages}"))) }
    }

    /// Make the files the layers of the first version, and the mapping private over them. Nothing is copied.
    ///
    /// After an error the memory is as it was, and a repeated call goes on where this one stopped.
    pub fn freeze(&mut self, area: &Area, size_bytes: u64) -> Result<(Frozen, Stats)> {
        let tracking = tracking()?;
        for stripe in &self.stripes {
            let rest = PageRange::between(self.private_pages().max(stripe.pages.start), stripe.pages.end());
            if rest.len == 0 {
                continue;
            }
            // Holes must not fill while they are replaced by plain zero memory.
            let _hold = Hold::new(area, &[(rest, What::NewPages)], &tracking)?;
            for (part, sparse) in blocks(stripe, rest)? {
                if sparse {
                    area.map_zero(part.byte_offset(), part.byte_len(), Access::ReadWrite)?;
                } else {
                    let at = (part.start - stripe.pages.start) * PAGE;
                    area.map_file(
                        part.byte_offset(),
                        part.byte_len(),
                        stripe.fd.as_fd(),
                        at,
                        Sharing::Private,
                        Access::ReadWrite,
                    )?;
                }
                self.private.push((part, sparse));
            }
            for data in memfd::data_ranges(stripe.fd.as_fd(), PageRange::new(0, stripe.pages.len))? {
                area.prefault(PageRange::new(stripe.pages.start + data.start, 0).byte_offset(), data.byte_len());
            }
        }
        let (tip, stats) = match &self.tip {
            Some(done) => done.clone(),
            None => self.tip.insert(seal(&mut self.stripes, size_bytes)?).clone(),
        };
        let frozen = Frozen::start(area, tip, &self.private)?;
        Ok((frozen, stats))
    }
}

impl Stripe {
    /// Seal the file as a layer, unless an earlier attempt has.
    fn seal(&mut self, nodes: Vec<u64>, imports: Vec<LayerId>, size_bytes: u64, root: Entry) -> Result<Arc<Layer>> {
        if let Some(layer) = &self.layer {
            return Ok(Arc::clone(layer));
        }
        let layer = Layer::seal(Draft {
            fd: Arc::clone(&self.fd),
            data_pages: self.pages.len,
            nodes,
            imports,
            size_bytes,
            root,
            origins: Origins::default(),
            gathered: false,
        })?;
        self.layer = Some(Arc::clone(&layer));
        Ok(layer)
    }

    fn map(&self, area: &Area, part: PageRange) -> Result<()> {
        let at = (part.start - self.pages.start) * PAGE;
        area.map_file(part.byte_offset(), part.byte_len(), self.fd.as_fd(), at, Sharing::Shared, Access::ReadWrite)?;
        area.advise(part.byte_offset(), part.byte_len(), libc::MADV_NOHUGEPAGE);
        Ok(())
    }
}

/// The rest of a stripe cut into blocks of 512 pages with and without (true) any data, not too many of them.
fn blocks(stripe: &Stripe, rest: PageRange) -> Result<Vec<(PageRange, bool)>> {
    let mut held: Vec<PageRange> = Vec::new();
    for data in memfd::data_ranges(stripe.fd.as_fd(), PageRange::new(0, stripe.pages.len))? {
        let start = stripe.pages.start + data.start / FANOUT * FANOUT;
        let end = stripe.pages.start + data.end().next_multiple_of(FANOUT);
        let block = PageRange::between(start, end).intersect(&rest);
        let begin = held.last().map_or(block.start, |last| last.end().max(block.start));
        push_merged(&mut held, PageRange::between(begin, block.end()));
    }
    bridge(&mut held, runs_per_stripe());
    let mut out: Vec<(PageRange, bool)> = Vec::new();
    let mut at = rest.start;
    for block in held {
        out.push((PageRange::between(at, block.start), true));
        out.push((block, false));
        at = block.end();
    }
    out.push((PageRange::between(at, rest.end()), true));
    out.retain(|(part, _)| part.len > 0);
    Ok(out)
}

/// Pieces in which a stripe may be mapped, each of which takes two VMAs; all stripes together stay within twice the
/// budget of a mapping, half of what the process may have.
pub(super) fn runs_per_stripe() -> usize {
    vma_budget() / STRIPES as usize
}

/// Ranges of a file that hold data, with short holes included.
fn runs(stripe: &Stripe) -> Result<Vec<PageRange>> {
    let mut out: Vec<PageRange> = Vec::new();
    for data in memfd::data_ranges(stripe.fd.as_fd(), PageRange::new(0, stripe.pages.len))? {
        match out.last_mut() {
            Some(last) if data.start - last.end() < HOLE_PAGES => last.len = data.end() - last.start,
            _ => out.push(data),
        }
    }
    Ok(out)
}

/// Seal every file as a layer; the last one carries the page table.
fn seal(stripes: &mut [Stripe], size_bytes: u64) -> Result<(Arc<Snapshot>, Stats)> {
    let pages = pages_for(size_bytes);
    let Some((last, stripes)) = stripes.split_last_mut() else {
        return Err(Error::Invalid("a segment without stripes".to_owned()));
    };
    let mut patches = Vec::new();
    let mut others = Vec::new();
    for stripe in stripes {
        let held = runs(stripe)?;
        if held.is_empty() {
            continue;
        }
        patches.extend(held.iter().map(|run| Patch {
            pages: PageRange::new(stripe.pages.start + run.start, run.len),
            target: Target::Other { layer: others.len(), index: run.start },
        }));
        others.push(stripe.seal(Vec::new(), Vec::new(), 0, Entry::ZERO)?);
    }
    patches.extend(runs(last)?.iter().map(|run| Patch {
        pages: PageRange::new(last.pages.start + run.start, run.len),
        target: Target::Own { index: run.start },
    }));
    debug_assert_eq!(
        total(&intersection(&[PageRange::new(0, pages)], &patches.iter().map(|p| p.pages).collect::<Vec<_>>())),
        patches.iter().map(|p| p.pages.len).sum::<u64>()
    );
    let table = build(None, pages, &patches, &others, &[])?;
    let nodes_written = table.own.nodes;
    let top = last.seal(table.nodes, table.imports, size_bytes, table.root)?;
    let mut layers = vec![top];
    let mut counts: Vec<Count> = vec![table.own];
    layers.extend(others);
    counts.extend(&table.others);
    let snapshot = Snapshot::trusted(layers, counts)?;
    Ok((Arc::new(snapshot), Stats { pages_scanned: pages, pages_copied: 0, nodes_written, duration_ns: 0 }))
}
