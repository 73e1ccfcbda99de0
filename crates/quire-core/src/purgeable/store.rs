//! Values in purgeable pages, packed, each with a proof that all of it is still there.
//!
//! Each page starts with a word that is not zero, its mark; values fill the rest, one after another. A value is there
//! exactly if the marks of all its pages are. To read it its pages are held first, so that none goes while it is copied,
//! and released again in lots. What the kernel may not take is therefore bounded, whatever is stored: the pages of the
//! slab that small values go to, and one lot.
//!
//! Small values share pages; a page is given back to the kernel when the last of its values is freed. Long values have
//! pages of their own.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::runs::Runs;
use crate::forking::{self, ForkAware};
use crate::pages::{PAGE, PageRange};
use crate::sys::area::{Access, Area};
use crate::sys::lazyfree;
use crate::{Error, Result};

const PAGE_BYTES: usize = PAGE as usize;
/// "quire" and a byte that is not zero: any value that is not zero proves the page.
const MARK: [u8; 8] = *b"quire\x01\x01\x01";
/// Bytes of values in a page.
const ROOM: usize = PAGE_BYTES - MARK.len();
/// Pages that are mapped at once, for a small number of VMAs; unmapped when none of them is used.
const ARENA_PAGES: u64 = 16384;
/// Pages that small values go to one after another.
const SLAB_PAGES: u64 = 16;
/// Longer values have pages of their own. At this length an eighth of them may be unused, on average a sixteenth.
const LONGEST_IN_SLAB: usize = 8 * ROOM;
/// Pages that are held at once for reading or being written.
const LOT: usize = 64;

/// The page is dirty, and in `Store::held`.
const HELD: u16 = 1 << 15;
/// The page belongs to the slab, and so is dirty too.
const OPEN: u16 = 1 << 14;
/// The page was seen to be gone.
const LOST: u16 = 1 << 13;
/// How many values are in the page.
const VALUES: u16 = LOST - 1;
const _: () = assert!(ROOM <= VALUES as usize, "as many values of one byte fit in a page as can be counted");

/// What happened to values.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    pub hits: u64,
    pub misses: u64,
    pub purged: u64,
    pub evicted: u64,
}

/// Where a value is: its first page, by address, and the first byte in the room of that page.
#[derive(Clone, Copy, Debug)]
struct Place {
    page: u64,
    start: usize,
    len: usize,
}

impl Place {
    const fn pages(&self) -> PageRange {
        PageRange::new(self.page, if self.len == 0 { 0 } else { (self.start + self.len).div_ceil(ROOM) as u64 })
    }
}

/// Pages mapped together.
#[derive(Debug)]
struct Arena {
    area: Area,
    states: Vec<u16>,
}

impl Arena {
    fn pages(&self) -> PageRange {
        PageRange::new((self.area.addr() / PAGE_BYTES) as u64, self.states.len() as u64)
    }

    fn state(&mut self, page: u64) -> &mut u16 {
        let first = self.pages().start;
        &mut self.states[(page - first) as usize]
    }

    fn offset(&self, page: u64) -> usize {
        page as usize * PAGE_BYTES - self.area.addr()
    }
}

/// The run that small values are packed into; `filled` counts bytes of room.
#[derive(Clone, Copy, Debug)]
struct Slab {
    pages: PageRange,
    filled: usize,
}

/// A store of values, each owned by an `Entry`.
#[derive(Debug, Default)]
pub struct Store {
    arenas: BTreeMap<u64, Arena>,
    free: Runs,
    slab: Option<Slab>,
    /// Pages that may be dirty and are to be released; those without `HELD` were freed meanwhile.
    held: Vec<u64>,
    used_pages: u64,
    value_bytes: u64,
    pub counters: Counters,
}

fn locked(store: &Mutex<Store>) -> MutexGuard<'_, Store> {
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// An empty store. It is shared as a mutex so that entries can free themselves and a fork waits for what runs.
    pub fn new() -> Result<Arc<Mutex<Self>>> {
        forking::enlist(|| Ok(Self::default()))
    }

    /// Bytes of all values that were not freed, those that were purged among them until that is noticed.
    #[must_use]
    pub const fn value_bytes(&self) -> u64 {
        self.value_bytes
    }

    /// Bytes of all pages that have values.
    #[must_use]
    pub const fn page_bytes(&self) -> u64 {
        self.used_pages * PAGE
    }

    /// Bytes of pages that are in memory now.
    pub fn resident_bytes(&self) -> Result<u64> {
        let mut pages = 0;
        for arena in self.arenas.values() {
            let there = lazyfree::resident(&arena.area, 0, arena.area.len())?;
            pages += there.into_iter().filter(|&there| there).count() as u64;
        }
        Ok(pages * PAGE)
    }

    /// Note which pages are gone, without touching any: that would make the kernel think they are in use.
    pub fn sweep(&mut self) -> Result<()> {
        for arena in self.arenas.values_mut() {
            let there = lazyfree::resident(&arena.area, 0, arena.area.len())?;
            for (state, there) in arena.states.iter_mut().zip(there) {
                if !there && *state & VALUES > 0 && *state & (HELD | OPEN) == 0 {
                    *state |= LOST;
                }
            }
        }
        Ok(())
    }

    fn arena(&mut self, page: u64) -> Option<&mut Arena> {
        self.arenas.range_mut(..=page).next_back().map(|(_, arena)| arena).filter(|arena| page < arena.pages().end())
    }

    fn owner(&mut self, page: u64) -> &mut Arena {
        self.arena(page).expect("a page that is in use is mapped")
    }

    fn take(&mut self, pages: u64) -> Result<u64> {
        if let Some(start) = self.free.take(pages) {
            return Ok(start);
        }
        let map = |pages: u64| {
            let bytes = usize::try_from(pages * PAGE).map_err(|_| Error::Memory("too large a value".to_owned()))?;
            let area = Area::reserve(bytes)?;
            area.map_zero(0, bytes, Access::ReadWrite)?;
            Ok(Arena { area, states: vec![0; pages as usize] })
        };
        // Where address space is scarce, what is needed may still fit.
        let arena = map(pages.max(ARENA_PAGES)).or_else(|_: Error| map(pages))?;
        let all = arena.pages();
        self.arenas.insert(all.start, arena);
        self.free.give(all, all);
        Ok(self.free.take(pages).expect("an arena that is at least as long"))
    }

    /// Give pages that hold no value back, to the kernel too.
    fn give(&mut self, run: PageRange) {
        if run.len == 0 {
            return;
        }
        let arena = self.owner(run.start);
        for page in run.start..run.end() {
            *arena.state(page) = 0;
        }
        // A refusal (mlockall) means that the pages stay in memory until they are used again or unmapped.
        arena.area.advise(arena.offset(run.start), run.byte_len(), libc::MADV_DONTNEED);
        let all = arena.pages();
        if self.free.give(run, all) == all {
            self.free.remove(all);
            self.arenas.remove(&all.start);
        }
    }

    /// Let the kernel take what is held.
    fn release_held(&mut self) -> Result<()> {
        let mut pages = std::mem::take(&mut self.held);
        pages.sort_unstable();
        pages.dedup();
        // Freed meanwhile, and perhaps unmapped or used again.
        pages.retain(|&page| self.arena(page).is_some_and(|arena| *arena.state(page) & HELD != 0));
        let mut rest = pages.as_slice();
        while let Some(&first) = rest.first() {
            let arena = self.owner(first);
            let end = arena.pages().end();
            let count = (first..end).zip(rest).take_while(|(page, held)| page == *held).count();
            let run = PageRange::new(first, count as u64);
            let released = lazyfree::release(&arena.area, arena.offset(first), run.byte_len());
            if released.is_err() {
                self.held = rest.to_vec();
                return released;
            }
            for page in first..run.end() {
                *arena.state(page) &= !HELD;
            }
            rest = &rest[count..];
        }
        Ok(())
    }

    /// From now on the slab's pages are like any others; those that hold no value are free.
    fn close_slab(&mut self) -> Result<()> {
        let Some(slab) = self.slab.take() else { return Ok(()) };
        let mut empty = PageRange::new(slab.pages.start, 0);
        for page in slab.pages.start..slab.pages.end() {
            let state = self.owner(page).state(page);
            *state &= !OPEN;
            if *state & VALUES > 0 {
                *state |= HELD;
                self.held.push(page);
                self.give(empty);
                empty = PageRange::new(page + 1, 0);
            } else {
                empty.len += 1;
            }
        }
        self.give(empty);
        self.release_held()
    }

    fn open_slab(&mut self) -> Result<()> {
        self.close_slab()?;
        let pages = PageRange::new(self.take(SLAB_PAGES)?, SLAB_PAGES);
        let arena = self.owner(pages.start);
        for page in pages.start..pages.end() {
            *arena.state(page) = OPEN;
        }
        self.slab = Some(Slab { pages, filled: 0 });
        Ok(())
    }

    fn write(&mut self, data: &[u8]) -> Result<Place> {
        if data.is_empty() {
            return Ok(Place { page: 0, start: 0, len: 0 });
        }
        let place = if data.len() > LONGEST_IN_SLAB {
            Place { page: self.take(data.len().div_ceil(ROOM) as u64)?, start: 0, len: data.len() }
        } else {
            let fits = |slab: &Slab| data.len() <= slab.pages.len as usize * ROOM - slab.filled;
            if !self.slab.as_ref().is_some_and(fits) {
                self.open_slab()?;
            }
            let slab = self.slab.as_mut().expect("just opened");
            let (page, start) = (slab.pages.start + (slab.filled / ROOM) as u64, slab.filled % ROOM);
            slab.filled += data.len();
            Place { page, start, len: data.len() }
        };
        let mut rest = data;
        let mut start = place.start;
        for page in place.page..place.pages().end() {
            let arena = self.owner(page);
            let at = arena.offset(page);
            if start == 0 {
                arena.area.store(at, &MARK);
            }
            let (now, later) = rest.split_at(rest.len().min(ROOM - start));
            arena.area.store(at + MARK.len() + start, now);
            let state = arena.state(page);
            *state += 1;
            let (first, open) = (*state & VALUES == 1, *state & OPEN != 0);
            if !open {
                *state |= HELD;
                self.held.push(page);
            }
            self.used_pages += u64::from(first);
            (rest, start) = (later, 0);
            if self.held.len() >= LOT {
                if let Err(error) = self.release_held() {
                    self.unwrite(place, page);
                    return Err(error);
                }
            }
        }
        self.value_bytes += place.len as u64;
        if data.len() > LONGEST_IN_SLAB {
            if let Err(error) = self.release_held() {
                self.erase(place);
                return Err(error);
            }
        }
        Ok(place)
    }

    /// Undo a write that got as far as `last`.
    fn unwrite(&mut self, place: Place, last: u64) {
        for page in last + 1..place.pages().end() {
            let state = self.owner(page).state(page);
            *state += 1;
            self.used_pages += u64::from(*state & VALUES == 1);
        }
        self.value_bytes += place.len as u64;
        self.erase(place);
    }

    fn erase(&mut self, place: Place) {
        let mut empty = PageRange::new(place.page, 0);
        for page in place.page..place.pages().end() {
            let state = self.owner(page).state(page);
            *state -= 1;
            let (none_left, open) = (*state & VALUES == 0, *state & OPEN != 0);
            self.used_pages -= u64::from(none_left);
            if none_left && !open {
                empty.len += 1;
            } else {
                self.give(empty);
                empty = PageRange::new(page + 1, 0);
            }
        }
        self.give(empty);
        self.value_bytes -= place.len as u64;
    }

    /// Copy a value out; false if some of it is gone.
    fn read(&mut self, place: Place, to: &mut [MaybeUninit<u8>]) -> Result<bool> {
        assert_eq!(to.len(), place.len, "a value is copied whole");
        let mut rest = to;
        let mut start = place.start;
        for page in place.page..place.pages().end() {
            let arena = self.owner(page);
            let at = arena.offset(page);
            if *arena.state(page) & (HELD | OPEN) == 0 {
                if *arena.state(page) & LOST != 0 || lazyfree::hold(&arena.area, at) == 0 {
                    *arena.state(page) |= LOST;
                    // Holding a lost page allocated a zero one.
                    arena.area.advise(at, PAGE_BYTES, libc::MADV_DONTNEED);
                    self.counters.purged += 1;
                    return Ok(false);
                }
                *arena.state(page) |= HELD;
                self.held.push(page);
            }
            let (now, later) = rest.split_at_mut(rest.len().min(ROOM - start));
            self.owner(page).area.load(at + MARK.len() + start, now);
            (rest, start) = (later, 0);
            if self.held.len() >= LOT {
                self.release_held()?;
            }
        }
        self.counters.hits += 1;
        Ok(true)
    }

    /// Check that what is counted is what is there.
    pub fn check_invariants(&mut self) -> Result<()> {
        let wrong = |what: &str| Err(Error::Malformed(format!("purgeable store: {what}")));
        let states = || self.arenas.values().flat_map(|arena| arena.states.iter());
        if states().filter(|&state| state & VALUES > 0).count() as u64 != self.used_pages {
            return wrong("pages with values are not as many as counted");
        }
        let open = self.slab.map_or(0, |slab| slab.pages.len);
        if states().filter(|&state| state & OPEN != 0).count() as u64 != open {
            return wrong("pages are open without a slab");
        }
        let held: Vec<u64> = self
            .arenas
            .values()
            .flat_map(|arena| {
                let start = arena.pages().start;
                (start..).zip(&arena.states).filter(|(_, state)| *state & HELD != 0).map(|(page, _)| page)
            })
            .collect();
        if held.len() > LOT || held.iter().any(|page| !self.held.contains(page)) {
            return wrong("pages are held that nobody will release");
        }
        Ok(())
    }
}

/// A child has the values that its parent had, copied on write. The kernel takes those of each by themselves.
impl ForkAware for Store {
    fn before_fork(&mut self) {}

    fn enter_child(&mut self) {}

    fn lives_on_in_child(&self) -> bool {
        true
    }
}

/// A value in a store; freed when dropped.
#[derive(Debug)]
pub struct Entry {
    store: Arc<Mutex<Store>>,
    place: Place,
}

impl Entry {
    /// Copy a value in. The store holds at most a lot of pages, and a slab, that the kernel may not take.
    pub fn new(store: &Arc<Mutex<Store>>, data: &[u8]) -> Result<Self> {
        let place = locked(store).write(data)?;
        Ok(Self { store: Arc::clone(store), place })
    }

    #[must_use]
    pub const fn len(&self) -> usize {
        self.place.len
    }

    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.place.len == 0
    }

    /// Copy the value out, to as many bytes as it has; false, with nothing to be known of them, if some of it is gone.
    pub fn read(&self, to: &mut [MaybeUninit<u8>]) -> Result<bool> {
        locked(&self.store).read(self.place, to)
    }

    /// Whether the last sweep, or a read since, saw that some of it is gone.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        let mut store = locked(&self.store);
        let pages = self.place.pages();
        (pages.start..pages.end()).any(|page| *store.owner(page).state(page) & LOST != 0)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        locked(&self.store).erase(self.place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(entry: &Entry) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(entry.len());
        let there = entry.read(&mut bytes.spare_capacity_mut()[..entry.len()]).expect("madvise");
        // SAFETY: read filled as many bytes as the entry has, or says that it did not.
        #[allow(unsafe_code)]
        unsafe {
            bytes.set_len(if there { entry.len() } else { 0 });
        }
        there.then_some(bytes)
    }

    fn value(seed: usize, len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7 + seed) as u8).collect()
    }

    const LENGTHS: [usize; 10] =
        [0, 1, 100, ROOM, ROOM + 1, 5000, LONGEST_IN_SLAB, LONGEST_IN_SLAB + 1, 300_000, 70 << 20];

    #[test]
    fn values_come_back_and_leave_nothing() {
        let store = Store::new().expect("memory");
        for round in 0..3 {
            let entries: Vec<Entry> =
                LENGTHS.iter().map(|&len| Entry::new(&store, &value(round, len)).expect("memory")).collect();
            locked(&store).check_invariants().expect("invariants");
            for (entry, &len) in entries.iter().zip(&LENGTHS) {
                assert_eq!(content(entry), Some(value(round, len)), "{len} bytes");
            }
            locked(&store).check_invariants().expect("invariants");
            assert_eq!(locked(&store).value_bytes(), LENGTHS.iter().sum::<usize>() as u64);
            drop(entries);
            let mut store = locked(&store);
            assert_eq!((store.value_bytes(), store.page_bytes()), (0, 0));
            store.check_invariants().expect("invariants");
        }
        locked(&store).close_slab().expect("madvise");
        assert!(locked(&store).arenas.is_empty(), "an arena without values is unmapped");
    }

    #[test]
    fn a_page_that_goes_takes_its_values_and_no_others() {
        let store = Store::new().expect("memory");
        let entries: Vec<Entry> =
            (0..200).map(|seed| Entry::new(&store, &value(seed, 1000)).expect("memory")).collect();
        {
            let mut store = locked(&store);
            store.close_slab().expect("madvise");
            let gone = entries[50].place.page;
            let arena = store.owner(gone);
            // What the kernel does when memory is short, done by hand.
            arena.area.drop_private(arena.offset(gone), PAGE_BYTES).expect("MADV_DONTNEED");
            store.sweep().expect("mincore");
        }
        let gone = entries[50].place.page;
        for (seed, entry) in entries.iter().enumerate() {
            let pages = entry.place.pages();
            let lost = pages.start <= gone && gone < pages.end();
            assert_eq!(entry.is_lost(), lost);
            assert_eq!(content(entry), (!lost).then(|| value(seed, 1000)));
        }
        locked(&store).check_invariants().expect("invariants");
    }

    #[test]
    fn freed_pages_are_used_again() {
        let store = Store::new().expect("memory");
        let keep = Entry::new(&store, &value(1, 50_000)).expect("memory");
        for seed in 0..1000 {
            let one = Entry::new(&store, &value(seed, 400_000)).expect("memory");
            assert_eq!(content(&one), Some(value(seed, 400_000)));
        }
        assert_eq!(locked(&store).arenas.len(), 1);
        assert!(locked(&store).resident_bytes().expect("mincore") < 200_000);
        assert_eq!(content(&keep), Some(value(1, 50_000)));
    }
}
