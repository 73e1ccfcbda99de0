//! The text of `/proc/PID/maps` and `/proc/PID/smaps`, read piece by piece and parsed in one pass.
//!
//! A line that begins with a small hexadecimal digit starts a VMA, any other tells something of the last one: a size
//! (`Rss: 4 kB`), a number (`THPeligible: 0`) or a text (`VmFlags: rd ex`). A name cannot break this: the kernel
//! writes a newline in it as `\012`. What is not understood is handed back, never dropped.
//!
//! The kernel hands such a text out a page at a time. All of it, 7 MB for 10,000 VMAs, is never held: what is kept of
//! a piece are numbers, and names and texts once each.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use crate::sys::file;
use crate::{Error, Result};

/// More than the kernel gives at once.
const BUFFER_BYTES: usize = 64 << 10;
/// Read before the caller is asked again: a few milliseconds of work.
const STEP_BYTES: usize = 1 << 20;

/// A VMA as its first line has it, and where the rest is in [`Parsed`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vma {
    pub start: u64,
    pub end: u64,
    pub protection: [u8; 4],
    pub offset: u64,
    pub major: u32,
    pub minor: u32,
    pub inode: u64,
    /// In [`Parsed::strings`]; as the kernel escapes it.
    pub name: usize,
    /// The names of its figures, in [`Parsed::shapes`].
    pub shape: usize,
    /// In [`Parsed::figures`].
    pub figures: Range<usize>,
    /// In [`Parsed::texts`].
    pub texts: Range<usize>,
}

/// Everything that a text says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    pub vmas: Vec<Vma>,
    /// Lists of names of figures, no two equal; places in `strings`.
    pub shapes: Vec<Vec<usize>>,
    /// Sizes in bytes, other numbers as they are; native-endian numbers of 64 bits.
    pub figures: Vec<u8>,
    /// Names and values of lines that are no figures; places in `strings`.
    pub texts: Vec<(usize, usize)>,
    /// Names and texts, no two equal.
    pub strings: Vec<Box<[u8]>>,
    /// Lines that were not understood.
    pub unknown: Vec<Vec<u8>>,
}

/// A text that is being read.
#[derive(Default)]
pub struct Reader {
    parsed: Parsed,
    /// Where a string is in `parsed.strings`.
    places: HashMap<Box<[u8]>, usize>,
    /// The names of the figures of the last VMA so far.
    names: Vec<usize>,
    /// Bytes read and not parsed yet, up to `filled`: the beginning of a line.
    buffer: Vec<u8>,
    filled: usize,
}

impl Reader {
    /// Read on from where the descriptor stands. Blocks.
    ///
    /// # Returns
    /// Whether there may be more; false once the file has ended.
    ///
    /// # Errors
    /// [`Error::Os`] of `read`. What was read before is kept. A signal is no error: it ends the step early.
    pub fn step(&mut self, fd: BorrowedFd<'_>) -> Result<bool> {
        let mut done = 0;
        while done < STEP_BYTES {
            if self.filled == self.buffer.len() {
                // A line longer than the buffer: names may be as long as the kernel likes.
                self.buffer.resize((2 * self.filled).max(BUFFER_BYTES), 0);
            }
            match file::read(fd, &mut self.buffer[self.filled..]) {
                Ok(0) => return Ok(false),
                Ok(bytes) => {
                    self.filled += bytes;
                    done += bytes;
                }
                Err(libc::EINTR) => break,
                Err(errno) => return Err(Error::os("read", errno)),
            }
            let buffer = std::mem::take(&mut self.buffer);
            let parsed = self.lines(&buffer[..self.filled]);
            self.buffer = buffer;
            self.buffer.copy_within(parsed..self.filled, 0);
            self.filled -= parsed;
        }
        Ok(true)
    }

    /// Everything that was read. Part of a line at the end is not understood.
    #[must_use]
    pub fn finish(mut self) -> Parsed {
        if self.filled > 0 {
            self.parsed.unknown.push(self.buffer[..self.filled].to_vec());
        }
        self.close();
        self.parsed
    }

    /// Parse whole lines; how many bytes they were.
    fn lines(&mut self, text: &[u8]) -> usize {
        let mut at = 0;
        while at < text.len() {
            // Figures mostly come in the order in which the VMA before had them.
            let expected = self.parsed.shapes.last().and_then(|shape| shape.get(self.names.len())).copied();
            if let Some(name) = expected
                && let Some((value, next)) = expected_figure(text, at, &self.parsed.strings[name])
            {
                self.figure(name, value);
                at = next;
                continue;
            }
            let Some(len) = text[at..].iter().position(|&byte| byte == b'\n') else { break };
            self.line(&text[at..at + len]);
            at += len + 1;
        }
        at
    }

    fn figure(&mut self, name: usize, value: u64) {
        self.names.push(name);
        self.parsed.figures.extend_from_slice(&value.to_ne_bytes());
    }

    /// Parse any line.
    fn line(&mut self, line: &[u8]) {
        if let Some((mut vma, name)) = header(line) {
            self.close();
            vma.name = self.string(name);
            vma.figures = self.parsed.figures.len()..self.parsed.figures.len();
            vma.texts = self.parsed.texts.len()..self.parsed.texts.len();
            self.parsed.vmas.push(vma);
            return;
        }
        let colon = line.iter().position(|&byte| byte == b':');
        let (Some(colon), false) = (colon, self.parsed.vmas.is_empty()) else {
            self.parsed.unknown.push(line.to_vec());
            return;
        };
        let name = self.string(&line[..colon]);
        let value = trimmed(&line[colon + 1..]);
        if let Some(value) = figure(value) {
            self.figure(name, value);
        } else {
            let value = self.string(value);
            self.parsed.texts.push((name, value));
        }
    }

    /// The last VMA is complete.
    fn close(&mut self) {
        let parsed = &mut self.parsed;
        let Some(vma) = parsed.vmas.last_mut() else { return };
        vma.figures.end = parsed.figures.len();
        vma.texts.end = parsed.texts.len();
        // The one used last is nearly always right; kernels give one or two.
        vma.shape = parsed.shapes.iter().rposition(|shape| *shape == self.names).unwrap_or_else(|| {
            parsed.shapes.push(self.names.clone());
            parsed.shapes.len() - 1
        });
        self.names.clear();
    }

    fn string(&mut self, text: &[u8]) -> usize {
        if let Some(&place) = self.places.get(text) {
            return place;
        }
        self.parsed.strings.push(text.into());
        self.places.insert(text.into(), self.parsed.strings.len() - 1);
        self.parsed.strings.len() - 1
    }
}

/// A figure under the name that is expected: its value and where the next line begins. None if it takes a closer look.
fn expected_figure(text: &[u8], at: usize, name: &[u8]) -> Option<(u64, usize)> {
    /// So many digits fit as a number of bytes, too.
    const MOST_DIGITS: usize = 16;
    let rest = text[at..].strip_prefix(name)?.strip_prefix(b":")?;
    let blanks = rest.iter().take_while(|&&byte| byte == b' ').count();
    let mut value = 0;
    let mut digits = 0;
    for byte in &rest[blanks..] {
        if !byte.is_ascii_digit() {
            break;
        }
        digits += 1;
        if digits > MOST_DIGITS {
            return None;
        }
        value = value * 10 + u64::from(byte - b'0');
    }
    let behind = &rest[blanks + digits..];
    let next = text.len() - behind.len();
    match behind {
        _ if digits == 0 => None,
        [b'\n', ..] => Some((value, next + 1)),
        [b' ', b'k', b'B', b'\n', ..] => Some((value * 1024, next + 4)),
        _ => None,
    }
}

/// `start-end rwxp offset major:minor inode name`: what comes before the name, and the name.
fn header(line: &[u8]) -> Option<(Vma, &[u8])> {
    let mut rest = Cursor { line, at: 0 };
    let start = rest.number(16)?;
    rest.expect(b'-')?;
    let end = rest.number(16)?;
    rest.expect(b' ')?;
    let protection: [u8; 4] = line.get(rest.at..rest.at + 4)?.try_into().ok()?;
    let known = [b"r-", b"w-", b"x-", b"ps"];
    if !protection.iter().zip(known).all(|(byte, known)| known.contains(byte)) {
        return None;
    }
    rest.at += 4;
    rest.expect(b' ')?;
    let offset = rest.number(16)?;
    rest.expect(b' ')?;
    let major = u32::try_from(rest.number(16)?).ok()?;
    rest.expect(b':')?;
    let minor = u32::try_from(rest.number(16)?).ok()?;
    rest.expect(b' ')?;
    let inode = rest.number(10)?;
    let name = &line[rest.at..];
    if !name.is_empty() && name[0] != b' ' {
        return None;
    }
    let name = &name[name.iter().take_while(|&&byte| byte == b' ').count()..];
    let vma =
        Vma { start, end, protection, offset, major, minor, inode, name: 0, shape: 0, figures: 0..0, texts: 0..0 };
    Some((vma, name))
}

struct Cursor<'a> {
    line: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn expect(&mut self, byte: u8) -> Option<()> {
        (self.line.get(self.at) == Some(&byte)).then(|| self.at += 1)
    }

    fn number(&mut self, radix: u32) -> Option<u64> {
        let digits = self.line[self.at..].iter().take_while(|byte| (**byte as char).is_digit(radix)).count();
        let value = number(&self.line[self.at..self.at + digits], radix)?;
        self.at += digits;
        Some(value)
    }
}

/// Digits only, at least one; None if they do not fit.
fn number(digits: &[u8], radix: u32) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0u64, |value, byte| {
        let digit = (*byte as char).to_digit(radix)?;
        value.checked_mul(u64::from(radix))?.checked_add(u64::from(digit))
    })
}

/// `12 kB` or `12`
fn figure(value: &[u8]) -> Option<u64> {
    match value.strip_suffix(b" kB") {
        Some(size) => number(size, 10)?.checked_mul(1024),
        None => number(value, 10),
    }
}

/// Without the blanks around it.
fn trimmed(mut text: &[u8]) -> &[u8] {
    while let [b' ', rest @ ..] | [rest @ .., b' '] = text {
        text = rest;
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    const TWO: &[u8] = b"00400000-00452000 r-xp 00001000 fe:00 1735 /usr/bin/a b\\012 (deleted)\n\
Size:                328 kB\nRss:                   4 kB\nTHPeligible:           1\nVmFlags: rd ex mr \n\
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n\
Size:                  4 kB\nRss:                   0 kB\nTHPeligible:           0\nVmFlags: ex \n";

    /// Through a file, a number of bytes at a time.
    fn read(text: &[u8], piece_bytes: usize) -> Parsed {
        let mut reader = Reader::default();
        for piece in text.chunks(piece_bytes) {
            let (mut end, start) = UnixStream::pair().unwrap();
            end.write_all(piece).unwrap();
            drop(end);
            while reader.step(start.as_fd()).unwrap() {}
        }
        reader.finish()
    }

    fn of(text: &[u8]) -> Parsed {
        read(text, text.len().max(1))
    }

    fn figures(parsed: &Parsed, vma: &Vma) -> Vec<u64> {
        let words = parsed.figures[vma.figures.clone()].chunks_exact(8);
        words.map(|word| u64::from_ne_bytes(word.try_into().unwrap())).collect()
    }

    fn texts<'a>(parsed: &'a Parsed, vma: &Vma) -> Vec<(&'a [u8], &'a [u8])> {
        let pairs = parsed.texts[vma.texts.clone()].iter();
        pairs.map(|&(name, value)| (&*parsed.strings[name], &*parsed.strings[value])).collect()
    }

    #[test]
    fn two_vmas() {
        let parsed = of(TWO);
        assert!(parsed.unknown.is_empty());
        let [first, second] = &parsed.vmas[..] else { panic!("{parsed:?}") };
        assert_eq!((first.start, first.end, first.offset, first.inode), (0x40_0000, 0x45_2000, 0x1000, 1735));
        assert_eq!((first.major, first.minor, &first.protection), (0xfe, 0, b"r-xp"));
        assert_eq!(*parsed.strings[first.name], *b"/usr/bin/a b\\012 (deleted)");
        assert_eq!(figures(&parsed, first), [328 << 10, 4096, 1]);
        assert_eq!(second.end, 0xffff_ffff_ff60_1000);
        assert_eq!(*parsed.strings[second.name], *b"[vsyscall]");
        assert_eq!(parsed.shapes.len(), 1);
        assert_eq!(texts(&parsed, second), [(&b"VmFlags"[..], &b"ex"[..])]);
    }

    #[test]
    fn what_is_not_understood_is_handed_back() {
        let text = b"Rss: 1 kB\n1-2 rwxp 0 0:0 0\nnothing\nNew: 99999999999999999999 kB\nName of it: 12 MB\n1-2 rw";
        let parsed = of(text);
        assert_eq!(parsed.unknown, [&b"Rss: 1 kB"[..], b"nothing", b"1-2 rw"]);
        let [vma] = &parsed.vmas[..] else { panic!("{parsed:?}") };
        let expected = [(&b"New"[..], &b"99999999999999999999 kB"[..]), (b"Name of it", b"12 MB")];
        assert_eq!(texts(&parsed, vma), expected);
        assert!(parsed.strings[vma.name].is_empty());
    }

    #[test]
    fn lines_that_are_nearly_headers() {
        for line in [
            "-2 rwxp 0 0:0 0",
            "1-2 rwx 0 0:0 0",
            "1-2 xwrp 0 0:0 0",
            "1-2 rwxp 0 0:0 0x",
            "1-2 rwxp 0 100000000:0 0",
            "1",
        ] {
            let text = format!("{line}\n");
            assert!(of(text.as_bytes()).vmas.is_empty(), "{line}");
        }
    }

    #[test]
    fn shapes_are_told_apart() {
        let text = b"1-2 rwxp 0 0:0 0\nRss: 1 kB\n2-3 rwxp 0 0:0 0\nPss: 1 kB\n3-4 rwxp 0 0:0 0\nRss: 2 kB\n4-5 rwxp 0 0:0 0\n";
        let parsed = of(text);
        let shapes: Vec<_> = parsed.vmas.iter().map(|vma| vma.shape).collect();
        assert_eq!(shapes, [0, 1, 0, 2]);
    }

    #[test]
    fn every_cut_of_a_text_parses() {
        for end in 0..TWO.len() {
            let parsed = of(&TWO[..end]);
            assert!(parsed.vmas.len() <= 2);
            for vma in &parsed.vmas {
                assert!(vma.figures.end <= parsed.figures.len() && vma.texts.end <= parsed.texts.len());
            }
        }
    }

    #[test]
    fn pieces_of_any_size_are_the_same_text() {
        let whole = of(TWO);
        for bytes in 1..TWO.len() {
            assert_eq!(read(TWO, bytes), whole, "{bytes}");
        }
    }

    #[test]
    fn a_line_longer_than_the_buffer() {
        let name = vec![b'n'; 3 * BUFFER_BYTES];
        let text = [b"1-2 rwxp 0 0:0 0 ", &name[..], b"\nRss: 1 kB\n"].concat();
        let parsed = read(&text, 5000);
        assert_eq!(*parsed.strings[parsed.vmas[0].name], *name);
        assert_eq!(figures(&parsed, &parsed.vmas[0]), [1024]);
    }

    #[test]
    fn what_cannot_be_read_is_an_error() {
        let folder = std::fs::File::open("/").unwrap();
        assert_eq!(Reader::default().step(folder.as_fd()).unwrap_err().errno(), libc::EISDIR);
    }
}
