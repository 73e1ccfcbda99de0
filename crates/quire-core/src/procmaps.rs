//! The text of `/proc/PID/maps` and `/proc/PID/smaps`, parsed in one pass.
//!
//! A line that begins with a small hexadecimal digit starts a VMA, any other tells something of the last one: a size
//! (`Rss: 4 kB`), a number (`THPeligible: 0`) or a text (`VmFlags: rd ex`). A name cannot break this: the kernel
//! writes a newline in it as `\012`. What is not understood is handed back, never dropped.

use std::ops::Range;

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
    /// In the text; as the kernel escapes it.
    pub name: Range<usize>,
    /// The names of its figures, in [`Parsed::shapes`].
    pub shape: usize,
    /// In [`Parsed::figures`].
    pub figures: Range<usize>,
    /// In [`Parsed::texts`].
    pub texts: Range<usize>,
}

/// Everything that a text says; ranges are places in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    pub vmas: Vec<Vma>,
    /// Lists of names of figures, no two equal.
    pub shapes: Vec<Vec<Range<usize>>>,
    /// Sizes in bytes, other numbers as they are.
    pub figures: Vec<u64>,
    /// Names and values of lines that are no figures.
    pub texts: Vec<(Range<usize>, Range<usize>)>,
    /// Lines that were not understood.
    pub unknown: Vec<Range<usize>>,
}

impl Parsed {
    /// Parse the whole content of one of the files.
    #[must_use]
    pub fn of(text: &[u8]) -> Self {
        let mut parsed = Self::default();
        let mut names: Vec<Range<usize>> = Vec::new();
        let mut at = 0;
        while at < text.len() {
            // Figures mostly come in the order in which the VMA before had them.
            let expected = parsed.shapes.last().and_then(|shape| shape.get(names.len())).cloned().unwrap_or(0..0);
            if let Some((value, next)) = expected_figure(text, at, &text[expected.clone()]) {
                names.push(at..at + expected.len());
                parsed.figures.push(value);
                at = next;
                continue;
            }
            let Some(len) = text[at..].iter().position(|&byte| byte == b'\n') else {
                parsed.unknown.push(at..text.len());
                break;
            };
            parsed.line(text, at..at + len, &mut names);
            at += len + 1;
        }
        parsed.finish(text, &mut names);
        parsed
    }

    /// Parse any line.
    fn line(&mut self, text: &[u8], place: Range<usize>, names: &mut Vec<Range<usize>>) {
        let at = place.start;
        let line = &text[place.clone()];
        if let Some(mut vma) = header(line, at) {
            self.finish(text, names);
            vma.figures = self.figures.len()..self.figures.len();
            vma.texts = self.texts.len()..self.texts.len();
            self.vmas.push(vma);
            return;
        }
        let colon = line.iter().position(|&byte| byte == b':');
        let (Some(colon), false) = (colon, self.vmas.is_empty()) else {
            self.unknown.push(place);
            return;
        };
        let value = trimmed(line, colon + 1);
        if let Some(figure) = figure(&line[value.clone()]) {
            self.figures.push(figure);
            names.push(at..at + colon);
        } else {
            self.texts.push((at..at + colon, at + value.start..at + value.end));
        }
    }

    /// The last VMA is complete.
    fn finish(&mut self, text: &[u8], names: &mut Vec<Range<usize>>) {
        let Some(vma) = self.vmas.last_mut() else { return };
        vma.figures.end = self.figures.len();
        vma.texts.end = self.texts.len();
        let same = |shape: &Vec<Range<usize>>| {
            shape.len() == names.len() && shape.iter().zip(&*names).all(|(a, b)| text[a.clone()] == text[b.clone()])
        };
        // The one used last is nearly always right; kernels give one or two.
        vma.shape = self.shapes.iter().rposition(same).unwrap_or_else(|| {
            self.shapes.push(names.clone());
            self.shapes.len() - 1
        });
        names.clear();
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

/// `start-end rwxp offset major:minor inode name`
fn header(line: &[u8], at: usize) -> Option<Vma> {
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
    let mut name = rest.at;
    if name < line.len() && line[name] != b' ' {
        return None;
    }
    while line.get(name) == Some(&b' ') {
        name += 1;
    }
    let name = at + name..at + line.len();
    Some(Vma { start, end, protection, offset, major, minor, inode, name, shape: 0, figures: 0..0, texts: 0..0 })
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

/// What is left of a line from a place on, without the blanks around it.
fn trimmed(line: &[u8], from: usize) -> Range<usize> {
    let mut range = from..line.len();
    while range.start < range.end && line[range.start] == b' ' {
        range.start += 1;
    }
    while range.end > range.start && line[range.end - 1] == b' ' {
        range.end -= 1;
    }
    range
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &[u8] = b"00400000-00452000 r-xp 00001000 fe:00 1735 /usr/bin/a b\\012 (deleted)\n\
Size:                328 kB\nRss:                   4 kB\nTHPeligible:           1\nVmFlags: rd ex mr \n\
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n\
Size:                  4 kB\nRss:                   0 kB\nTHPeligible:           0\nVmFlags: ex \n";

    fn of<'a>(text: &'a [u8], range: &Range<usize>) -> &'a [u8] {
        &text[range.clone()]
    }

    #[test]
    fn two_vmas() {
        let parsed = Parsed::of(TWO);
        assert!(parsed.unknown.is_empty());
        let [first, second] = &parsed.vmas[..] else { panic!("{parsed:?}") };
        assert_eq!((first.start, first.end, first.offset, first.inode), (0x40_0000, 0x45_2000, 0x1000, 1735));
        assert_eq!((first.major, first.minor, &first.protection), (0xfe, 0, b"r-xp"));
        assert_eq!(of(TWO, &first.name), b"/usr/bin/a b\\012 (deleted)");
        assert_eq!(parsed.figures[first.figures.clone()], [328 << 10, 4096, 1]);
        assert_eq!(second.end, 0xffff_ffff_ff60_1000);
        assert_eq!(of(TWO, &second.name), b"[vsyscall]");
        assert_eq!(parsed.shapes.len(), 1);
        let flags = &parsed.texts[second.texts.clone()];
        assert_eq!((of(TWO, &flags[0].0), of(TWO, &flags[0].1)), (&b"VmFlags"[..], &b"ex"[..]));
    }

    #[test]
    fn what_is_not_understood_is_handed_back() {
        let text = b"Rss: 1 kB\n1-2 rwxp 0 0:0 0\nnothing\nNew: 99999999999999999999 kB\nName of it: 12 MB\n1-2 rw";
        let parsed = Parsed::of(text);
        let unknown: Vec<_> = parsed.unknown.iter().map(|line| of(text, line)).collect();
        assert_eq!(unknown, [&b"Rss: 1 kB"[..], b"nothing", b"1-2 rw"]);
        let texts: Vec<_> = parsed.texts.iter().map(|(name, value)| (of(text, name), of(text, value))).collect();
        assert_eq!(texts, [(&b"New"[..], &b"99999999999999999999 kB"[..]), (b"Name of it", b"12 MB")]);
        assert_eq!(parsed.vmas.len(), 1);
        assert!(parsed.vmas[0].name.is_empty());
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
            assert!(Parsed::of(text.as_bytes()).vmas.is_empty(), "{line}");
        }
    }

    #[test]
    fn shapes_are_told_apart() {
        let text = b"1-2 rwxp 0 0:0 0\nRss: 1 kB\n2-3 rwxp 0 0:0 0\nPss: 1 kB\n3-4 rwxp 0 0:0 0\nRss: 2 kB\n4-5 rwxp 0 0:0 0\n";
        let parsed = Parsed::of(text);
        let shapes: Vec<_> = parsed.vmas.iter().map(|vma| vma.shape).collect();
        assert_eq!(shapes, [0, 1, 0, 2]);
    }

    #[test]
    fn every_cut_of_a_text_parses() {
        for end in 0..TWO.len() {
            let parsed = Parsed::of(&TWO[..end]);
            assert!(parsed.vmas.len() <= 2);
            for vma in &parsed.vmas {
                assert!(vma.figures.end <= parsed.figures.len() && vma.texts.end <= parsed.texts.len());
            }
        }
    }
}
