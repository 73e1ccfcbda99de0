//! Decoded blocks that were asked for lately, each made by one thread at a time.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::Failure;

/// A few decoded blocks. Whoever asks for a block that another thread makes waits for it rather than make it again.
pub struct Kept {
    state: Mutex<State>,
    changed: Condvar,
    limit_bytes: usize,
}

struct State {
    /// Least lately used first.
    blocks: Vec<(u64, Arc<Vec<u8>>)>,
    making: Vec<u64>,
    spare: Vec<Vec<u8>>,
}

/// Takes the mark of a block in the making away, also when its making panicked.
struct Making<'a>(&'a Kept, u64);

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.0.lock().making.retain(|key| *key != self.1);
        self.0.changed.notify_all();
    }
}

impl Kept {
    pub fn new(limit_bytes: usize) -> Self {
        let state = State { blocks: Vec::new(), making: Vec::new(), spare: Vec::new() };
        Self { state: Mutex::new(state), changed: Condvar::new(), limit_bytes }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The block of this key, made by `make` into an empty buffer if it is not there.
    pub fn get(
        &self,
        key: u64,
        make: impl FnOnce(&mut Vec<u8>) -> Result<(), Failure>,
    ) -> Result<Arc<Vec<u8>>, Failure> {
        let mut state = self.lock();
        loop {
            if let Some(at) = state.blocks.iter().position(|(other, _)| *other == key) {
                let found = state.blocks.remove(at);
                let block = Arc::clone(&found.1);
                state.blocks.push(found);
                return Ok(block);
            }
            if !state.making.contains(&key) {
                break;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.making.push(key);
        let mut buffer = state.spare.pop().unwrap_or_default();
        drop(state);
        let mark = Making(self, key);
        buffer.clear();
        make(&mut buffer)?;
        let block = self.put(key, buffer);
        drop(mark);
        Ok(block)
    }

    /// Keep a block that was made elsewhere.
    pub fn put(&self, key: u64, block: Vec<u8>) -> Arc<Vec<u8>> {
        let block = Arc::new(block);
        let mut state = self.lock();
        state.blocks.push((key, Arc::clone(&block)));
        let mut total: usize = state.blocks.iter().map(|(_, block)| block.capacity()).sum();
        while total > self.limit_bytes && state.blocks.len() > 1 {
            let (_, oldest) = state.blocks.remove(0);
            total -= oldest.capacity();
            // Fresh memory costs a fault for each page, so one buffer is used again.
            if let (true, Ok(buffer)) = (state.spare.is_empty(), Arc::try_unwrap(oldest)) {
                state.spare.push(buffer);
            }
        }
        block
    }

    /// A buffer to decode into, empty.
    pub fn buffer(&self) -> Vec<u8> {
        let mut buffer = self.lock().spare.pop().unwrap_or_default();
        buffer.clear();
        buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_made_once_and_the_oldest_goes() {
        let kept = Kept::new(100);
        for key in 0..5 {
            kept.get(key, |into| {
                into.resize(40, key as u8);
                Ok(())
            })
            .unwrap();
        }
        assert_eq!(kept.get(4, |_| unreachable!()).unwrap()[0], 4);
        let mut made = false;
        kept.get(0, |into| {
            made = true;
            into.push(0);
            Ok(())
        })
        .unwrap();
        assert!(made);
    }

    #[test]
    fn a_failed_making_can_be_tried_again() {
        let kept = Kept::new(100);
        assert!(kept.get(1, |_| Err(Failure::new("no", 0))).is_err());
        assert!(kept.get(1, |_| Ok(())).is_ok());
    }
}
