//! Decoded blocks that were asked for lately, each made by one thread at a time. All sources of the process share the room:
//! there may be hundreds of them, most of them idle.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::Failure;

/// Room for blocks, in bytes.
const LIMIT: usize = 8 << 20;

/// The decoded blocks of one source. Whoever asks for a block that another thread makes waits for it rather than make it
/// again.
pub struct Kept {
    pool: &'static Pool,
    owner: u64,
}

struct Pool {
    state: Mutex<State>,
    changed: Condvar,
    limit: usize,
}

/// Whose block, and which.
type Name = (u64, u64);

pub struct State {
    /// Least lately used first.
    blocks: Vec<(Name, Arc<Vec<u8>>)>,
    making: Vec<Name>,
    spare: Vec<Vec<u8>>,
}

static POOL: Pool = Pool::new(LIMIT);
static OWNERS: AtomicU64 = AtomicU64::new(0);

/// Takes the mark of a block in the making away, also when its making panicked.
struct Making(&'static Pool, Name);

impl Drop for Making {
    fn drop(&mut self) {
        self.0.lock().making.retain(|name| *name != self.1);
        self.0.changed.notify_all();
    }
}

impl Pool {
    const fn new(limit: usize) -> Self {
        let state = State { blocks: Vec::new(), making: Vec::new(), spare: Vec::new() };
        Self { state: Mutex::new(state), changed: Condvar::new(), limit }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Give up all blocks but those used last, of so many bytes together: whoever uses them now may not come back soon.
pub fn trim(bytes: usize) {
    POOL.lock().shrink(bytes, false);
}

/// Held while the process forks, so that the child finds the pool whole.
pub fn lock_kept() -> MutexGuard<'static, State> {
    POOL.lock()
}

impl State {
    /// In a forked child: nobody makes anything there yet.
    pub fn enter_child(&mut self) {
        self.making.clear();
    }

    fn shrink(&mut self, limit: usize, reuse: bool) {
        let mut total: usize = self.blocks.iter().map(|(_, block)| block.capacity()).sum();
        let mut surplus = 0;
        while total > limit && surplus + usize::from(reuse) < self.blocks.len() {
            total -= self.blocks[surplus].1.capacity();
            surplus += 1;
        }
        let oldest = self.blocks.drain(..surplus);
        if reuse {
            // Fresh memory costs a fault for each page, so one buffer is used again.
            let spare = oldest.rev().find_map(|(_, block)| Arc::try_unwrap(block).ok());
            if self.spare.is_empty() {
                self.spare.extend(spare);
            }
        } else {
            drop(oldest);
            self.spare.clear();
        }
    }
}

impl Kept {
    pub fn new() -> Self {
        Self::within(&POOL)
    }

    fn within(pool: &'static Pool) -> Self {
        Self { pool, owner: OWNERS.fetch_add(1, Ordering::Relaxed) }
    }

    /// The block of this key, made by `make` into an empty buffer if it is not there.
    pub fn get(
        &self,
        key: u64,
        make: impl FnOnce(&mut Vec<u8>) -> Result<(), Failure>,
    ) -> Result<Arc<Vec<u8>>, Failure> {
        let name = (self.owner, key);
        let mut state = self.pool.lock();
        loop {
            if let Some(at) = state.blocks.iter().position(|(other, _)| *other == name) {
                let found = state.blocks.remove(at);
                let block = Arc::clone(&found.1);
                state.blocks.push(found);
                return Ok(block);
            }
            if !state.making.contains(&name) {
                break;
            }
            state = self.pool.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.making.push(name);
        let mut buffer = state.spare.pop().unwrap_or_default();
        drop(state);
        let mark = Making(self.pool, name);
        buffer.clear();
        make(&mut buffer)?;
        let block = self.put(key, buffer);
        drop(mark);
        Ok(block)
    }

    /// Keep a block that was made elsewhere.
    pub fn put(&self, key: u64, block: Vec<u8>) -> Arc<Vec<u8>> {
        let block = Arc::new(block);
        let mut state = self.pool.lock();
        state.blocks.push(((self.owner, key), Arc::clone(&block)));
        state.shrink(self.pool.limit, true);
        block
    }

    /// Give up all blocks of this source.
    pub fn clear(&self) {
        self.pool.lock().blocks.retain(|((owner, _), _)| *owner != self.owner);
    }

    /// A buffer to decode into, empty.
    pub fn buffer(&self) -> Vec<u8> {
        let mut buffer = self.pool.lock().spare.pop().unwrap_or_default();
        buffer.clear();
        buffer
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> &'static Pool {
        Box::leak(Box::new(Pool::new(100)))
    }

    fn fill(kept: &Kept, key: u64) -> bool {
        let mut made = false;
        let outcome = kept.get(key, |into| {
            made = true;
            into.resize(40, key as u8);
            Ok(())
        });
        assert_eq!(outcome.unwrap()[..], [key as u8; 40]);
        made
    }

    #[test]
    fn a_block_is_made_once_and_the_oldest_goes() {
        let kept = Kept::within(pool());
        assert!((0..5).all(|key| fill(&kept, key)));
        assert!(!fill(&kept, 4));
        assert!(fill(&kept, 0));
    }

    #[test]
    fn sources_share_the_room_but_not_their_blocks() {
        let pool = pool();
        let (one, other) = (Kept::within(pool), Kept::within(pool));
        assert!(fill(&one, 1));
        assert!(fill(&other, 1), "the key is the same, the block is not");
        assert!(!fill(&one, 1));
        assert!(fill(&other, 2));
        assert!(!fill(&one, 1) && fill(&other, 1), "the least lately used went, whosever it was");
        drop(other);
        assert!(pool.lock().blocks.iter().all(|((owner, _), _)| *owner == one.owner));
    }

    #[test]
    fn a_failed_making_can_be_tried_again() {
        let kept = Kept::within(pool());
        assert!(kept.get(1, |_| Err(Failure::new("no", 0))).is_err());
        assert!(kept.get(1, |_| Ok(())).is_ok());
    }
}
