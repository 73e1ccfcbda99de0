//! Random access to what a decoder can only produce forwards.
//!
//! The first pass cuts the output into chunks of about a mebibyte and keeps the CRC-32 of each, and at most of them a
//! point where the decoder can be entered. It goes as far as it is asked to. What it has passed is decoded again chunk by
//! chunk, and a chunk is given out only if its CRC is that of the first time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::kept::Kept;
use super::{Failure, Filled};

/// A chunk ends at the first point behind so many bytes, or without one at `CHUNK_MAX`.
pub const CHUNK: usize = 1 << 20;
pub const CHUNK_MAX: usize = 2 << 20;
/// Points in one stream, at most; when there are more, every other one goes.
const POINTS: usize = 2048;
/// Output is asked for in pieces of at least this, whatever is wanted.
const PIECE: usize = 64 * 1024;

/// Why a decoder stopped.
#[derive(Debug)]
pub enum Trouble {
    /// The raw bytes could not be had; the decoder stands where it stood and can try again.
    Read(Failure),
    /// The data is wrong, and will be.
    Bad(Failure),
}

/// What came of asking a decoder for output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The room is full.
    Full,
    /// Stands where it could be entered, if that was asked for.
    Point,
    /// Everything was produced, and what there is to verify at the end is right.
    End,
}

/// A decoder that goes forward.
pub trait Codec: Send + Sync {
    type Cursor: Send;
    type Point: Send + Sync;

    fn start(&self) -> Self::Cursor;
    fn resume(&self, point: &Self::Point) -> Result<Self::Cursor, Failure>;
    /// Append output to `into`, not beyond a length of `until`; also what was appended before trouble counts.
    fn produce(
        &self,
        cursor: &mut Self::Cursor,
        into: &mut Vec<u8>,
        until: usize,
        stop: bool,
    ) -> Result<Progress, Trouble>;
    /// Where the cursor stands, after it stopped at a point.
    fn point(&self, cursor: &Self::Cursor) -> Option<Self::Point>;
    /// Cursors to keep for readers that go forward.
    fn live(&self) -> usize;
    /// The chunks of a completed pass again, with their points, if they are kept somewhere.
    fn chunks_again(&self) -> Option<Vec<Chunk<Self::Point>>> {
        None
    }
}

/// A part of the output.
pub struct Chunk<P> {
    pub start: u64,
    pub crc: u32,
    /// How to enter the decoder at its start; the first chunk needs none.
    pub point: Option<Arc<P>>,
}

/// What is known of the chunks that the first pass has completed.
pub struct Index<P> {
    pub chunks: Vec<Chunk<P>>,
    /// Where the last of them ends.
    pub end: u64,
    pub complete: bool,
    /// `chunks_again` can give the points again.
    pub kept: bool,
    /// They were given up.
    resting: bool,
    /// One chunk in so many may have a point.
    stride: usize,
    points: usize,
    failed: Option<Failure>,
}

impl<P> Index<P> {
    fn new() -> Self {
        let (chunks, complete, kept, resting) = (Vec::new(), false, false, false);
        Self { chunks, end: 0, complete, kept, resting, stride: 1, points: 0, failed: None }
    }

    /// Of a pass that was completed before, and is kept.
    pub fn complete(chunks: Vec<Chunk<P>>, end: u64) -> Self {
        Self { chunks, end, complete: true, kept: true, ..Self::new() }
    }

    /// Give up the points, if they can be had again.
    fn rest(&mut self) {
        if self.complete && self.kept {
            self.chunks.iter_mut().for_each(|chunk| chunk.point = None);
            self.resting = true;
        }
    }

    /// Take the points of the same chunks. Of others, or none, decoding starts at the beginning.
    fn wake(&mut self, again: Option<Vec<Chunk<P>>>) {
        self.resting = false;
        for (chunk, again) in self.chunks.iter_mut().zip(again.into_iter().flatten()) {
            if (chunk.start, chunk.crc) == (again.start, again.crc) {
                chunk.point = again.point;
            }
        }
    }

    fn chunk_of(&self, offset: u64) -> usize {
        self.chunks.partition_point(|chunk| chunk.start <= offset) - 1
    }

    fn end_of(&self, chunk: usize) -> u64 {
        self.chunks.get(chunk + 1).map_or(self.end, |next| next.start)
    }

    fn push(&mut self, mut chunk: Chunk<P>, length: u64) {
        if self.chunks.len() % self.stride != 0 {
            chunk.point = None;
        }
        self.points += usize::from(chunk.point.is_some());
        self.end = chunk.start + length;
        self.chunks.push(chunk);
        if self.points > POINTS {
            self.stride *= 2;
            for (at, chunk) in self.chunks.iter_mut().enumerate() {
                if at % self.stride != 0 {
                    chunk.point = None;
                }
            }
            self.points = self.chunks.iter().filter(|chunk| chunk.point.is_some()).count();
        }
    }
}

/// The first pass: where it stands, and what it has decoded of the chunk it stands in.
struct Front<C: Codec> {
    cursor: Option<C::Cursor>,
    start: u64,
    point: Option<Arc<C::Point>>,
    buffer: Vec<u8>,
}

/// Random access to the output of a codec.
pub struct Stream<C: Codec> {
    codec: C,
    /// The length that the output must have, if that is known.
    declared: Option<u64>,
    // Locked in this order: front, then index; `kept` and `live` for themselves.
    front: Mutex<Front<C>>,
    index: Mutex<Index<C::Point>>,
    kept: Kept,
    live: Mutex<Vec<(usize, C::Cursor)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<C: Codec> Stream<C> {
    pub fn new(codec: C, declared: Option<u64>) -> Self {
        Self::with_index(codec, declared, Index::new())
    }

    pub fn with_index(codec: C, declared: Option<u64>, index: Index<C::Point>) -> Self {
        let front = Front { cursor: None, start: index.end, point: None, buffer: Vec::new() };
        Self {
            codec,
            declared,
            front: Mutex::new(front),
            index: Mutex::new(index),
            kept: Kept::new(),
            live: Mutex::new(Vec::new()),
        }
    }

    pub fn index(&self) -> MutexGuard<'_, Index<C::Point>> {
        lock(&self.index)
    }

    /// The chunk around a byte that the first pass has completed.
    pub fn unit(&self, offset: u64) -> Option<std::ops::Range<u64>> {
        let index = self.index();
        (offset < index.end).then(|| {
            let at = index.chunk_of(offset);
            index.chunks[at].start..index.end_of(at)
        })
    }

    /// Whether all of the first pass is behind us; takes it further by at most a chunk.
    pub fn pass(&self) -> Result<bool, Failure> {
        let mut front = lock(&self.front);
        {
            let index = self.index();
            if let Some(failure) = &index.failed {
                return Err(failure.clone());
            }
            if index.complete {
                return Ok(true);
            }
        }
        self.advance(&mut front, CHUNK_MAX)?;
        Ok(self.index().complete)
    }

    /// Fill `into` from `offset` on. True if this completed the first pass.
    pub fn fill(&self, offset: u64, into: &mut [u8]) -> Result<bool, Failure> {
        let (mut done, mut completed) = (0, false);
        while done < into.len() {
            let here = offset + done as u64;
            if let Some(chunk) = self.passed(here)? {
                let block = self.chunk(chunk.number, chunk.end - chunk.start)?;
                done += copy(&block, here - chunk.start, &mut into[done..], here)?;
                continue;
            }
            let mut front = lock(&self.front);
            if self.passed(here)?.is_some() {
                continue;
            }
            if self.index().complete {
                return Err(Failure::new("the data ends early", here));
            }
            let wanted = (here - front.start) + (into.len() - done) as u64;
            let (start, before) = (front.start, front.buffer.len());
            if here - start >= before as u64 || wanted > before as u64 {
                completed |= self.advance(&mut front, usize::try_from(wanted).unwrap_or(CHUNK_MAX))?;
            }
            // If the chunk was completed it is among the passed now, and what was decoded is kept.
            if front.start == start && here - start < front.buffer.len() as u64 {
                done += copy(&front.buffer, here - start, &mut into[done..], here)?;
            }
        }
        Ok(completed)
    }

    /// Give up what was kept for readers that go forward or come back: they start from a checkpoint again.
    pub fn rest(&self) {
        lock(&self.live).clear();
        self.kept.clear();
        self.index().rest();
    }

    fn passed(&self, offset: u64) -> Result<Option<Place>, Failure> {
        let index = self.index();
        if let Some(failure) = &index.failed {
            return Err(failure.clone());
        }
        Ok((offset < index.end).then(|| {
            let number = index.chunk_of(offset);
            Place { number, start: index.chunks[number].start, end: index.end_of(number) }
        }))
    }

    /// Decode until the front's buffer holds `wanted` bytes or its chunk is complete. True if that was the last.
    fn advance(&self, front: &mut Front<C>, wanted: usize) -> Result<bool, Failure> {
        match self.decode(front, wanted) {
            Ok(last) => Ok(last),
            Err(Trouble::Read(failure)) => Err(failure),
            Err(Trouble::Bad(failure)) => {
                // No part of a stream that fails its verification can be believed.
                self.index().failed = Some(failure.clone());
                Err(failure)
            }
        }
    }

    fn decode(&self, front: &mut Front<C>, wanted: usize) -> Result<bool, Trouble> {
        if front.buffer.capacity() == 0 {
            front.buffer = self.kept.buffer();
        }
        let Front { cursor, start, point, buffer } = front;
        let cursor = cursor.get_or_insert_with(|| self.codec.start());
        let wanted = wanted.max((buffer.len() + PIECE).min(CHUNK_MAX));
        let limit = |until: usize| match self.declared {
            // One byte more than there should be shows whether there is more.
            Some(size) => until.min(usize::try_from(size - *start).unwrap_or(usize::MAX).saturating_add(1)),
            None => until,
        };
        let mut progress = Progress::Full;
        while buffer.len() < wanted && progress == Progress::Full && buffer.len() < CHUNK_MAX {
            let (until, stop) = if buffer.len() < CHUNK { (wanted.min(CHUNK), false) } else { (CHUNK_MAX, true) };
            let until = limit(until);
            progress = self.codec.produce(cursor, buffer, until, stop)?;
            if let Some(size) = self.declared {
                // All is there; what remains is the end, where everything is verified.
                if *start + buffer.len() as u64 == size && progress != Progress::End {
                    progress = self.codec.produce(cursor, buffer, buffer.len() + 1, false)?;
                }
                let out = *start + buffer.len() as u64;
                if out > size {
                    return Err(Trouble::Bad(Failure::new("there is more data than declared", size)));
                }
                if progress == Progress::End && out < size {
                    return Err(Trouble::Bad(Failure::new("there is less data than declared", out)));
                }
            }
        }
        let last = progress == Progress::End;
        if last || progress == Progress::Point || buffer.len() >= CHUNK_MAX {
            let next = if progress == Progress::Point && self.wants_point() { self.codec.point(cursor) } else { None };
            let (length, crc) = (buffer.len() as u64, crc32fast::hash(buffer));
            let block = std::mem::take(buffer);
            let chunk = Chunk { start: *start, crc, point: point.take() };
            let mut index = self.index();
            if length > 0 {
                self.kept.put(index.chunks.len() as u64, block);
                index.push(chunk, length);
            }
            index.complete = last;
            drop(index);
            front.start += length;
            front.point = next.map(Arc::new);
            if last {
                front.cursor = None;
            }
        }
        Ok(last)
    }

    /// Whether a point at the end of the chunk in the making would be kept.
    fn wants_point(&self) -> bool {
        let index = self.index();
        (index.chunks.len() + 1) % index.stride == 0
    }

    /// A chunk that the first pass has completed, decoded again unless it is kept.
    fn chunk(&self, number: usize, length: u64) -> Result<Arc<Vec<u8>>, Failure> {
        self.kept.get(number as u64, |buffer| {
            let (mut at, mut cursor) = self.cursor_before(number)?;
            loop {
                let (start, end, crc) = {
                    let index = self.index();
                    (index.chunks[at].start, index.end_of(at), index.chunks[at].crc)
                };
                buffer.clear();
                let until = (end - start) as usize;
                match self.codec.produce(&mut cursor, buffer, until, false) {
                    Ok(_) => {}
                    Err(Trouble::Read(failure) | Trouble::Bad(failure)) => return Err(failure),
                }
                if buffer.len() != until || crc32fast::hash(buffer) != crc {
                    return Err(Failure::new("CRC mismatch in data that was decoded before", start));
                }
                at += 1;
                if at > number {
                    break;
                }
            }
            debug_assert_eq!(buffer.len() as u64, length);
            let mut live = lock(&self.live);
            live.push((at, cursor));
            let surplus = live.len().saturating_sub(self.codec.live());
            live.drain(..surplus);
            Ok(())
        })
    }

    /// The nearest way to the start of a chunk: a cursor that stands there or before, or a point.
    fn cursor_before(&self, number: usize) -> Result<(usize, C::Cursor), Failure> {
        let (entry, point) = {
            let mut index = self.index();
            if index.resting {
                index.wake(self.codec.chunks_again());
            }
            let entry = (1..=number).rev().find(|at| index.chunks[*at].point.is_some()).unwrap_or(0);
            (entry, index.chunks[entry].point.clone())
        };
        let mut live = lock(&self.live);
        let nearest = live
            .iter()
            .enumerate()
            .filter(|(_, (at, _))| (entry..=number).contains(at))
            .max_by_key(|(_, (at, _))| *at)
            .map(|(place, _)| place);
        if let Some(place) = nearest {
            return Ok(live.remove(place));
        }
        drop(live);
        Ok((entry, point.map_or_else(|| Ok(self.codec.start()), |point| self.codec.resume(&point))?))
    }
}

struct Place {
    number: usize,
    start: u64,
    end: u64,
}

/// Copy what `block` has from `skip` on; how much that was.
fn copy(block: &[u8], skip: u64, into: &mut [u8], here: u64) -> Result<usize, Failure> {
    let from = usize::try_from(skip).ok().and_then(|skip| block.get(skip..)).unwrap_or_default();
    let length = from.len().min(into.len());
    if length == 0 {
        return Err(Failure::new("the data ends early", here));
    }
    into[..length].copy_from_slice(&from[..length]);
    Ok(length)
}

/// Fill through a stream, which tells when its first pass is complete.
pub fn filled<C: Codec>(stream: &Stream<C>, offset: u64, into: &mut [u8], complete: impl FnOnce()) -> Filled {
    if stream.fill(offset, into)? {
        complete();
    }
    Ok(())
}
