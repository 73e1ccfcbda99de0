//! Raw deflate data of known length and CRC-32 (a member of a zip archive), and gzip files.

use std::sync::Arc;

use super::checkpoint::{Cache, Reader, Writer};
use super::inflate::{Inflater, Step};
use super::stream::{Chunk, Codec, Index, Progress, Stream, Trouble, filled};
use super::{Failure, Filled, Notes, ReadAt, Source};

const KIND_DEFLATE: u32 = 1;
const KIND_GZIP: u32 = 2;
/// Cursors kept for readers that go forward.
const LIVE: usize = 4;
/// How much input is read at once where a read costs little, and where it costs a journey.
const NEAR: usize = 64 * 1024;
const FAR: usize = 1 << 20;
/// Output of one call of the decompressor, at most.
const ROOM: usize = 128 * 1024;

/// How the compressed data is wrapped.
#[derive(Clone, Copy, Debug)]
enum Framing {
    Raw { crc: u32 },
    Gzip,
}

/// Where the decompressor can be entered.
struct Point {
    /// Of the first byte of input that was not taken.
    input: u64,
    bits: u8,
    byte: u8,
    /// The 32 KiB of output before, compressed.
    window: Box<[u8]>,
    window_length: u32,
}

/// Input, read block by block.
struct Input {
    buffer: Vec<u8>,
    at: usize,
    /// Where the buffer ends in the raw bytes.
    next: u64,
}

impl Input {
    const fn new(next: u64) -> Self {
        Self { buffer: Vec::new(), at: 0, next }
    }

    fn position(&self) -> u64 {
        self.next - (self.buffer.len() - self.at) as u64
    }

    fn seek(&mut self, position: u64) {
        *self = Self { buffer: std::mem::take(&mut self.buffer), at: 0, next: position };
        self.buffer.clear();
    }

    /// What is there without reading, or one block more; empty at the end.
    fn rest(&mut self, raw: &dyn ReadAt) -> Result<&[u8], Trouble> {
        if self.at == self.buffer.len() {
            let block = if raw.parallel_reads() > 1 { FAR } else { NEAR };
            let length = (raw.size() - self.next).min(block as u64) as usize;
            let mut buffer = std::mem::take(&mut self.buffer);
            buffer.resize(length, 0);
            let read = raw.read_at(self.next, &mut buffer);
            if read.is_err() {
                buffer.clear();
            }
            self.at = 0;
            self.next += buffer.len() as u64;
            self.buffer = buffer;
            read.map_err(Trouble::Read)?;
        }
        Ok(&self.buffer[self.at..])
    }

    fn byte(&mut self, raw: &dyn ReadAt) -> Result<Option<u8>, Trouble> {
        let byte = self.rest(raw)?.first().copied();
        self.at += usize::from(byte.is_some());
        Ok(byte)
    }
}

enum Stage {
    /// Before a member of a gzip file, or behind the last.
    Header,
    Body,
    Trailer,
    Done,
}

struct Cursor {
    input: Input,
    inflater: Inflater,
    stage: Stage,
    /// CRC and length of the member so far; None for one that was not entered at its start.
    member: Option<(crc32fast::Hasher, u64)>,
    /// A member has been read, so what follows is another or padding.
    behind_first: bool,
}

struct Inflate {
    raw: Arc<dyn ReadAt>,
    framing: Framing,
    cache: Option<Cache>,
}

impl Inflate {
    fn bad<T>(cause: &'static str, cursor: &Cursor) -> Result<T, Trouble> {
        Err(Trouble::Bad(Failure::detailed(cause, cursor.input.position(), "of the compressed data")))
    }

    /// Read the header of a gzip member; false at the end of the file. As Python's gzip: zeros between members and behind
    /// the last are padding, anything else is an error.
    fn header(&self, cursor: &mut Cursor) -> Result<bool, Trouble> {
        let raw = &*self.raw;
        let mut first = cursor.input.byte(raw)?;
        while cursor.behind_first && first == Some(0) {
            first = cursor.input.byte(raw)?;
        }
        let Some(first) = first else { return Ok(false) };
        let need = |cursor: &mut Cursor| match cursor.input.byte(raw)? {
            Some(byte) => Ok(byte),
            None => Self::bad("the file ends within a gzip header", cursor),
        };
        if first != 0x1f || need(cursor)? != 0x8b {
            return Self::bad("what follows is no gzip member", cursor);
        }
        if need(cursor)? != 8 {
            return Self::bad("a gzip member that is not deflated", cursor);
        }
        let flags = need(cursor)?;
        for _ in 0..6 {
            need(cursor)?;
        }
        if flags & 4 != 0 {
            let extra = u16::from_le_bytes([need(cursor)?, need(cursor)?]);
            for _ in 0..extra {
                need(cursor)?;
            }
        }
        // A file name, a comment.
        for flag in [8, 16] {
            if flags & flag != 0 {
                while need(cursor)? != 0 {}
            }
        }
        if flags & 2 != 0 {
            need(cursor)?;
            need(cursor)?;
        }
        Ok(true)
    }

    /// Compare a member with what its trailer, or the archive, says of it.
    fn trailer(&self, cursor: &mut Cursor) -> Result<Stage, Trouble> {
        let (expected, length, next) = match self.framing {
            Framing::Raw { crc } => (crc, None, Stage::Done),
            Framing::Gzip => {
                let mut bytes = [0; 8];
                for byte in &mut bytes {
                    match cursor.input.byte(&*self.raw)? {
                        Some(value) => *byte = value,
                        None => return Self::bad("the file ends within a gzip trailer", cursor),
                    }
                }
                let [a, b, c, d, e, f, g, h] = bytes;
                (u32::from_le_bytes([a, b, c, d]), Some(u32::from_le_bytes([e, f, g, h])), Stage::Header)
            }
        };
        if let Some((hasher, made)) = cursor.member.take() {
            if hasher.finalize() != expected {
                return Self::bad("CRC mismatch at the end", cursor);
            }
            if length.is_some_and(|length| length != made as u32) {
                return Self::bad("the length differs from that in the gzip trailer", cursor);
            }
        }
        cursor.behind_first = true;
        Ok(next)
    }

    /// A step whose reads can fail and be tried again from where it began.
    fn again<T>(
        &self,
        cursor: &mut Cursor,
        step: impl FnOnce(&Self, &mut Cursor) -> Result<T, Trouble>,
    ) -> Result<T, Trouble> {
        let position = cursor.input.position();
        let result = step(self, cursor);
        if matches!(result, Err(Trouble::Read(_))) {
            cursor.input.seek(position);
        }
        result
    }
}

impl Codec for Inflate {
    type Cursor = Cursor;
    type Point = Point;

    fn start(&self) -> Cursor {
        let stage = match self.framing {
            Framing::Raw { .. } => Stage::Body,
            Framing::Gzip => Stage::Header,
        };
        let member = Some((crc32fast::Hasher::new(), 0));
        Cursor { input: Input::new(0), inflater: Inflater::new(), stage, member, behind_first: false }
    }

    fn resume(&self, point: &Point) -> Result<Cursor, Failure> {
        let failure = || Failure::new("a checkpoint cannot be used", point.input);
        let mut window = vec![0; point.window_length as usize];
        let n = zstd_safe::decompress(&mut window[..], &point.window).map_err(|_| failure())?;
        if n != window.len() || point.input > self.raw.size() {
            return Err(failure());
        }
        let inflater = Inflater::resume(&window, point.bits, point.byte).ok_or_else(failure)?;
        let input = Input::new(point.input);
        Ok(Cursor { input, inflater, stage: Stage::Body, member: None, behind_first: true })
    }

    fn produce(&self, cursor: &mut Cursor, into: &mut Vec<u8>, until: usize, stop: bool) -> Result<Progress, Trouble> {
        loop {
            match cursor.stage {
                Stage::Done => return Ok(Progress::End),
                Stage::Header => {
                    if !self.again(cursor, Self::header)? {
                        cursor.stage = Stage::Done;
                        continue;
                    }
                    cursor.inflater = Inflater::new();
                    cursor.member = Some((crc32fast::Hasher::new(), 0));
                    cursor.stage = Stage::Body;
                }
                Stage::Trailer => cursor.stage = self.again(cursor, Self::trailer)?,
                Stage::Body => {
                    let before = into.len();
                    let input = cursor.input.rest(&*self.raw)?;
                    // Room is zeroed before it is written, so little of it is made at a time.
                    into.resize(until.min(before + ROOM), 0);
                    let stepped = cursor.inflater.step(input, &mut into[before..], stop);
                    let Some((taken, made, step)) = stepped else {
                        into.truncate(before);
                        return Self::bad("the compressed data is invalid", cursor);
                    };
                    into.truncate(before + made);
                    let starved = input.is_empty();
                    cursor.input.at += taken;
                    if let Some((hasher, length)) = &mut cursor.member {
                        hasher.update(&into[before..]);
                        *length += made as u64;
                    }
                    match step {
                        Step::End => cursor.stage = Stage::Trailer,
                        Step::Boundary => return Ok(Progress::Point),
                        Step::More if into.len() == until && made > 0 => return Ok(Progress::Full),
                        Step::More if starved && made == 0 => {
                            return Self::bad("the compressed data ends early", cursor);
                        }
                        // No room, and the end of the data was not reached.
                        Step::More if into.len() == until && taken == 0 => return Ok(Progress::Full),
                        Step::More => {}
                    }
                }
            }
        }
    }

    fn point(&self, cursor: &Cursor) -> Option<Point> {
        let bits = cursor.inflater.bits();
        let byte = if bits == 0 { 0 } else { *cursor.input.buffer.get(cursor.input.at.checked_sub(1)?)? };
        let window = cursor.inflater.window();
        let mut packed = Vec::with_capacity(zstd_safe::compress_bound(window.len()));
        zstd_safe::compress(&mut packed, &window, 1).ok()?;
        let window_length = window.len() as u32;
        Some(Point { input: cursor.input.position(), bits, byte, window: packed.into(), window_length })
    }

    fn live(&self) -> usize {
        LIVE
    }

    fn chunks_again(&self) -> Option<Vec<Chunk<Point>>> {
        let kind = match self.framing {
            Framing::Raw { .. } => KIND_DEFLATE,
            Framing::Gzip => KIND_GZIP,
        };
        load(self.cache.as_ref(), kind, &*self.raw, None).map(|index| index.chunks)
    }
}

fn save(stream: &Stream<Inflate>, cache: Option<&Cache>, kind: u32, raw: &dyn ReadAt) {
    let (Some(cache), Some(key)) = (cache, raw.identity()) else { return };
    let index = stream.index();
    let mut out = Writer::new(kind, &key);
    out.u64(index.end);
    out.u64(index.chunks.len() as u64);
    for chunk in &index.chunks {
        out.u64(chunk.start);
        out.u32(chunk.crc);
        match &chunk.point {
            None => out.u32(0),
            Some(point) => {
                out.u32(1);
                out.u64(point.input);
                out.u32(u32::from(point.bits));
                out.u32(u32::from(point.byte));
                out.u32(point.window_length);
                out.bytes(&point.window);
            }
        }
    }
    drop(index);
    let kept = cache.store(out);
    stream.index().kept = kept;
}

fn load(cache: Option<&Cache>, kind: u32, raw: &dyn ReadAt, declared: Option<u64>) -> Option<Index<Point>> {
    let key = raw.identity()?;
    let bytes = cache?.load(kind, &key)?;
    let mut from = Reader::new(&bytes);
    let (end, count) = (from.u64()?, from.u64()?);
    if declared.is_some_and(|size| size != end) {
        return None;
    }
    let mut chunks: Vec<Chunk<Point>> = Vec::new();
    for number in 0..count {
        let (start, crc) = (from.u64()?, from.u32()?);
        let point = match from.u32()? {
            0 => None,
            1 => {
                let input = from.u64()?;
                let (bits, byte) = (u8::try_from(from.u32()?).ok()?, u8::try_from(from.u32()?).ok()?);
                let window_length = from.u32()?;
                let window = from.bytes()?.into();
                if input > raw.size() || bits > 7 || window_length > 32 * 1024 {
                    return None;
                }
                Some(Arc::new(Point { input, bits, byte, window, window_length }))
            }
            _ => return None,
        };
        let last = chunks.last().map(|chunk| chunk.start);
        let follows = match last {
            None => start == 0,
            Some(last) => start > last && start - last <= super::stream::CHUNK_MAX as u64,
        };
        if !follows || (number == 0 && point.is_some()) {
            return None;
        }
        chunks.push(Chunk { start, crc, point });
    }
    let last = chunks.last().map_or(0, |chunk| chunk.start);
    let sane = if chunks.is_empty() { end == 0 } else { end > last && end - last <= super::stream::CHUNK_MAX as u64 };
    (sane && from.is_empty()).then(|| Index::complete(chunks, end))
}

/// Raw deflate data whose decompressed length and CRC-32 are known, as those of a zip member.
pub struct Deflate {
    stream: Stream<Inflate>,
    size: u64,
    raw: Arc<dyn ReadAt>,
    cache: Option<Cache>,
}

impl Deflate {
    #[must_use]
    pub fn new(raw: Arc<dyn ReadAt>, size: u64, crc: u32, cache: Option<Cache>) -> Self {
        let codec = Inflate { raw: Arc::clone(&raw), framing: Framing::Raw { crc }, cache: cache.clone() };
        // What was gathered for other figures of the archive's directory says nothing of these.
        let index = load(cache.as_ref(), KIND_DEFLATE, &*raw, Some(size)).filter(|index| combined(index) == crc);
        let stream = match index {
            Some(index) => Stream::with_index(codec, Some(size), index),
            None => Stream::new(codec, Some(size)),
        };
        Self { stream, size, raw, cache }
    }
}

/// The CRC of the whole, from those of its chunks.
fn combined<P>(index: &Index<P>) -> u32 {
    let ends = index.chunks.iter().skip(1).map(|chunk| chunk.start).chain([index.end]);
    let mut whole = crc32fast::Hasher::new();
    for (chunk, end) in index.chunks.iter().zip(ends) {
        whole.combine(&crc32fast::Hasher::new_with_initial_len(chunk.crc, end - chunk.start));
    }
    whole.finalize()
}

impl Deflate {
    /// Go on with the first pass by about a mebibyte of output; true when it is complete, and everything verified.
    ///
    /// # Errors
    /// The raw bytes could not be read, or are not what was declared.
    pub fn pass(&self) -> Result<bool, Failure> {
        self.stream.pass()
    }
}

impl Source for Deflate {
    fn size(&self) -> u64 {
        self.size
    }

    fn fill(&self, offset: u64, into: &mut [u8]) -> Filled {
        filled(&self.stream, offset, into, || save(&self.stream, self.cache.as_ref(), KIND_DEFLATE, &*self.raw))
    }

    fn unit(&self, offset: u64) -> std::ops::Range<u64> {
        self.stream.unit(offset).unwrap_or(offset..offset)
    }

    fn notes(&self) -> Option<Notes> {
        Notes::of(self.cache.as_ref(), &*self.raw, self.size)
    }

    fn rest(&self) {
        self.stream.rest();
    }

    fn enter_child(&self) {
        self.raw.enter_child();
    }
}

/// A gzip file of any number of members. Its length is known after a first pass, or from the cache.
pub struct Gzip {
    stream: Stream<Inflate>,
    raw: Arc<dyn ReadAt>,
    cache: Option<Cache>,
}

impl Gzip {
    /// `pass` has to be called until it returns true; then the length is known.
    #[must_use]
    pub fn new(raw: Arc<dyn ReadAt>, cache: Option<Cache>) -> Self {
        let codec = Inflate { raw: Arc::clone(&raw), framing: Framing::Gzip, cache: cache.clone() };
        let stream = match load(cache.as_ref(), KIND_GZIP, &*raw, None) {
            Some(index) => Stream::with_index(codec, None, index),
            None => Stream::new(codec, None),
        };
        Self { stream, raw, cache }
    }

    /// Whether the first pass is complete, so that the length is known.
    #[must_use]
    pub fn is_passed(&self) -> bool {
        self.stream.index().complete
    }

    /// Go on with the first pass by about a mebibyte of output; true when it is complete.
    ///
    /// # Errors
    /// The raw bytes could not be read, or are no gzip file.
    pub fn pass(&self) -> Result<bool, Failure> {
        let before = self.stream.index().complete;
        let complete = self.stream.pass()?;
        if complete && !before {
            save(&self.stream, self.cache.as_ref(), KIND_GZIP, &*self.raw);
        }
        Ok(complete)
    }
}

impl Source for Gzip {
    fn size(&self) -> u64 {
        self.stream.index().end
    }

    fn fill(&self, offset: u64, into: &mut [u8]) -> Filled {
        filled(&self.stream, offset, into, || {})
    }

    fn unit(&self, offset: u64) -> std::ops::Range<u64> {
        self.stream.unit(offset).unwrap_or(offset..offset)
    }

    fn enter_child(&self) {
        self.raw.enter_child();
    }
}

#[cfg(test)]
mod tests {
    use super::super::Memory;
    use super::super::inflate::tests::{deflate, text};
    use super::*;

    fn memory(bytes: &[u8]) -> Arc<dyn ReadAt> {
        Arc::new(Memory::from(bytes.to_vec().into_boxed_slice()))
    }

    fn member(data: &[u8]) -> Deflate {
        Deflate::new(memory(&deflate(data)), data.len() as u64, crc32fast::hash(data), None)
    }

    fn read(source: &dyn Source, offset: usize, length: usize) -> Result<Vec<u8>, Failure> {
        let mut out = vec![0xee; length];
        source.fill(offset as u64, &mut out).map(|()| out)
    }

    #[test]
    fn any_order_gives_the_same_bytes() {
        let data = text(9 << 20);
        let source = member(&data);
        let mut seed = 1u32;
        for _ in 0..300 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let offset = seed as usize % data.len();
            let length = (seed as usize >> 7) % 200_000;
            let length = length.min(data.len() - offset);
            assert!(read(&source, offset, length).unwrap() == data[offset..offset + length], "at {offset}");
        }
        assert!(read(&source, 0, data.len()).unwrap() == data);
        assert!(source.stream.index().chunks.iter().filter(|chunk| chunk.point.is_some()).count() > 4);
    }

    #[test]
    fn a_source_at_rest_goes_on_with_its_points_or_without() {
        let data = text(5 << 20);
        let folder = std::env::temp_dir().join(format!("quire-rest-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for temporary files");
        let path = folder.join("packed");
        std::fs::write(&path, deflate(&data)).expect("space for a file");
        let raw = || {
            let file = std::fs::File::open(&path).expect("it was made");
            Arc::new(super::super::File::new(file.into(), 0, None).expect("a file"))
        };
        let cache = folder.join("cache");
        let open = || Deflate::new(raw(), data.len() as u64, crc32fast::hash(&data), Some(Cache::new(cache.clone())));
        let points = |source: &Deflate| source.stream.index().chunks.iter().filter(|it| it.point.is_some()).count();
        let end = data.len() - 100;
        for source in [open(), open()] {
            // The first makes the cache, the second finds it.
            assert!(read(&source, end, 100).unwrap() == data[end..]);
            assert!(points(&source) > 2);
            source.rest();
            assert_eq!(points(&source), 0);
            assert!(read(&source, end, 100).unwrap() == data[end..]);
            assert!(points(&source) > 2);
        }
        let source = open();
        source.rest();
        std::fs::remove_dir_all(&cache).expect("it was made");
        assert!(read(&source, end, 100).unwrap() == data[end..]);
        assert_eq!(points(&source), 0, "decoded from the beginning");
        let uncached = Deflate::new(raw(), data.len() as u64, crc32fast::hash(&data), None);
        assert!(read(&uncached, end, 100).unwrap() == data[end..]);
        let before = points(&uncached);
        uncached.rest();
        assert_eq!(points(&uncached), before, "they could not be had again");
        std::fs::remove_dir_all(&folder).expect("it was made");
    }

    #[test]
    fn a_length_that_lies_and_a_wrong_crc_fail() {
        let data = text(3_000_000);
        let packed = deflate(&data);
        for (size, crc, cause) in [
            (data.len() - 1, crc32fast::hash(&data), "there is more data than declared"),
            (data.len() + 1, crc32fast::hash(&data), "there is less data than declared"),
            (data.len(), 5, "CRC mismatch at the end"),
        ] {
            let source = Deflate::new(memory(&packed), size as u64, crc, None);
            let early = read(&source, 0, 1000).unwrap();
            assert!(early == data[..1000]);
            let end = read(&source, size - 10, 10);
            assert_eq!(end.expect_err(cause).cause, cause);
            assert_eq!(read(&source, 0, 1000).unwrap_err().cause, cause);
        }
    }

    #[test]
    fn no_flipped_bit_goes_unnoticed() {
        let data = text(300_000);
        let packed = deflate(&data);
        for at in (0..packed.len()).step_by(97) {
            let mut bad = packed.clone();
            bad[at] ^= 1 << (at % 8);
            let source = Deflate::new(memory(&bad), data.len() as u64, crc32fast::hash(&data), None);
            match read(&source, 0, data.len()) {
                // A bit behind the end of the data has no meaning.
                Ok(got) => assert!(got == data, "byte {at}"),
                Err(_) => assert!(read(&source, 0, 1).is_err(), "byte {at}"),
            }
        }
    }

    #[test]
    fn members_and_padding_of_a_gzip_file() {
        let data = text(2_500_000);
        let mut file = Vec::new();
        for part in data.chunks(1_000_001) {
            file.extend([0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 3]);
            file.extend(b"name\0");
            file.extend(deflate(part));
            file.extend(crc32fast::hash(part).to_le_bytes());
            file.extend((part.len() as u32).to_le_bytes());
            file.extend([0; 7]);
        }
        let source = Gzip::new(memory(&file), None);
        while !source.pass().unwrap() {}
        assert!(read(&source, 0, data.len()).unwrap() == data);
        file.push(b'x');
        let source = Gzip::new(memory(&file), None);
        let failure = loop {
            if let Err(failure) = source.pass() {
                break failure;
            }
        };
        assert_eq!(failure.cause, "what follows is no gzip member");
    }
}
