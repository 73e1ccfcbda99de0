//! Zstandard files. Frames of at most 4 MiB are decoded whole, on their own; a longer one only forwards.

use std::sync::{Arc, Mutex, PoisonError};

use twox_hash::XxHash64;
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer};

use super::checkpoint::{Cache, Reader, Writer};
use super::frames::{Frame, find};
use super::kept::Kept;
use super::stream::{Codec, Progress, Stream, Trouble};
use super::{Failure, Filled, ReadAt, Slice, Source};

const KIND: u32 = 3;
/// The longest frame that is decoded whole, and the most input that one may have.
const WHOLE: u64 = 4 << 20;
/// Frames want windows of at most 128 MiB, so that memory is bounded.
const WINDOW_LOG: u32 = 27;
/// Long frames whose state is kept.
const STREAMS: usize = 2;
const BLOCK: u64 = 128 * 1024;

/// A file of frames.
pub struct Zstd {
    raw: Arc<dyn ReadAt>,
    cache: Option<Cache>,
    frames: Vec<Frame>,
    /// Where the output of each frame starts, and where the last one's ends; as many as are known.
    starts: Mutex<Vec<u64>>,
    scan: Mutex<Option<Scan>>,
    kept: Kept,
    contexts: Mutex<Vec<DCtx<'static>>>,
    streams: Mutex<Vec<(usize, Arc<Stream<Long>>)>>,
}

/// The first pass over a frame whose length is not known.
struct Scan {
    frame: usize,
    cursor: Cursor,
    made: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn context() -> Result<DCtx<'static>, Failure> {
    let failure = || Failure::os("no memory for a decompressor", 0, libc::ENOMEM);
    let mut context = DCtx::try_create().ok_or_else(failure)?;
    context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG)).map_err(|_| failure())?;
    Ok(context)
}

impl Zstd {
    /// Find the frames. `pass` has to be called until it returns true; then the length is known.
    ///
    /// # Errors
    /// The raw bytes could not be read, or are no zstandard file.
    pub fn new(raw: Arc<dyn ReadAt>, cache: Option<Cache>) -> Result<Self, Failure> {
        let mut frames = find(&*raw)?;
        if frames.iter().any(|frame| frame.output.is_none()) {
            recall(cache.as_ref(), &*raw, &mut frames);
        }
        let this = Self {
            raw,
            cache,
            frames,
            starts: Mutex::new(vec![0]),
            scan: Mutex::new(None),
            kept: Kept::new(),
            contexts: Mutex::new(Vec::new()),
            streams: Mutex::new(Vec::new()),
        };
        this.sum()?;
        Ok(this)
    }

    /// Add up the frames whose length is known, up to the first of which it is not.
    fn sum(&self) -> Result<(), Failure> {
        let mut starts = lock(&self.starts);
        while let Some(frame) = self.frames.get(starts.len() - 1) {
            let Some(output) = frame.output else { break };
            let end = starts.last().and_then(|start| start.checked_add(output)).filter(|end| *end < 1 << 62);
            let end = end.ok_or_else(|| Failure::new("the declared lengths cannot be true", frame.input))?;
            starts.push(end);
        }
        Ok(())
    }

    fn raw_of(&self, frame: &Frame) -> Result<Arc<dyn ReadAt>, Failure> {
        let slice = Slice::new(Arc::clone(&self.raw), frame.input, frame.input_length)
            .map_err(|_| Failure::new("a frame outside the file", frame.input))?;
        Ok(Arc::new(slice))
    }

    /// Whether the lengths of all frames are known.
    #[must_use]
    pub fn is_passed(&self) -> bool {
        lock(&self.starts).len() > self.frames.len()
    }

    /// Go on with the first pass by about a mebibyte of output; true when the length is known.
    ///
    /// # Errors
    /// The raw bytes could not be read, or a frame is damaged.
    pub fn pass(&self) -> Result<bool, Failure> {
        let mut scan = lock(&self.scan);
        let number = lock(&self.starts).len() - 1;
        let Some(frame) = self.frames.get(number) else { return Ok(true) };
        if let Some(output) = frame.output {
            // Known by its header, and behind one that was not.
            let mut starts = lock(&self.starts);
            let start = starts.last().copied().unwrap_or(0);
            let end = start.checked_add(output).filter(|end| *end < 1 << 62);
            starts.push(end.ok_or_else(|| Failure::new("the declared lengths cannot be true", frame.input))?);
            return Ok(false);
        }
        let codec = Long { raw: self.raw_of(frame)? };
        let state = match scan.take() {
            Some(state) if state.frame == number => state,
            _ => Scan { frame: number, cursor: codec.start(), made: 0 },
        };
        let Scan { mut cursor, mut made, .. } = state;
        let mut buffer = Vec::new();
        let progress = codec.produce(&mut cursor, &mut buffer, 1 << 20, false);
        made += buffer.len() as u64;
        match progress {
            Ok(Progress::End) => {
                let mut starts = lock(&self.starts);
                let start = starts.last().copied().unwrap_or(0);
                starts.push(start + made);
                if starts.len() > self.frames.len() {
                    self.remember(&starts);
                    return Ok(true);
                }
            }
            Ok(_) => *scan = Some(Scan { frame: number, cursor, made }),
            Err(Trouble::Read(failure)) => {
                *scan = Some(Scan { frame: number, cursor, made });
                return Err(failure);
            }
            Err(Trouble::Bad(failure)) => return Err(failure),
        }
        Ok(false)
    }

    fn remember(&self, starts: &[u64]) {
        let (Some(cache), Some(key)) = (&self.cache, self.raw.identity()) else { return };
        let mut out = Writer::new(KIND, &key);
        out.u64(self.frames.len() as u64);
        for (frame, ends) in self.frames.iter().zip(starts.windows(2)) {
            out.u64(frame.input);
            out.u64(frame.input_length);
            out.u64(ends[1] - ends[0]);
        }
        cache.store(out);
    }

    fn frame_at(&self, offset: u64) -> Option<(usize, u64, u64)> {
        let starts = lock(&self.starts);
        let number = starts.partition_point(|start| *start <= offset).checked_sub(1)?;
        Some((number, starts[number], *starts.get(number + 1)?))
    }

    const fn is_whole(frame: &Frame, length: u64) -> bool {
        length <= WHOLE && frame.input_length <= WHOLE + WHOLE / 4
    }

    /// Decode a whole frame into a buffer of exactly its length.
    fn decode(&self, frame: &Frame, into: &mut [u8]) -> Filled {
        let mut packed = vec![0; frame.input_length as usize];
        self.raw.read_at(frame.input, &mut packed)?;
        let pooled = lock(&self.contexts).pop();
        let mut context = match pooled {
            Some(context) => context,
            None => context()?,
        };
        let made = context.decompress(into, &packed).map_err(|code| bad(code, frame.input))?;
        lock(&self.contexts).push(context);
        if made != into.len() {
            return Err(Failure::new("a frame is shorter than declared", frame.input));
        }
        if frame.check.is_some_and(|check| XxHash64::oneshot(0, into) as u32 != check) {
            return Err(Failure::new("a frame does not have the seek table's checksum", frame.input));
        }
        Ok(())
    }

    fn long(&self, number: usize, length: u64) -> Result<Arc<Stream<Long>>, Failure> {
        let mut streams = lock(&self.streams);
        let found = streams.iter().position(|(other, _)| *other == number);
        let stream = match found {
            Some(at) => streams.remove(at).1,
            None => Arc::new(Stream::new(Long { raw: self.raw_of(&self.frames[number])? }, Some(length))),
        };
        streams.push((number, Arc::clone(&stream)));
        if streams.len() > STREAMS {
            streams.remove(0);
        }
        Ok(stream)
    }
}

fn bad(code: usize, offset: u64) -> Failure {
    Failure::detailed("a frame cannot be decoded", offset, zstd_safe::get_error_name(code))
}

/// Lengths of frames that an earlier pass found.
fn recall(cache: Option<&Cache>, raw: &dyn ReadAt, frames: &mut [Frame]) -> Option<()> {
    let bytes = cache?.load(KIND, &raw.identity()?)?;
    let mut from = Reader::new(&bytes);
    if from.u64()? != frames.len() as u64 {
        return None;
    }
    let mut lengths = Vec::with_capacity(frames.len());
    for frame in &*frames {
        let (input, input_length, output) = (from.u64()?, from.u64()?, from.u64()?);
        if (input, input_length) != (frame.input, frame.input_length) || frame.output.is_some_and(|own| own != output) {
            return None;
        }
        lengths.push(output);
    }
    if !from.is_empty() {
        return None;
    }
    for (frame, length) in frames.iter_mut().zip(lengths) {
        frame.output = Some(length);
    }
    Some(())
}

impl Source for Zstd {
    fn size(&self) -> u64 {
        lock(&self.starts).last().copied().unwrap_or(0)
    }

    fn fill(&self, offset: u64, into: &mut [u8]) -> Filled {
        let mut done = 0;
        while done < into.len() {
            let here = offset + done as u64;
            let (number, start, end) =
                self.frame_at(here).ok_or_else(|| Failure::new("behind the last frame that is known", here))?;
            let frame = &self.frames[number];
            let skip = (here - start) as usize;
            let length = ((end - here).min((into.len() - done) as u64)) as usize;
            let part = &mut into[done..done + length];
            if !Self::is_whole(frame, end - start) {
                self.long(number, end - start)?.fill(here - start, part)?;
            } else if part.len() as u64 == end - start {
                self.decode(frame, part)?;
            } else {
                let block = self.kept.get(number as u64, |buffer| {
                    buffer.resize((end - start) as usize, 0);
                    self.decode(frame, buffer)
                })?;
                part.copy_from_slice(&block[skip..skip + length]);
            }
            done += length;
        }
        Ok(())
    }

    fn unit(&self, offset: u64) -> std::ops::Range<u64> {
        match self.frame_at(offset) {
            Some((number, start, end)) if Self::is_whole(&self.frames[number], end - start) => start..end,
            _ => offset..offset,
        }
    }

    fn enter_child(&self) {
        self.raw.enter_child();
    }
}

/// One frame, decoded forwards.
struct Long {
    raw: Arc<dyn ReadAt>,
}

struct Cursor {
    context: Result<DCtx<'static>, Failure>,
    input: Vec<u8>,
    at: usize,
    next: u64,
    ended: bool,
}

impl Codec for Long {
    type Cursor = Cursor;
    /// There is no entering a frame but at its start.
    type Point = ();

    fn start(&self) -> Cursor {
        Cursor { context: context(), input: Vec::new(), at: 0, next: 0, ended: false }
    }

    fn resume(&self, _: &()) -> Result<Cursor, Failure> {
        Ok(self.start())
    }

    fn produce(&self, cursor: &mut Cursor, into: &mut Vec<u8>, until: usize, _: bool) -> Result<Progress, Trouble> {
        let Cursor { context, input, at, next, ended } = cursor;
        let context = context.as_mut().map_err(|failure| Trouble::Read(failure.clone()))?;
        // A first pass asks for one byte more than there should be, so the end is seen even when there is room for none.
        while !*ended {
            if *at == input.len() {
                let length = (self.raw.size() - *next).min(BLOCK) as usize;
                input.clear();
                *at = 0;
                let mut block = std::mem::take(input);
                block.resize(length, 0);
                self.raw.read_at(*next, &mut block).map_err(Trouble::Read)?;
                *next += length as u64;
                *input = block;
            }
            let before = into.len();
            // Room is zeroed before it is written, so little of it is made at a time.
            into.resize(until.min(before + BLOCK as usize), 0);
            let mut from = InBuffer::around(&input[*at..]);
            let mut room = OutBuffer::around(&mut into[before..]);
            let hint = context.decompress_stream(&mut room, &mut from);
            let (taken, made) = (from.pos(), room.pos());
            into.truncate(before + made);
            *at += taken;
            let hint = hint.map_err(|code| Trouble::Bad(bad(code, *next)))?;
            *ended = hint == 0;
            if *ended {
                break;
            }
            if into.len() == until && (made > 0 || taken == 0) {
                return Ok(Progress::Full);
            }
            if taken == 0 && made == 0 && *next == self.raw.size() {
                return Err(Trouble::Bad(Failure::new("the compressed file ends within a frame", *next)));
            }
        }
        Ok(Progress::End)
    }

    fn point(&self, _: &Cursor) -> Option<()> {
        None
    }

    fn live(&self) -> usize {
        1
    }
}
