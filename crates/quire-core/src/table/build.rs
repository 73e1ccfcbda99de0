//! Building the table of a new version: a persistent tree, of which only the paths to changed pages are copied.

use std::sync::Arc;

use crate::layer::{Layer, LayerId, MAX_IMPORTS, MAX_LAYERS};
use crate::pages::{FANOUT, PageRange};
use crate::snapshot::{Count, Ref, Snapshot};
use crate::table::{Entry, Kind, level_for, span};
use crate::{Error, Result};

/// What pages of the new version become.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    Zero,
    /// Pages of the layer being made.
    Own {
        index: u64,
    },
    /// Pages of another new layer, by its place in the list given to the builder.
    Other {
        layer: usize,
        index: u64,
    },
}

/// A range of pages and what it becomes.
#[derive(Clone, Copy, Debug)]
pub struct Patch {
    pub pages: PageRange,
    pub target: Target,
}

/// The outcome: nodes and root for the new layer, and what the layers below still contribute.
pub struct Table {
    pub root: Entry,
    pub nodes: Vec<u64>,
    /// Ids in slot order. Some may be of layers that the new version does not use.
    pub imports: Vec<LayerId>,
    /// Of the new layer itself.
    pub own: Count,
    /// Of the other new layers, in the order given.
    pub others: Vec<Count>,
    /// Of the old version's layers, in its order.
    pub old: Vec<Count>,
}

/// A slot that is not assigned yet.
const UNASSIGNED: u8 = u8::MAX;

struct Builder<'a> {
    old: Option<&'a Snapshot>,
    old_pages: u64,
    new_pages: u64,
    others: &'a [Arc<Layer>],
    /// Old layers that must not be used any more, by index.
    leaving: &'a [bool],
    slots_of_old: Vec<u8>,
    slots_of_others: Vec<u8>,
    /// Slots below the number of imports whose layer has gone.
    free_slots: Vec<u8>,
    table: Table,
}

/// Build the table of `new_pages` pages from an old version and ascending, disjoint patches.
///
/// Layers marked in `leaving` (by index in the old version; empty for none) contribute no node to the result;
/// the patches must cover all their data pages.
pub fn build(
    old: Option<&Snapshot>,
    new_pages: u64,
    patches: &[Patch],
    others: &[Arc<Layer>],
    leaving: &[bool],
) -> Result<Table> {
    let old_layers = old.map_or(0, |old| old.layers().len());
    let mut builder = Builder {
        old,
        old_pages: old.map_or(0, Snapshot::pages),
        new_pages,
        others,
        leaving,
        slots_of_old: vec![UNASSIGNED; old_layers],
        slots_of_others: vec![UNASSIGNED; others.len()],
        free_slots: Vec::new(),
        table: Table {
            root: Entry::ZERO,
            nodes: Vec::new(),
            imports: Vec::new(),
            own: Count::default(),
            others: vec![Count::default(); others.len()],
            old: old.map_or_else(Vec::new, |old| old.counts().to_vec()),
        },
    };
    for patch in patches {
        match patch.target {
            Target::Zero => {}
            Target::Own { .. } => builder.table.own.data += patch.pages.len,
            Target::Other { layer, .. } => builder.table.others[layer].data += patch.pages.len,
        }
    }
    let root = match old {
        Some(old) => {
            builder.keep_slots(old);
            old.root()?
        }
        None => Ref::Zero,
    };
    let level = level_for(new_pages);
    builder.table.root = builder.subtree(level, 0, root, patches)?.0;
    builder.table.own.nodes = builder.table.nodes.len() as u64 / FANOUT;
    Ok(builder.table)
}

impl Builder<'_> {
    /// The entry for a subtree, and whether it differs from the old one.
    fn subtree(&mut self, level: u32, base: u64, old: Ref, patches: &[Patch]) -> Result<(Entry, bool)> {
        if base >= self.new_pages {
            return Ok((Entry::ZERO, false));
        }
        let end = (base + span(level)).min(self.new_pages);
        if let [only] = patches {
            if only.pages.start <= base && only.pages.end() >= end {
                self.release(level, base, old)?;
                return Ok((self.patched(only, base)?, true));
            }
        }
        if patches.is_empty() {
            // A run at the right edge is as long as the pages that exist, so an edge that moves is written anew.
            let moved = (base + span(level)).min(self.old_pages) != end && old != Ref::Zero;
            let inspect = !self.leaving.is_empty() && matches!(old, Ref::Table { .. });
            if !moved && !inspect {
                return Ok((self.kept(old)?, false));
            }
        }
        self.node(level, base, end, old, patches)
    }

    /// The entry of a subtree whose children have to be looked at one by one.
    fn node(&mut self, level: u32, base: u64, end: u64, old: Ref, patches: &[Patch]) -> Result<(Entry, bool)> {
        if level == 0 {
            return Err(Error::Malformed("a node below the last level".to_owned()));
        }
        let below = span(level - 1);
        let children = (end - base).div_ceil(below);
        let table = match old {
            // A table that stands below this level (the tree has grown) stays as it is.
            Ref::Table { layer, index } if self.old.is_none_or(|old| level <= old.level()) => Some((layer, index)),
            _ => None,
        };
        if let Some((layer, _)) = table {
            self.table.old[layer as usize].nodes -= 1;
        }
        let before = self.table.nodes.len();
        let mut out = [0u64; FANOUT as usize];
        let mut changed = !patches.is_empty() || table.is_none();
        if level == 1 {
            // What the node would be if nothing changed; a node that is not there yet is made from its one entry.
            let mut made = [0u64; FANOUT as usize];
            let (holder, entries) = match (table, old, self.old) {
                (Some((layer, index)), _, Some(snapshot)) => (Some(layer), snapshot.table(layer, index)?),
                (_, Ref::Run { layer, index }, _) => {
                    let first = Entry::run(self.slot_of_old(layer)?, index).raw();
                    let exist = children.min(self.old_pages.saturating_sub(base));
                    (0..exist).for_each(|i| made[i as usize] = first + i);
                    (None, &made[..])
                }
                _ => (None, &made[..]),
            };
            self.leaf(base, children, holder, old, entries, patches, &mut out)?;
        } else {
            let mut rest = patches;
            for i in 0..children {
                let child_base = base + i * below;
                let child_old = match self.old {
                    Some(snapshot) => snapshot.child(old, level, base, i)?,
                    None => Ref::Zero,
                };
                let passed = rest.partition_point(|patch| patch.pages.end() <= child_base);
                rest = &rest[passed..];
                let here = rest.partition_point(|patch| patch.pages.start < child_base + below);
                let (entry, differs) = self.subtree(level - 1, child_base, child_old, &rest[..here])?;
                out[i as usize] = entry.raw();
                changed |= differs;
            }
        }
        if let Some((layer, _)) = table {
            let moved = (base + span(level)).min(self.old_pages) != end;
            if !changed && !moved && !self.leaving.get(layer as usize).is_some_and(|leaves| *leaves) {
                self.table.old[layer as usize].nodes += 1;
                self.table.nodes.truncate(before);
                return Ok((self.kept(old)?, false));
            }
        }
        if let Some(entry) = collapsed(&out[..children as usize], below) {
            return Ok((entry, true));
        }
        let number = self.table.nodes.len() as u64 / FANOUT;
        self.table.nodes.extend_from_slice(&out);
        Ok((Entry::node(0, number), true))
    }

    /// The entries of a node of the last level: patched where there are patches, kept elsewhere.
    ///
    /// With a `holder`, `entries` are a node of that old layer; without, they are written with our own slots.
    #[allow(clippy::too_many_arguments)]
    fn leaf(
        &mut self,
        base: u64,
        children: u64,
        holder: Option<u8>,
        old: Ref,
        entries: &[u64],
        patches: &[Patch],
        out: &mut [u64; FANOUT as usize],
    ) -> Result<()> {
        let mut slots = [UNASSIGNED; MAX_LAYERS];
        let mut at = 0;
        for patch in patches {
            let start = patch.pages.start.max(base) - base;
            let end = (patch.pages.end() - base).min(children);
            let kept = at as usize..start as usize;
            self.translate(holder, &mut slots, &entries[kept.clone()], &mut out[kept])?;
            let mut entry = self.patched(patch, base + start)?.raw();
            for i in start..end {
                let before = match (holder, self.old) {
                    (Some(holder), Some(snapshot)) => snapshot.resolve(holder, Entry::from_raw(entries[i as usize]))?,
                    _ if entries[i as usize] != 0 => old,
                    _ => Ref::Zero,
                };
                if let Ref::Run { layer, .. } = before {
                    self.table.old[layer as usize].data -= 1;
                }
                out[i as usize] = entry;
                // The next page of a run is the next index, which stands in the low bits.
                entry += u64::from(entry != 0);
            }
            at = end;
        }
        let kept = at as usize..children as usize;
        self.translate(holder, &mut slots, &entries[kept.clone()], &mut out[kept])
    }

    /// Copy entries of an old node, replacing its slots by ours.
    fn translate(
        &mut self,
        holder: Option<u8>,
        slots: &mut [u8; MAX_LAYERS],
        from: &[u64],
        to: &mut [u64],
    ) -> Result<()> {
        let (Some(holder), Some(old)) = (holder, self.old) else {
            to.copy_from_slice(from);
            return Ok(());
        };
        for (out, &raw) in to.iter_mut().zip(from) {
            if raw == 0 {
                continue;
            }
            let entry = Entry::from_raw(raw);
            let slot = &mut slots[entry.slot() as usize];
            if *slot == UNASSIGNED {
                *slot = match old.resolve(holder, entry)? {
                    Ref::Run { layer, .. } | Ref::Table { layer, .. } => self.slot_of_old(layer)?,
                    Ref::Zero => 0,
                };
            }
            *out = entry.with_slot(*slot).raw();
        }
        Ok(())
    }

    /// Give layers of the old version the slots they had in its top layer, so that equal entries stay equal words.
    fn keep_slots(&mut self, old: &Snapshot) {
        let top = old.layers()[0].trailer();
        self.table.imports.clone_from(&top.imports);
        for (i, id) in top.imports.iter().enumerate() {
            let slot = i as u8 + 1;
            match old.layers().iter().position(|layer| layer.trailer().id == *id) {
                Some(layer) => self.slots_of_old[layer] = slot,
                None => self.free_slots.push(slot),
            }
        }
    }

    /// An old place, as an entry of the new layer.
    fn kept(&mut self, old: Ref) -> Result<Entry> {
        match old {
            Ref::Zero => Ok(Entry::ZERO),
            Ref::Run { layer, index } => Ok(Entry::run(self.slot_of_old(layer)?, index)),
            Ref::Table { layer, index } => Ok(Entry::node(self.slot_of_old(layer)?, index)),
        }
    }

    fn patched(&mut self, patch: &Patch, base: u64) -> Result<Entry> {
        let skip = base - patch.pages.start;
        match patch.target {
            Target::Zero => Ok(Entry::ZERO),
            Target::Own { index } => Ok(Entry::run(0, index + skip)),
            Target::Other { layer, index } => {
                if self.slots_of_others[layer] == UNASSIGNED {
                    self.slots_of_others[layer] = self.import(&Arc::clone(&self.others[layer]))?;
                }
                let slot = self.slots_of_others[layer];
                Ok(Entry::run(slot, index + skip))
            }
        }
    }

    fn slot_of_old(&mut self, layer: u8) -> Result<u8> {
        if self.slots_of_old[layer as usize] == UNASSIGNED {
            let Some(old) = self.old else {
                return Err(Error::Malformed("an old page without an old version".to_owned()));
            };
            self.slots_of_old[layer as usize] = self.import(&old.layers()[layer as usize])?;
        }
        Ok(self.slots_of_old[layer as usize])
    }

    fn import(&mut self, layer: &Layer) -> Result<u8> {
        let id = layer.trailer().id;
        if let Some(slot) = self.free_slots.pop() {
            self.table.imports[slot as usize - 1] = id;
            return Ok(slot);
        }
        if self.table.imports.len() >= MAX_IMPORTS {
            return Err(Error::Unsupported(format!("a layer cannot import more than {MAX_IMPORTS} others")));
        }
        self.table.imports.push(id);
        Ok(self.table.imports.len() as u8)
    }

    /// Account for a subtree that the new version does not use any more.
    fn release(&mut self, level: u32, base: u64, old: Ref) -> Result<()> {
        match old {
            Ref::Zero => {}
            Ref::Run { layer, .. } => {
                self.table.old[layer as usize].data -= span(level).min(self.old_pages.saturating_sub(base));
            }
            Ref::Table { layer, .. } => {
                let Some(snapshot) = self.old else { return Ok(()) };
                if level <= snapshot.level() {
                    self.table.old[layer as usize].nodes -= 1;
                }
                let below = span(level - 1);
                for i in 0..FANOUT {
                    self.release(level - 1, base + i * below, snapshot.child(old, level, base, i)?)?;
                }
            }
        }
        Ok(())
    }
}

/// The single entry that says the same as all these children, if there is one.
fn collapsed(children: &[u64], below: u64) -> Option<Entry> {
    let first = Entry::from_raw(*children.first()?);
    match first.decode()? {
        Kind::Zero => children.iter().all(|entry| *entry == 0).then_some(Entry::ZERO),
        Kind::Run { .. } => {
            let goes_on = |(i, entry): (usize, &u64)| *entry == first.raw() + i as u64 * below;
            children.iter().enumerate().all(goes_on).then_some(first)
        }
        Kind::Node { .. } => None,
    }
}
