//! Encoding zstandard frames that can be decoded on their own.

use std::sync::{Mutex, PoisonError};

use zstd_safe::{CCtx, CParameter, compress_bound, get_error_name};

use crate::{Error, Result};

/// Levels that zstandard gives a meaning of its own to (0, and below) are left out.
pub const LEVELS: std::ops::RangeInclusive<i32> = 1..=22;
/// A frame is read into memory as a whole by whoever decodes it.
pub const FRAME_MAX: usize = 1 << 30;

/// Makes frames, from several threads at once.
pub struct FrameEncoder {
    level: i32,
    /// As many as were ever in use at the same time.
    contexts: Mutex<Vec<CCtx<'static>>>,
}

impl FrameEncoder {
    /// # Errors
    /// There is no such level.
    pub fn new(level: i32) -> Result<Self> {
        if !LEVELS.contains(&level) {
            return Err(Error::Invalid(format!("level {level} is none of {} to {}", LEVELS.start(), LEVELS.end())));
        }
        Ok(Self { level, contexts: Mutex::new(Vec::new()) })
    }

    /// One frame, whose header tells the length of its content and whose last four bytes are the checksum of it.
    ///
    /// # Errors
    /// The data is too long, or memory is short.
    pub fn frame(&self, data: &[u8]) -> Result<Vec<u8>> {
        if data.len() > FRAME_MAX {
            return Err(Error::Invalid(format!("a frame of {} bytes; {FRAME_MAX} are the most", data.len())));
        }
        let pooled = self.contexts.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut context = match pooled {
            Some(context) => context,
            None => self.context()?,
        };
        let mut out = Vec::new();
        out.try_reserve_exact(compress_bound(data.len()))
            .map_err(|_| Error::Memory("no memory for a compressed frame".to_owned()))?;
        context.compress2(&mut out, data).map_err(failed)?;
        self.contexts.lock().unwrap_or_else(PoisonError::into_inner).push(context);
        Ok(out)
    }

    fn context(&self) -> Result<CCtx<'static>> {
        let mut context = CCtx::try_create().ok_or_else(|| Error::Memory("no memory for a compressor".to_owned()))?;
        context.set_parameter(CParameter::CompressionLevel(self.level)).map_err(failed)?;
        context.set_parameter(CParameter::ChecksumFlag(true)).map_err(failed)?;
        context.set_parameter(CParameter::ContentSizeFlag(true)).map_err(failed)?;
        Ok(context)
    }
}

/// Room for the output is enough and parameters are checked, so only memory can be what is missing.
fn failed(code: usize) -> Error {
    Error::Memory(format!("zstandard cannot compress: {}", get_error_name(code)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_decode_and_end_with_a_checksum() {
        let encoder = FrameEncoder::new(3).unwrap();
        for length in [0, 1, 4096, 300_000] {
            let data: Vec<u8> = (0..length).map(|at: usize| (at / 7 % 251) as u8).collect();
            let frame = encoder.frame(&data).unwrap();
            let mut back = Vec::with_capacity(length);
            zstd_safe::decompress(&mut back, &frame[..]).unwrap();
            assert!(back == data);
            let check = twox_hash::XxHash64::oneshot(0, &data) as u32;
            assert_eq!(frame[frame.len() - 4..], check.to_le_bytes());
            assert_eq!(zstd_safe::get_frame_content_size(&frame).unwrap(), Some(length as u64));
        }
    }

    #[test]
    fn levels_outside_are_refused() {
        for level in [i32::MIN, -1, 0, 23] {
            assert!(FrameEncoder::new(level).is_err());
        }
    }
}
