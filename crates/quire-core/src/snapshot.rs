//! A snapshot: layers, and the root of a page table in the first of them.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::layer::{Backing, Key, Layer, LayerId, MAX_LAYERS};
use crate::pages::{PAGE, PageRange, pages_for};
use crate::table::{Entry, Kind, level_for, span};
use crate::{Error, Result};

const NO_LAYER: u8 = u8::MAX;

/// What the making of a snapshot took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    pub pages_scanned: u64,
    pub pages_copied: u64,
    pub nodes_written: u64,
    pub duration_ns: u64,
}

/// Pages and nodes of one layer that a snapshot reaches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub data: u64,
    pub nodes: u64,
}

impl Count {
    #[must_use]
    pub const fn is_zero(&self) -> bool {
        self.data == 0 && self.nodes == 0
    }
}

/// An entry with its slot resolved to one of the snapshot's layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ref {
    Zero,
    Run { layer: u8, index: u64 },
    Table { layer: u8, index: u64 },
}

/// An immutable version of a segment.
#[derive(Debug)]
pub struct Snapshot {
    layers: Vec<Arc<Layer>>,
    /// For each layer, which of `layers` its slots mean.
    slots: Vec<[u8; MAX_LAYERS]>,
    counts: Vec<Count>,
    pages: u64,
    level: u32,
}

impl Snapshot {
    /// From layers that were found right already: `counts` says what each contributes.
    pub(crate) fn trusted(layers: Vec<Arc<Layer>>, counts: Vec<Count>) -> Result<Self> {
        let mut snapshot = Self::unchecked(layers)?;
        snapshot.counts = counts;
        Ok(snapshot)
    }

    /// From layers whose tables nobody has checked: checks them, all of it, before anything is believed.
    pub fn from_layers(layers: Vec<Arc<Layer>>) -> Result<Self> {
        let mut snapshot = Self::unchecked(layers)?;
        snapshot.counts = snapshot.check()?;
        Ok(snapshot)
    }

    /// From descriptors that a peer sent; the first is the top layer.
    pub fn receive(fds: Vec<OwnedFd>) -> Result<Self> {
        if fds.is_empty() || fds.len() > MAX_LAYERS {
            return Err(Error::Malformed(format!("{} layers; a snapshot has 1 to {MAX_LAYERS}", fds.len())));
        }
        let layers = fds.into_iter().map(Layer::receive).collect::<Result<Vec<_>>>()?;
        Self::from_layers(layers)
    }

    fn unchecked(layers: Vec<Arc<Layer>>) -> Result<Self> {
        if layers.is_empty() || layers.len() > MAX_LAYERS {
            return Err(Error::Malformed(format!("{} layers; a snapshot has 1 to {MAX_LAYERS}", layers.len())));
        }
        let size_bytes = layers[0].trailer().size_bytes;
        if size_bytes == 0 {
            return Err(Error::Malformed("the first layer is not the top of a snapshot".to_owned()));
        }
        let mut by_id: Vec<(LayerId, u8)> = Vec::with_capacity(layers.len());
        let mut keys: Vec<Key> = Vec::with_capacity(layers.len());
        for (i, layer) in layers.iter().enumerate() {
            by_id.push((layer.trailer().id, i as u8));
            keys.push(layer.key());
        }
        by_id.sort_unstable_by_key(|(id, _)| id.0);
        keys.sort_unstable_by_key(|key| (key.dev, key.ino));
        if by_id.windows(2).any(|w| w[0].0 == w[1].0) || keys.windows(2).any(|w| w[0] == w[1]) {
            return Err(Error::Malformed("a layer occurs twice".to_owned()));
        }
        let slots = layers
            .iter()
            .enumerate()
            .map(|(i, layer)| {
                let mut map = [NO_LAYER; MAX_LAYERS];
                map[0] = i as u8;
                for (slot, id) in layer.trailer().imports.iter().enumerate() {
                    if let Ok(at) = by_id.binary_search_by_key(&id.0, |(id, _)| id.0) {
                        map[slot + 1] = by_id[at].1;
                    }
                }
                map
            })
            .collect();
        let pages = pages_for(size_bytes);
        Ok(Self { counts: Vec::new(), slots, pages, level: level_for(pages), layers })
    }

    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.layers[0].trailer().size_bytes
    }

    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// The level of the root entry.
    #[must_use]
    pub const fn level(&self) -> u32 {
        self.level
    }

    #[must_use]
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    /// What each layer contributes, in the order of `layers`.
    #[must_use]
    pub fn counts(&self) -> &[Count] {
        &self.counts
    }

    /// Pages that hold data.
    #[must_use]
    pub fn data_pages(&self) -> u64 {
        self.counts.iter().map(|c| c.data).sum()
    }

    /// Raise unless the kernel guarantees that no byte can change, and the table is right.
    pub fn verify(&self) -> Result<()> {
        for layer in &self.layers {
            layer.verify()?;
        }
        self.check().map(drop)
    }

    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.layers.iter().all(|layer| layer.backing() == Backing::Sealed)
    }

    pub(crate) fn root(&self) -> Result<Ref> {
        self.resolve(0, self.layers[0].trailer().root)
    }

    /// An entry of a node (or the root) of `layer`.
    pub(crate) fn resolve(&self, layer: u8, entry: Entry) -> Result<Ref> {
        let find = |slot: u8| match self.slots[layer as usize][slot as usize] {
            NO_LAYER => Err(Error::Malformed(format!("slot {slot} of layer {layer} names a layer that is missing"))),
            at => Ok(at),
        };
        match entry.decode() {
            Some(Kind::Zero) => Ok(Ref::Zero),
            Some(Kind::Run { slot, index }) => Ok(Ref::Run { layer: find(slot)?, index }),
            Some(Kind::Node { slot, index }) => Ok(Ref::Table { layer: find(slot)?, index }),
            None => Err(Error::Malformed(format!("page-table entry {:#x}", entry.raw()))),
        }
    }

    /// Which of the layers a slot of `layer` means, if any of them.
    pub(crate) fn layer_of_slot(&self, layer: u8, slot: u8) -> Option<u8> {
        let at = self.slots[layer as usize][slot as usize];
        (at != NO_LAYER).then_some(at)
    }

    /// The slot by which `layer` names another layer, if it does.
    pub(crate) fn slot_of_layer(&self, layer: u8, other: u8) -> Option<u8> {
        self.slots[layer as usize].iter().position(|at| *at == other).map(|slot| slot as u8)
    }

    pub(crate) fn table(&self, layer: u8, index: u64) -> Result<&[u64]> {
        self.layers[layer as usize].node(index)
    }

    /// Child `i` of an entry that stands at `level` (at least 1) and covers pages from `base` on.
    pub(crate) fn child(&self, parent: Ref, level: u32, base: u64, i: u64) -> Result<Ref> {
        match parent {
            Ref::Zero => Ok(Ref::Zero),
            Ref::Run { layer, index } => {
                let skip = i * span(level - 1);
                Ok(if base + skip < self.pages { Ref::Run { layer, index: index + skip } } else { Ref::Zero })
            }
            // A table stands at its own level or below; seen from above, it is the first child.
            Ref::Table { .. } if level > self.level => Ok(if i == 0 { parent } else { Ref::Zero }),
            Ref::Table { layer, index } => self.resolve(layer, Entry::from_raw(self.table(layer, index)?[i as usize])),
        }
    }

    /// Which of `pages`, which a run places from its start on, are not holes.
    pub(crate) fn data_of(&self, at: Ref, pages: PageRange) -> Result<Vec<PageRange>> {
        let Ref::Run { layer, index } = at else { return Ok(Vec::new()) };
        let found = self.layers[layer as usize].data_ranges(PageRange::new(index, pages.len))?;
        Ok(found.iter().map(|range| PageRange::new(range.start - index + pages.start, range.len)).collect())
    }

    /// The content of one page of a run; None reads zero.
    pub(crate) fn page_of<'a>(
        &'a self,
        at: Ref,
        skip: u64,
        buf: &'a mut [u8; PAGE as usize],
    ) -> Result<Option<&'a [u8]>> {
        match at {
            Ref::Run { layer, index } => self.layers[layer as usize].page(index + skip, buf).map(Some),
            _ => Ok(None),
        }
    }
}
