//! Page tables against a plain vector: build, walk and diff, from one version to the next, with random patches.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use quire_core::layer::{Layer, LayerId, Trailer};
use quire_core::pages::{PAGE, PageRange, pages_for};
use quire_core::snapshot::Snapshot;
use quire_core::sys::memfd::{self, Piece};
use quire_core::sys::random;
use quire_core::table::build::{Patch, Target, build};
use quire_core::table::diff::diff;
use quire_core::table::level_for;
use quire_core::table::walk::Source;

/// Numbers that look random and are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

fn content(value: u64) -> [u8; PAGE as usize] {
    let mut page = [0; PAGE as usize];
    page.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&value.to_le_bytes()));
    page
}

/// One version: the snapshot, and the value that fills each page; what is not there reads zero.
#[derive(Clone)]
struct Version {
    snapshot: Arc<Snapshot>,
    values: BTreeMap<u64, u64>,
}

impl Version {
    fn value(&self, page: u64) -> u64 {
        self.values.get(&page).copied().unwrap_or(0)
    }

    /// The next version: `changes` are ascending, disjoint ranges, each filled with values from one on, or zero.
    fn next(old: Option<&Self>, pages: u64, changes: &[(PageRange, u64)], leaving: &[bool]) -> Self {
        let fd = memfd::create(c"test").unwrap();
        let (mut patches, mut written) = (Vec::new(), 0);
        let mut values = old.map_or_else(BTreeMap::new, |old| old.values.clone());
        values.split_off(&pages);
        let mut put = |page: &[u8]| {
            memfd::write_pieces(fd.as_fd(), written * PAGE, &[Piece::of(page)]).unwrap();
            written += 1;
            written - 1
        };
        for &(range, first) in changes {
            if first == 0 {
                patches.push(Patch { pages: range, target: Target::Zero });
                (range.start..range.end()).for_each(|page| _ = values.remove(&page));
                continue;
            }
            let index = (0..range.len).map(|i| put(&content(first + i))).collect::<Vec<u64>>()[0];
            patches.push(Patch { pages: range, target: Target::Own { index } });
            values.extend((0..range.len).map(|i| (range.start + i, first + i)));
        }
        // Pages of layers that leave move along, unless they are changed anyway.
        if let (Some(old), false) = (old, leaving.is_empty()) {
            let covered: Vec<PageRange> = changes.iter().map(|change| change.0).collect();
            for extent in old.snapshot.extents().unwrap() {
                let Source::Layer { layer, .. } = extent.source else { continue };
                if leaving[layer as usize] {
                    for part in quire_core::pages::subtract(&[extent.pages], &covered) {
                        let mut index = None;
                        for page in part.start..part.end() {
                            let at = put(&content(old.value(page)));
                            index.get_or_insert(at);
                        }
                        patches.push(Patch { pages: part, target: Target::Own { index: index.unwrap() } });
                    }
                }
            }
            patches.sort_by_key(|patch| patch.pages.start);
        }
        let below = old.map(|old| &*old.snapshot);
        let table = build(below, pages, &patches, &[], leaving).unwrap();
        let own = table.own;
        let trailer = Trailer {
            id: LayerId(random::id128().unwrap()),
            hashed: false,
            data_pages: written,
            node_pages: own.nodes,
            imports: table.imports,
            size_bytes: pages * PAGE,
            root: table.root,
        };
        let nodes: Vec<u8> = table.nodes.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        let rest = [nodes, trailer.encode().to_vec()].concat();
        memfd::write_pieces(fd.as_fd(), written * PAGE, &[Piece::of(&rest)]).unwrap();
        memfd::add_seals(fd.as_fd(), memfd::SEALS_IMMUTABLE).unwrap();
        let top = Layer::receive(fd).unwrap();
        let (mut layers, mut counts) = (vec![top], vec![own]);
        for (layer, count) in below.iter().flat_map(|old| old.layers()).zip(&table.old) {
            if !count.is_zero() {
                layers.push(Arc::clone(layer));
                counts.push(*count);
            }
        }
        if let Some(old) = below {
            for (i, leaves) in leaving.iter().enumerate() {
                let stays = layers.iter().any(|layer| Arc::ptr_eq(layer, &old.layers()[i]));
                assert!(!leaves || !stays, "a layer that leaves is still used");
            }
        }
        let snapshot = Arc::new(Snapshot::from_layers(layers).unwrap());
        assert_eq!(snapshot.counts(), counts, "the builder counts what the check finds");
        let version = Self { snapshot, values };
        version.compare_with_model();
        version
    }

    /// Every page is where the model says, read through the extents.
    fn compare_with_model(&self) {
        let mut found = BTreeMap::new();
        let mut at = 0;
        for extent in self.snapshot.extents().unwrap() {
            assert_eq!(extent.pages.start, at, "extents have no gaps");
            at = extent.pages.end();
            let Source::Layer { layer, index } = extent.source else { continue };
            let layer = &self.snapshot.layers()[layer as usize];
            for i in 0..extent.pages.len {
                let mut buf = [0; PAGE as usize];
                let page = layer.page(index + i, &mut buf).unwrap();
                found.insert(extent.pages.start + i, u64::from_le_bytes(page[..8].try_into().unwrap()));
            }
        }
        assert_eq!(at, self.snapshot.pages());
        assert_eq!(found, self.values);
    }

    /// `diff` says exactly which pages differ, both ways round.
    fn compare_with(&self, other: &Self) {
        let (short, long) = (self.snapshot.pages(), other.snapshot.pages());
        let (short, long) = (short.min(long), short.max(long));
        let mut pages: Vec<u64> = self.values.keys().chain(other.values.keys()).copied().collect();
        pages.retain(|page| *page < short && self.value(*page) != other.value(*page));
        pages.sort_unstable();
        pages.dedup();
        let mut expected = Vec::new();
        for page in pages {
            quire_core::pages::push_merged(&mut expected, PageRange::new(page, 1));
        }
        quire_core::pages::push_merged(&mut expected, PageRange::between(short, long));
        assert_eq!(diff(&self.snapshot, &other.snapshot).unwrap(), expected);
        assert_eq!(diff(&other.snapshot, &self.snapshot).unwrap(), expected);
    }
}

/// Ascending, disjoint changes, often at places where a node begins or ends.
fn changes(numbers: &mut Numbers, pages: u64, first_value: u64) -> Vec<(PageRange, u64)> {
    let mut out = Vec::new();
    let mut at = 0;
    let mut value = first_value;
    for _ in 0..=numbers.below(6) {
        let gap = match numbers.below(4) {
            0 => 0,
            1 => numbers.below(20),
            2 => (512 - at % 512) % 512,
            _ => numbers.below(pages),
        };
        at += gap;
        if at >= pages {
            break;
        }
        let len = match numbers.below(4) {
            0 => 512,
            1 => 1,
            _ => 1 + numbers.below(40),
        };
        let len = len.min(pages - at);
        let zero = numbers.below(4) == 0;
        out.push((PageRange::new(at, len), if zero { 0 } else { value }));
        value += len;
        at += len + 1;
    }
    out
}

fn lineage(seed: u64, pages: u64, versions: u64) {
    let mut numbers = Numbers(seed);
    let mut old: Option<Version> = None;
    let mut kept: Vec<Version> = Vec::new();
    for round in 0..versions {
        let changes = changes(&mut numbers, pages, 1 + round * 10_000);
        let layers = old.as_ref().map_or(0, |old| old.snapshot.layers().len());
        let leaving = if layers > 6 || (layers > 1 && numbers.below(5) == 0) {
            (0..layers).map(|_| numbers.below(2) == 0).collect()
        } else {
            Vec::new()
        };
        let next = Version::next(old.as_ref(), pages, &changes, &leaving);
        kept.iter().for_each(|other| next.compare_with(other));
        if numbers.below(3) == 0 {
            kept.push(next.clone());
        }
        if kept.len() > 4 {
            kept.swap_remove(numbers.below(4) as usize);
        }
        old = Some(next);
    }
}

#[test]
fn versions_agree_with_the_model_at_level_1() {
    (0..12).for_each(|seed| lineage(seed, 1 + seed * 43, 25));
}

#[test]
fn versions_agree_with_the_model_at_level_2() {
    (0..12).for_each(|seed| lineage(100 + seed, 513 + seed * 200, 25));
}

#[test]
fn versions_agree_with_the_model_at_level_3() {
    (0..4).for_each(|seed| lineage(200 + seed, (1 << 18) + 1 + seed * 511, 15));
}

#[test]
fn versions_agree_with_the_model_at_level_4() {
    (0..2).for_each(|seed| lineage(300 + seed, (1 << 27) + 512 * seed + 3, 10));
}

#[test]
fn growth_across_levels_keeps_every_page() {
    for seed in 0..10 {
        let mut numbers = Numbers(1000 + seed);
        let mut pages = 1 + numbers.below(500);
        let mut versions: Vec<Version> = Vec::new();
        let jumps = [511, 512, 513, 1024, 1 << 18, (1 << 18) + 1, (1 << 27) + 5];
        for (round, jump) in (0u64..).zip(jumps) {
            let changes = changes(&mut numbers, pages, 1 + round * 10_000);
            versions.push(Version::next(versions.last(), pages, &changes, &[]));
            pages = pages.max(jump + numbers.below(2));
            // Growth alone, without a change.
            let grown = Version::next(versions.last(), pages, &[], &[]);
            grown.compare_with(&versions[0]);
            versions.push(grown);
        }
        let last = versions.last().unwrap();
        assert_eq!(last.snapshot.level(), level_for(last.snapshot.pages()));
        versions.iter().for_each(|other| last.compare_with(other));
    }
}

#[test]
fn layers_that_leave_are_gone_whatever_else_changes() {
    for seed in 0..20 {
        let mut numbers = Numbers(2000 + seed);
        let pages = 1500;
        let mut version = Version::next(None, pages, &[(PageRange::new(0, pages), 1)], &[]);
        for round in 1..12 {
            let changes = changes(&mut numbers, pages, round * 10_000);
            version = Version::next(Some(&version), pages, &changes, &[]);
        }
        let all = vec![true; version.snapshot.layers().len()];
        let merged = Version::next(Some(&version), pages, &changes(&mut numbers, pages, 500_000), &all);
        assert_eq!(merged.snapshot.layers().len(), 1);
        version.compare_with(&merged);
    }
}

#[test]
fn pages_in_a_row_collapse_to_runs() {
    for pages in [1, 511, 512, 513, 1024, 5000] {
        let whole = Version::next(None, pages, &[(PageRange::new(0, pages), 1)], &[]);
        assert_eq!(whole.snapshot.counts()[0].nodes, 0, "{pages} pages in one run need no node");
        // Page by page, in the same order, is the same run.
        let single: Vec<_> = (0..pages).map(|page| (PageRange::new(page, 1), 1 + page)).collect();
        let pieced = Version::next(None, pages, &single, &[]);
        assert_eq!(pieced.snapshot.counts()[0].nodes, 0, "{pages} pages, one by one");
        whole.compare_with(&pieced);
        // One page that changes needs one node for each level, and no more.
        let changed = Version::next(Some(&whole), pages, &[(PageRange::new(pages / 2, 1), 9_999_999)], &[]);
        let level = u64::from(level_for(pages));
        assert!(changed.snapshot.counts()[0].nodes <= level);
        // All zero again is no node and no data.
        let zero = Version::next(Some(&changed), pages, &[(PageRange::new(0, pages), 0)], &[]);
        assert_eq!((zero.snapshot.layers().len(), zero.snapshot.data_pages()), (1, 0));
    }
}

#[test]
fn an_extent_is_the_same_however_it_is_asked_for() {
    let mut numbers = Numbers(77);
    let pages = 3000;
    let mut version = Version::next(None, pages, &[(PageRange::new(10, 2900), 1)], &[]);
    for round in 1..8 {
        let changes = changes(&mut numbers, pages, round * 10_000);
        version = Version::next(Some(&version), pages, &changes, &[]);
    }
    let all = version.snapshot.extents().unwrap();
    for _ in 0..500 {
        let start = numbers.below(pages);
        let range = PageRange::new(start, 1 + numbers.below(pages - start + 50));
        let mut clipped = Vec::new();
        for extent in &all {
            let part = extent.pages.intersect(&range);
            if part.len > 0 {
                clipped.push((part, extent.source.skip(part.start - extent.pages.start)));
            }
        }
        let found = version.snapshot.extents_in(range).unwrap();
        assert_eq!(found.iter().map(|extent| (extent.pages, extent.source)).collect::<Vec<_>>(), clipped);
    }
    assert_eq!(pages_for(version.snapshot.size_bytes()), pages);
}
