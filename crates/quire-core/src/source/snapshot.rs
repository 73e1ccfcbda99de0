//! The bytes of a snapshot, read from its layers without mapping them.

use std::os::fd::AsFd;
use std::sync::Arc;

use super::{Failure, Filled, ReadAt};
use crate::layer::Backing;
use crate::pages::PAGE;
use crate::snapshot::Snapshot;
use crate::sys::file::{Stamp, read_at, stamp};
use crate::table::walk::{Extent, Source};
use crate::{Error, Result};

/// Where each page lies is resolved once, so that a read is a search and a few `pread`s.
pub struct SnapshotBytes {
    snapshot: Arc<Snapshot>,
    extents: Vec<Extent>,
    /// For layers in files, which nobody keeps from changing, their state when the source was made.
    stamps: Vec<Option<Stamp>>,
}

impl SnapshotBytes {
    /// # Errors
    /// The page table cannot be read, or the kernel refused.
    pub fn new(snapshot: Arc<Snapshot>) -> Result<Self> {
        let extents = snapshot.extents()?;
        let stamps = snapshot
            .layers()
            .iter()
            .map(|layer| match layer.backing() {
                Backing::Sealed => Ok(None),
                Backing::File => stamp(layer.fd()).map(Some).map_err(|errno| Error::os("fstat", errno)),
            })
            .collect::<Result<_>>()?;
        Ok(Self { snapshot, extents, stamps })
    }
}

impl ReadAt for SnapshotBytes {
    fn size(&self) -> u64 {
        self.snapshot.size_bytes()
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> Filled {
        let mut done = 0;
        let mut at = self.extents.partition_point(|extent| extent.pages.end() * PAGE <= offset);
        while done < into.len() {
            let here = offset + done as u64;
            let Some(extent) = self.extents.get(at) else {
                return Err(Failure::new("the page table ends early", here));
            };
            let skip = here - extent.pages.start * PAGE;
            let length = (extent.pages.len * PAGE - skip).min((into.len() - done) as u64) as usize;
            let part = &mut into[done..done + length];
            match extent.source {
                Source::Zero => part.fill(0),
                Source::Layer { layer, index } => {
                    let fd = self.snapshot.layers()[layer as usize].fd();
                    let n = read_at(fd.as_fd(), index * PAGE + skip, part)
                        .map_err(|errno| Failure::os("pread failed", here, errno))?;
                    if let Some(opened) = &self.stamps[layer as usize] {
                        if stamp(fd).map_err(|errno| Failure::os("fstat failed", here, errno))? != *opened {
                            return Err(Failure::new("the snapshot's file changed after it was opened", here));
                        }
                    }
                    if n < length {
                        return Err(Failure::new("short read", here + n as u64));
                    }
                }
            }
            done += length;
            at += 1;
        }
        Ok(())
    }

    fn is_signal_safe(&self) -> bool {
        true
    }
}
