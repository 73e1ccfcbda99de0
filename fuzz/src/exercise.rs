//! Everything that can be done with a snapshot that was accepted, compared with the model.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use quire_core::layout::Layout;
use quire_core::pages::PageRange;
use quire_core::sys::area::{Access, Area};
use quire_core::table::diff::diff;
use quire_core::table::walk::{Extent, Source};
use quire_core::{Mapping, PAGE, Segment, Snapshot, save};

use crate::Page;
use crate::honest::page;
use crate::model::Model;

/// Page numbers that are looked at.
const LOOKS: usize = 2048;
/// Snapshots with more data are not read whole.
const MOST_DATA_PAGES: u64 = 1 << 12;
/// Larger ones are not mapped.
const MOST_MAPPED_PAGES: u64 = 1 << 30;

fn page_at(address: usize, number: u64) -> Page {
    // SAFETY: the caller has this page mapped readable, and nothing writes to it.
    unsafe { std::ptr::read((address + (number * PAGE) as usize) as *const Page) }
}

fn assert_shows(address: usize, model: &Model, looks: &[u64]) {
    for &number in looks {
        assert!(page_at(address, number) == model.page(number), "page {number} shows wrong bytes");
    }
}

/// The walk agrees with itself and with the model.
pub fn walk(snapshot: &Snapshot, model: &Model) {
    assert_eq!((snapshot.size_bytes(), snapshot.pages()), (model.size_bytes, model.pages));
    let counts = snapshot.check().expect("an accepted snapshot is right");
    assert_eq!(counts, snapshot.counts());
    assert_eq!(snapshot.data_pages(), model.data_pages());
    let extents = snapshot.extents().expect("extents");
    let mut at = 0;
    for extent in &extents {
        assert!(extent.pages.start == at && extent.pages.len > 0, "a gap at page {at}");
        at = extent.pages.end();
    }
    assert_eq!(at, model.pages);
    for piece in &model.pieces {
        let from = Source::Layer { layer: piece.from.0 as u8, index: piece.from.1 };
        let found = snapshot.extents_in(PageRange::new(piece.start, piece.len)).expect("extents");
        assert_eq!(found, [Extent { pages: PageRange::new(piece.start, piece.len), source: from }]);
    }
    assert!(snapshot.verify().is_ok() || !snapshot.is_sealed());
}

/// Mappings show what the model says, whatever the budget.
pub fn map(snapshot: &Arc<Snapshot>, model: &Model) {
    if model.pages > MOST_MAPPED_PAGES {
        return;
    }
    let looks = model.interesting(LOOKS);
    let mapping = Mapping::new(Arc::clone(snapshot), false).expect("map");
    assert_shows(mapping.address(), model, &looks);
    let private = Mapping::new(Arc::clone(snapshot), true).expect("map");
    for &number in looks.iter().take(8) {
        let target = (private.address() + (number * PAGE) as usize) as *mut u8;
        // SAFETY: a private mapping is writable, and nobody else knows of this one.
        unsafe { target.write(!target.read()) };
    }
    assert_shows(mapping.address(), model, &looks[..looks.len().min(8)]);
    if model.data_pages() <= MOST_DATA_PAGES {
        for budget in [1, 5] {
            let area = Area::reserve((model.pages * PAGE) as usize).expect("reserve");
            Layout::build(&area, snapshot, Access::Read, budget).expect("lay out");
            assert_shows(area.addr(), model, &looks);
        }
    }
}

/// Say what a snapshot is made of, for a report.
fn describe(snapshot: &Snapshot) {
    for (layer, count) in snapshot.layers().iter().zip(snapshot.counts()) {
        let trailer = layer.trailer();
        eprintln!("inode {} id {:02x?} {trailer:?} {count:?}", layer.key().ino, &trailer.id.0[..4]);
    }
    eprintln!("{:?}", snapshot.extents().map(|extents| extents.into_iter().take(20).collect::<Vec<_>>()));
}

/// The difference of two snapshots is that of their models, both ways round; a mapping advances over it.
pub fn compare(a: &Arc<Snapshot>, model_a: &Model, b: &Arc<Snapshot>, model_b: &Model) {
    if model_a.data_pages().max(model_b.data_pages()) > MOST_DATA_PAGES {
        // Nearly all of it are holes, which must not take time.
        drop(diff(a, b).expect("diff"));
        return;
    }
    let mut expected = model_a.differing(model_b);
    let (short, long) = (model_a.pages.min(model_b.pages), model_a.pages.max(model_b.pages));
    for (x, y) in [(a, b), (b, a)] {
        let ranges = diff(x, y).expect("diff");
        let mut pages: Vec<u64> = ranges.iter().flat_map(|range| range.start..range.end().min(short)).collect();
        pages.dedup();
        if pages != expected {
            describe(x);
            describe(y);
            let wrong = (0..short).find(|page| pages.contains(page) != expected.contains(page));
            panic!("diff finds {} pages, {} differ; page {wrong:?} is wrong", pages.len(), expected.len());
        }
        assert!(short == long || ranges.last().map(PageRange::end) == Some(long), "the longer end differs");
        assert!(ranges.windows(2).all(|two| two[0].end() < two[1].start), "ranges are merged and ascending");
    }
    if model_a.size_bytes == model_b.size_bytes && model_a.pages <= MOST_MAPPED_PAGES {
        let mut mapping = Mapping::new(Arc::clone(a), false).expect("map");
        mapping.advance(b).expect("advance");
        expected.extend(model_a.interesting(LOOKS));
        expected.extend(model_b.interesting(LOOKS));
        assert_shows(mapping.address(), model_b, &expected);
        mapping.advance(a).expect("advance back");
        assert_shows(mapping.address(), model_a, &expected);
    }
}

/// Saving and loading gives the same pages.
pub fn keep(snapshot: &Arc<Snapshot>, model: &Model) {
    if model.data_pages() > MOST_DATA_PAGES {
        return;
    }
    let path = scratch().join("saved");
    save::save(snapshot, &path).expect("save");
    for copy in [false, true] {
        let loaded = Arc::new(save::load(&path, copy, true).expect("load what was saved"));
        assert_eq!(loaded.size_bytes(), model.size_bytes);
        assert!(loaded.data_pages() <= model.data_pages(), "holes need not be stored, nothing else is new");
        assert_eq!(loaded.is_sealed(), copy);
        assert_eq!(loaded.verify().is_ok(), copy);
        if model.pages <= MOST_MAPPED_PAGES {
            let mapping = Mapping::new(Arc::clone(&loaded), false).expect("map");
            assert_shows(mapping.address(), model, &model.interesting(LOOKS));
        }
        assert!(diff(snapshot, &loaded).expect("diff").is_empty(), "what was saved differs");
    }
    std::fs::remove_file(&path).expect("remove");
}

/// A segment that starts from it can be written, and its next versions are right.
pub fn go_on(snapshot: &Arc<Snapshot>, model: &Model, choices: u8) {
    if model.data_pages() > MOST_DATA_PAGES || model.pages > 1 << 16 {
        return;
    }
    let segment = Segment::start_as(snapshot).expect("fork");
    let mut written = std::collections::BTreeMap::new();
    let mut before = Arc::clone(snapshot);
    for round in 0..3u64 {
        let mut changed = std::collections::BTreeSet::new();
        for i in 0..=u64::from(choices % 4) {
            let number = (u64::from(choices) * 977 + round * 331 + i * 57) % model.pages;
            let mut content = page(round << 32 | number | 1 << 60);
            if i == 3 {
                content = [0; PAGE as usize];
            }
            let len = (model.size_bytes - number * PAGE).min(PAGE) as usize;
            let old = written.get(&number).copied().unwrap_or_else(|| model.page(number));
            content[len..].copy_from_slice(&old[len..]);
            segment.write(number * PAGE, &content[..len]).expect("write");
            if content != old {
                changed.insert(number);
            }
            written.insert(number, content);
        }
        let next = segment.snapshot().expect("the next version").0;
        assert_eq!(next.check().expect("the next version is right"), next.counts());
        segment.check_invariants().expect("invariants");
        let mapping = Mapping::new(Arc::clone(&next), false).expect("map");
        for (number, content) in &written {
            assert!(page_at(mapping.address(), *number) == *content, "page {number} was not published");
        }
        for number in model.interesting(256) {
            if !written.contains_key(&number) {
                assert!(page_at(mapping.address(), number) == model.page(number), "page {number} changed");
            }
        }
        let pages: Vec<u64> =
            diff(&before, &next).expect("diff").iter().flat_map(|range| range.start..range.end()).collect();
        assert!(pages.iter().all(|number| changed.contains(number)), "{pages:?} is more than {changed:?}");
        before = next;
    }
    let merged = PAGE * (model.pages + 600);
    segment.grow(merged, true).expect("grow");
    let grown = segment.snapshot().expect("the grown version").0;
    assert_eq!(grown.check().expect("the grown version is right"), grown.counts());
}

/// A directory of this process in memory.
pub fn scratch() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let memory = Path::new("/dev/shm");
        let base = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let dir = base.join(format!("quire-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory for saved files");
        dir
    })
}
