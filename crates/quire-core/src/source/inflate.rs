//! A decompressor of raw deflate data that can be entered at a block boundary.
//!
//! The technique is that of zlib's examples/zran.c: a boundary, the 32 KiB before it and the bits of a byte that belong
//! to what follows are all that a decompressor needs to go on.
#![allow(unsafe_code)]

use libz_rs_sys as z;

const WINDOW: usize = 32 * 1024;
const RAW: i32 = -15;

/// What a step of decompression came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Go on, with more input or more room.
    More,
    /// Stands at a boundary between two blocks, if that was asked for.
    Boundary,
    /// The data ended.
    End,
}

/// State of a decompressor, without the input.
pub struct Inflater {
    /// Boxed: the state behind it points back.
    stream: Box<z::z_stream>,
}

// SAFETY: the stream and its state are heap memory that only this object refers to; nothing of it belongs to a thread.
unsafe impl Send for Inflater {}

impl Inflater {
    pub fn new() -> Self {
        let mut stream = Box::new(z::z_stream::default());
        // SAFETY: a default stream is a valid argument; version and size are those of the library that we are built with.
        let rc = unsafe {
            z::inflateInit2_(&raw mut *stream, RAW, z::zlibVersion(), std::mem::size_of::<z::z_stream>() as i32)
        };
        assert_eq!(rc, z::Z_OK, "no memory for a decompressor");
        Self { stream }
    }

    /// At a boundary: `window` is the output before it (at most 32 KiB), `bits` the number of high bits of `byte`, the
    /// last byte of the input before it, that belong to what follows.
    pub fn resume(window: &[u8], bits: u8, byte: u8) -> Option<Self> {
        if bits > 7 || window.len() > WINDOW {
            return None;
        }
        let mut new = Self::new();
        if bits > 0 {
            let value = i32::from(byte) >> (8 - bits);
            // SAFETY: the stream was initialised by `new`.
            if unsafe { z::inflatePrime(&raw mut *new.stream, i32::from(bits), value) } != z::Z_OK {
                return None;
            }
        }
        // SAFETY: the stream was initialised by `new`; pointer and length describe `window`.
        let rc = unsafe { z::inflateSetDictionary(&raw mut *new.stream, window.as_ptr(), window.len() as u32) };
        (rc == z::Z_OK).then_some(new)
    }

    /// Decompress; returns bytes taken, bytes made and how far that led. None if the data is invalid.
    pub fn step(&mut self, input: &[u8], output: &mut [u8], stop: bool) -> Option<(usize, usize, Step)> {
        let (have, room) = (u32::try_from(input.len()).ok()?, u32::try_from(output.len()).ok()?);
        self.stream.next_in = input.as_ptr();
        self.stream.avail_in = have;
        self.stream.next_out = output.as_mut_ptr();
        self.stream.avail_out = room;
        let flush = if stop { z::Z_BLOCK } else { z::Z_NO_FLUSH };
        // SAFETY: the stream was initialised; input and output describe slices that outlive the call and do not overlap,
        // one being borrowed for writing.
        let rc = unsafe { z::inflate(&raw mut *self.stream, flush) };
        let (taken, made) = ((have - self.stream.avail_in) as usize, (room - self.stream.avail_out) as usize);
        let step = match rc {
            z::Z_STREAM_END => Step::End,
            z::Z_OK | z::Z_BUF_ERROR if stop && self.at_boundary() => Step::Boundary,
            z::Z_OK | z::Z_BUF_ERROR => Step::More,
            _ => return None,
        };
        Some((taken, made, step))
    }

    /// Behind a block that is not the last, with less than a byte of input left inside.
    fn at_boundary(&self) -> bool {
        self.stream.data_type & 0xc0 == 0x80 && self.stream.data_type & 0x3f < 8
    }

    /// How many bits of the last byte taken belong to what follows.
    pub fn bits(&self) -> u8 {
        (self.stream.data_type & 7) as u8
    }

    /// The last output, at most 32 KiB.
    pub fn window(&self) -> Vec<u8> {
        let mut window = vec![0; WINDOW];
        let mut length = 0;
        // SAFETY: the stream was initialised, and the buffer holds the 32 KiB that are the most it writes.
        let rc = unsafe { z::inflateGetDictionary(&raw const *self.stream, window.as_mut_ptr(), &raw mut length) };
        assert_eq!(rc, z::Z_OK, "the decompressor is in a state that it cannot be in");
        window.truncate(length as usize);
        window
    }
}

impl Drop for Inflater {
    fn drop(&mut self) {
        // SAFETY: initialised by `new`, ended here only.
        unsafe { z::inflateEnd(&raw mut *self.stream) };
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Text with some order in it, so that blocks refer far back.
    pub fn text(length: usize) -> Vec<u8> {
        let mut state = 7u32;
        let mut out = Vec::with_capacity(length);
        while out.len() < length {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            out.extend_from_slice(format!("row {} of {:x};", state >> 22, out.len() >> 9).as_bytes());
        }
        out.truncate(length);
        out
    }

    pub fn deflate(data: &[u8]) -> Vec<u8> {
        let mut stream = Box::new(z::z_stream::default());
        let mut out = vec![0; data.len() + data.len() / 100 + 1000];
        // SAFETY: a default stream, the library's own version and size; slices outlive the calls.
        unsafe {
            let size = std::mem::size_of::<z::z_stream>() as i32;
            assert_eq!(z::deflateInit2_(&raw mut *stream, 6, 8, RAW, 8, 0, z::zlibVersion(), size), z::Z_OK);
            stream.next_in = data.as_ptr();
            stream.avail_in = data.len() as u32;
            stream.next_out = out.as_mut_ptr();
            stream.avail_out = out.len() as u32;
            assert_eq!(z::deflate(&raw mut *stream, z::Z_FINISH), z::Z_STREAM_END);
            out.truncate(out.len() - stream.avail_out as usize);
            z::deflateEnd(&raw mut *stream);
        }
        out
    }

    #[test]
    fn every_block_boundary_is_a_place_to_go_on_from() {
        let data = text(1_500_000);
        let packed = deflate(&data);
        let mut inflater = Inflater::new();
        let (mut taken, mut made, mut boundaries, mut odd) = (0, 0, 0, 0);
        let mut out = vec![0; data.len() + 1];
        loop {
            let (n, m, step) = inflater.step(&packed[taken..], &mut out[made..], true).unwrap();
            taken += n;
            made += m;
            if step == Step::End {
                break;
            }
            if step == Step::Boundary && made > 0 {
                boundaries += 1;
                odd += u32::from(inflater.bits() != 0);
                let mut other = Inflater::resume(&inflater.window(), inflater.bits(), packed[taken - 1]).unwrap();
                let mut rest = vec![0; data.len() - made + 1];
                let (_, n, step) = other.step(&packed[taken..], &mut rest, false).unwrap();
                assert_eq!((n, step), (data.len() - made, Step::End));
                assert!(rest[..n] == data[made..], "boundary at {made}");
            }
        }
        assert!(boundaries > 8 && odd > 3, "{boundaries} boundaries, {odd} of them within a byte");
    }
}
