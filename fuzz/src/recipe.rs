//! Turning the fuzzer's bytes into sets of layer files: honest ones, bent step by step.

use std::rc::Rc;

use crate::files::{File, field};
use crate::honest::{Honest, page};

/// Steps of one recipe, at most.
const MOST_STEPS: usize = 64;
/// Data pages that a step may add without telling lies about them.
const MOST_PAGES: u64 = 1 << 12;

/// The fuzzer's bytes; zeros once they are spent.
pub struct Bytes<'a>(pub &'a [u8]);

impl Bytes<'_> {
    pub fn is_spent(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    pub fn word(&mut self) -> u64 {
        (0..8).fold(0, |word, i| word | u64::from(self.byte()) << (8 * i))
    }

    pub fn short(&mut self) -> u64 {
        u64::from(self.byte()) | u64::from(self.byte()) << 8
    }

    pub fn below(&mut self, n: usize) -> usize {
        if n == 0 { 0 } else { usize::from(self.byte()) % n }
    }

    /// Any number, but more often one at which something ends.
    pub fn number(&mut self) -> u64 {
        match self.byte() % 6 {
            0 | 1 => u64::from(self.byte()),
            2 => self.short(),
            3 => (1u64 << (self.byte() % 64)).wrapping_add(u64::from(self.byte() % 5)).wrapping_sub(2),
            4 => 512u64.pow(u32::from(self.byte() % 5)).wrapping_mul(u64::from(self.byte())),
            _ => self.word(),
        }
    }

    /// A page-table entry; rarely one that means nothing.
    pub fn entry(&mut self) -> u64 {
        let place = |bytes: &mut Self| u64::from(bytes.byte() % 64) << 48;
        match self.byte() % 8 {
            0 => 0,
            1..=3 => 1 << 62 | place(self) | u64::from(self.byte()),
            4 | 5 => 2 << 62 | place(self) | u64::from(self.byte() % 8),
            6 => 1 << 62 | place(self) | (self.number() & ((1 << 48) - 1)),
            _ => self.word(),
        }
    }
}

/// A set of files, top layer first.
pub type Set = Vec<Rc<File>>;

fn edit(set: &mut Set, at: usize) -> Option<&mut File> {
    set.get_mut(at).map(|file| Rc::make_mut(file).bend())
}

fn entry_place(file: &File, bytes: &mut Bytes<'_>) -> (u64, usize) {
    let nodes = file.node_pages();
    let node = if nodes == 0 { 0 } else { u64::from(bytes.byte()) % nodes };
    (node, bytes.short() as usize % 512)
}

/// Where the change begins in files with few entries: those that are used.
fn used_place(file: &File, bytes: &mut Bytes<'_>) -> (u64, usize) {
    let (node, at) = entry_place(file, bytes);
    let used: Vec<usize> = (0..512).filter(|i| file.entry(node, *i) != 0).collect();
    if used.is_empty() { (node, at) } else { (node, used[at % used.len()]) }
}

fn step(set: &mut Set, bytes: &mut Bytes<'_>) {
    let code = bytes.byte() % 20;
    let at = bytes.below(set.len());
    let other = bytes.below(set.len());
    let Some(other_file) = set.get(other).cloned() else { return };
    if matches!(code, 6 | 7 | 19) {
        return shuffle(set, code, at, other, bytes);
    }
    let Some(file) = edit(set, at) else { return };
    match code {
        0 | 1 => {
            let (node, place) = if code == 0 { entry_place(file, bytes) } else { used_place(file, bytes) };
            file.set_entry(node, place, bytes.entry());
        }
        2 => {
            let (from_node, from) = used_place(&other_file, bytes);
            let (node, place) = entry_place(file, bytes);
            file.set_entry(node, place, other_file.entry(from_node, from));
        }
        3 => file.set_word(field::ROOT, bytes.entry()),
        4 => {
            let fields = [
                field::VERSION,
                field::FLAGS,
                field::DATA_PAGES,
                field::NODE_PAGES,
                field::IMPORTS,
                field::SIZE,
                field::PAGE_SIZE,
            ];
            let which = fields[bytes.below(fields.len())];
            let value = bytes.number();
            if matches!(which, field::VERSION | field::FLAGS) {
                file.trailer[which..which + 4].copy_from_slice(&(value as u32).to_le_bytes());
            } else {
                file.set_word(which, value);
            }
        }
        5 => {
            let place = field::IMPORT_IDS + 16 * bytes.below(64);
            let id = if bytes.byte() % 4 == 0 { [bytes.byte(); 16] } else { other_file.id() };
            file.trailer[place..place + 16].copy_from_slice(&id);
        }
        8 => {
            let (data, nodes) = (u64::from(bytes.byte()), u64::from(bytes.byte() % 8));
            file.reshape(data, nodes);
        }
        9 => {
            let place = bytes.short() as usize % file.trailer.len();
            file.trailer[place] ^= bytes.byte();
        }
        10 => {
            let number = u64::from(bytes.byte());
            if number < file.trailer_at {
                file.pages.insert(number, Rc::new(page(u64::from(bytes.byte()))));
            }
        }
        11 => file.tail = i64::from(bytes.byte() as i8) * i64::from(bytes.byte()),
        12 => file.seals = i32::from(bytes.byte() & 15),
        13 => {
            file.wrong_crc = bytes.byte() % 2 == 1;
            file.wrong_hash = bytes.byte() % 2 == 1;
        }
        14 => {
            // A staircase of runs, or the same run over and over.
            let (node, from) = entry_place(file, bytes);
            let (first, stride, count) = (bytes.entry(), u64::from(bytes.byte() % 3), bytes.short() % 513);
            for i in 0..count.min(512 - from as u64) {
                file.set_entry(node, from + i as usize, first.wrapping_add(i * stride));
            }
        }
        15 => {
            // A file that is mostly hole.
            let (data, nodes) = (bytes.number() % (1 << 35), u64::from(bytes.byte() % 8));
            file.reshape(data, nodes);
        }
        16 => {
            let size = bytes.number() % (1 << 48);
            file.set_word(field::SIZE, size);
        }
        17 => {
            let place = bytes.short() as usize % 512 * 8;
            let value = bytes.entry().to_le_bytes();
            file.trailer[place..place + 8].copy_from_slice(&value);
        }
        _ => {
            // A tree of runs from nothing: one data page each, in any order.
            let count = bytes.short() % MOST_PAGES;
            let (stride, nodes) = (u64::from(bytes.byte()) | 1, count.div_ceil(512).max(1));
            file.reshape(count.next_power_of_two(), nodes + 1);
            let mask = count.next_power_of_two() - 1;
            for i in 0..count {
                file.set_entry(i / 512, (i % 512) as usize, 1 << 62 | ((i * stride) & mask));
            }
            for node in 0..nodes {
                file.set_entry(nodes, node as usize % 512, 2 << 62 | node);
            }
            for i in 0..count.min(64) {
                file.pages.insert(i, Rc::new(page(i)));
            }
            file.set_word(field::ROOT, 2 << 62 | if nodes == 1 { 0 } else { nodes });
            file.set_word(field::SIZE, count * crate::PAGE);
        }
    }
}

/// Steps that change which files there are.
fn shuffle(set: &mut Set, code: u8, at: usize, other: usize, bytes: &mut Bytes<'_>) {
    match (code, bytes.byte() % 3) {
        (6, 0) => set.swap(at, other),
        (6, 1) if set.len() > 1 => {
            set.remove(at);
        }
        (6, _) if set.len() < 66 => {
            // The same inode twice, or a copy with an id of its own.
            set.push(Rc::clone(&set[at]));
            if bytes.byte() % 2 == 1 {
                let last = set.len() - 1;
                let id = bytes.byte();
                if let Some(file) = edit(set, last) {
                    file.trailer[field::ID] ^= id;
                }
            }
        }
        (7, _) if set.len() < 66 => {
            // A new layer that another one imports and uses.
            let mut file = File::empty([bytes.byte() | 1; 16]);
            file.reshape(u64::from(bytes.byte()), u64::from(bytes.byte() % 4));
            for number in 0..file.data_pages().min(4) {
                file.pages.insert(number, Rc::new(page(1000 + number)));
            }
            let id = file.id();
            set.push(Rc::new(file));
            if let Some(user) = edit(set, at) {
                let slot = user.word(field::IMPORTS) + 1;
                if slot < 64 {
                    let place = field::IMPORT_IDS + 16 * (slot as usize - 1);
                    user.trailer[place..place + 16].copy_from_slice(&id);
                    user.set_word(field::IMPORTS, slot);
                    let (node, place) = entry_place(user, bytes);
                    user.set_entry(node, place, 1 << 62 | slot << 48 | u64::from(bytes.byte()));
                }
            }
        }
        (19, _) => {
            // Another id, told to all who import it.
            let old = set[at].id();
            let new = [bytes.byte(); 16];
            for i in 0..set.len() {
                let places: Vec<usize> = std::iter::once(field::ID)
                    .chain((0..63).map(|slot| field::IMPORT_IDS + 16 * slot))
                    .filter(|place| set[i].trailer[*place..*place + 16] == old)
                    .collect();
                if !places.is_empty() {
                    if let Some(file) = edit(set, i) {
                        places.iter().for_each(|place| file.trailer[*place..*place + 16].copy_from_slice(&new));
                    }
                }
            }
        }
        _ => {}
    }
}

/// What a recipe makes.
pub struct Made {
    /// Which honest snapshot it began with.
    pub base: usize,
    pub first: Set,
    /// The same, bent further; most files are shared.
    pub second: Set,
    /// Which of the slower checks to do.
    pub choices: u8,
}

/// Follow a recipe.
pub fn follow(honest: &[Honest], data: &[u8]) -> Made {
    let mut bytes = Bytes(data);
    let base = bytes.below(honest.len());
    let choices = bytes.byte();
    let steps = bytes.byte();
    let mut first: Set = honest[base].files.clone();
    for _ in 0..usize::from(steps).min(MOST_STEPS) {
        if bytes.is_spent() {
            break;
        }
        step(&mut first, &mut bytes);
    }
    let mut second = first.clone();
    for _ in 0..MOST_STEPS {
        if bytes.is_spent() {
            break;
        }
        step(&mut second, &mut bytes);
    }
    Made { base, first, second, choices }
}

/// The same for a single file, as `load` takes it.
pub fn follow_one(honest: &[Honest], data: &[u8]) -> (Rc<File>, u8) {
    let mut bytes = Bytes(data);
    let base = bytes.below(honest.len());
    let choices = bytes.byte();
    let mut set: Set = vec![Rc::clone(&honest[base].files[0])];
    for _ in 0..MOST_STEPS {
        if bytes.is_spent() {
            break;
        }
        step(&mut set, &mut bytes);
    }
    (set.swap_remove(0), choices)
}
