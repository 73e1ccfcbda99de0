//! Reading an object by parts, so that what is not asked for is not filled.

use std::io::{Error, Read, Result, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};

use crate::region::{Region, RegionError};
use crate::sys::memfd;

enum From<'a> {
    Region(&'a Region),
    File(&'a OwnedFd),
}

pub struct Reader<'a> {
    from: From<'a>,
    size: u64,
    at: u64,
    /// Why the last read failed; whoever reads through a cache is not told.
    pub failure: Option<RegionError>,
}

impl<'a> Reader<'a> {
    pub fn of_region(region: &'a Region) -> Self {
        Self { from: From::Region(region), size: region.size(), at: 0, failure: None }
    }

    pub fn of_file(file: &'a OwnedFd, size: u64) -> crate::Result<Self> {
        if memfd::status(file.as_fd())?.size < size {
            return Err(crate::Error::Invalid("the file is shorter than it should be".to_owned()));
        }
        Ok(Self { from: From::File(file), size, at: 0, failure: None })
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        let len = (self.size - self.at.min(self.size)).min(into.len() as u64) as usize;
        let into = &mut into[..len];
        let outcome = match self.from {
            From::Region(region) => region.read(self.at, into),
            From::File(file) => memfd::read_exact(file.as_fd(), into, self.at).map(drop).map_err(RegionError::Core),
        };
        if let Err(failure) = outcome {
            self.failure = Some(failure);
            return Err(Error::other("the source failed"));
        }
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Reader<'_> {
    fn seek(&mut self, to: SeekFrom) -> Result<u64> {
        let to = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.size.checked_add_signed(by),
        };
        self.at = to.ok_or_else(|| Error::from(std::io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}
