//! Which frames a zstandard file consists of: from its seek table, or by walking the headers of frames and blocks.
//!
//! Layouts: RFC 8878, and contrib/seekable_format/zstd_seekable_compression_format.md of zstandard.

use super::{Failure, ReadAt};

const FRAME: u32 = 0xFD2F_B528;
const SKIPPABLE: u32 = 0x184D_2A50;
const SEEK_TABLE: u32 = 0x184D_2A5E;
const SEEKABLE: u32 = 0x8F92_EAB1;
const FOOTER: u64 = 9;
/// Frames in one file, at most: what is kept of each takes more memory than an empty one takes space.
const FRAMES: usize = 4 << 20;

/// One frame. `output` is None until it was decoded once, if its header does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    pub input: u64,
    pub input_length: u64,
    pub output: Option<u64>,
    /// The low half of the XXH64 of its output, from the seek table.
    pub check: Option<u32>,
}

fn bytes<const N: usize>(raw: &dyn ReadAt, offset: u64) -> Result<[u8; N], Failure> {
    let mut out = [0; N];
    if raw.size().checked_sub(offset).is_none_or(|left| left < N as u64) {
        return Err(Failure::new("the compressed file ends within a frame", offset));
    }
    raw.read_at(offset, &mut out)?;
    Ok(out)
}

fn word(raw: &dyn ReadAt, offset: u64) -> Result<u32, Failure> {
    Ok(u32::from_le_bytes(bytes(raw, offset)?))
}

/// All frames with data, in order.
pub fn find(raw: &dyn ReadAt) -> Result<Vec<Frame>, Failure> {
    match table(raw)? {
        Some(frames) => Ok(frames),
        None => walk(raw),
    }
}

/// The seek table at the end of the file, if there is one.
fn table(raw: &dyn ReadAt) -> Result<Option<Vec<Frame>>, Failure> {
    let Some(footer_at) = raw.size().checked_sub(FOOTER) else { return Ok(None) };
    let footer: [u8; FOOTER as usize] = bytes(raw, footer_at)?;
    let [a, b, c, d, descriptor, magic @ ..] = footer;
    if u32::from_le_bytes(magic) != SEEKABLE {
        return Ok(None);
    }
    let lies = |offset| Failure::new("the seek table does not describe this file", offset);
    let count = u64::from(u32::from_le_bytes([a, b, c, d]));
    let checked = descriptor & 0x80 != 0;
    let width = if checked { 12 } else { 8 };
    let content = count * width + FOOTER;
    let start = raw.size().checked_sub(content + 8).ok_or_else(|| lies(footer_at))?;
    if descriptor & 0x7c != 0 || word(raw, start)? != SEEK_TABLE || u64::from(word(raw, start + 4)?) != content {
        return Err(lies(start));
    }
    // As many bytes as the file really has.
    let mut entries = vec![0; (count * width) as usize];
    raw.read_at(start + 8, &mut entries)?;
    let mut frames = Vec::new();
    let mut input = 0u64;
    for entry in entries.chunks_exact(width as usize) {
        let field = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        let (packed, output) = (u64::from(field(0)), u64::from(field(4)));
        if output > 0 {
            let check = checked.then(|| field(8));
            push(&mut frames, Frame { input, input_length: packed, output: Some(output), check })?;
        }
        input += packed;
    }
    if input == start { Ok(Some(frames)) } else { Err(lies(start)) }
}

fn push(frames: &mut Vec<Frame>, frame: Frame) -> Result<(), Failure> {
    if frames.len() == FRAMES {
        return Err(Failure::new("more than 4194304 frames", frame.input));
    }
    frames.push(frame);
    Ok(())
}

/// Go from block header to block header.
fn walk(raw: &dyn ReadAt) -> Result<Vec<Frame>, Failure> {
    let mut frames = Vec::new();
    let mut at = 0;
    while at < raw.size() {
        let magic = word(raw, at)?;
        if magic & 0xffff_fff0 == SKIPPABLE {
            at += 8 + u64::from(word(raw, at + 4)?);
            if at > raw.size() {
                return Err(Failure::new("the compressed file ends within a frame", raw.size()));
            }
            continue;
        }
        if magic != FRAME {
            return Err(Failure::new("what follows is no zstandard frame", at));
        }
        let start = at;
        let [descriptor] = bytes(raw, at + 4)?;
        let single = descriptor & 0x20 != 0;
        let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
        if dictionary > 0 {
            let mut id = [0; 4];
            raw_prefix(raw, at + 5 + u64::from(!single), &mut id[..dictionary])?;
            if u32::from_le_bytes(id) != 0 {
                return Err(Failure::new("a frame that needs a dictionary", at));
            }
        }
        let size_bytes = match descriptor >> 6 {
            0 => usize::from(single),
            flag => 1 << flag,
        };
        let size_at = at + 5 + u64::from(!single) + dictionary as u64;
        let mut size = [0; 8];
        raw_prefix(raw, size_at, &mut size[..size_bytes])?;
        let output = match size_bytes {
            0 => None,
            2 => Some(u64::from_le_bytes(size) + 256),
            _ => Some(u64::from_le_bytes(size)),
        };
        at = size_at + size_bytes as u64;
        loop {
            let [a, b, c] = bytes(raw, at)?;
            let header = u32::from_le_bytes([a, b, c, 0]);
            let length = match (header >> 1) & 3 {
                1 => 1,
                3 => return Err(Failure::new("a block of a reserved type", at)),
                _ => u64::from(header >> 3),
            };
            at += 3 + length;
            if header & 1 != 0 {
                break;
            }
        }
        at += if descriptor & 4 == 0 { 0 } else { 4 };
        if at > raw.size() {
            return Err(Failure::new("the compressed file ends within a frame", raw.size()));
        }
        push(&mut frames, Frame { input: start, input_length: at - start, output, check: None })?;
    }
    Ok(frames)
}

fn raw_prefix(raw: &dyn ReadAt, offset: u64, into: &mut [u8]) -> Result<(), Failure> {
    if raw.size().checked_sub(offset).is_none_or(|left| left < into.len() as u64) {
        return Err(Failure::new("the compressed file ends within a frame", offset));
    }
    raw.read_at(offset, into)
}
