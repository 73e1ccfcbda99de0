//! A shared object in memory: laid out for the dynamic linker, linked, and its constructors run.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_int};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use super::plan::{Linkage, Plan, Segment, Whole};
use super::reader::Reader;
use crate::pages::{PAGE, PageRange, subtract};
use crate::region::{self, Backend, Discard, Figures, Region, RegionError, View};
use crate::source::{self, Failure, Source};
use crate::sys::area::Access;
use crate::sys::pagemap::Pagemap;
use crate::sys::{dl, memfd};
use crate::{Error, Result};

/// Objects with less than this to leave out are loaded whole: what keeps track of it would take as much.
const WORTH_BYTES: u64 = 64 << 10;
/// What is copied at once into a file that is loaded whole.
const COPY_BYTES: usize = 1 << 20;
/// Dynamic linkers ignore entries whose tag they do not know; this one is in the range kept for operating systems.
const HIDDEN_TAG: u64 = 0x6000_7175;

/// How an object is kept in memory.
enum Body {
    /// All of it, in a sealed file.
    Whole {
        file: OwnedFd,
        reason: String,
        /// What was read of it, if its constructors are hidden.
        hidden: Option<Box<Plan>>,
    },
    Paged(Box<Paged>),
}

/// What is touched of it, and what the dynamic linker needs.
struct Paged {
    region: region::Handle,
    plan: Plan,
}

/// Where a library stands in its life.
enum State {
    Prepared,
    /// The dynamic linker has it because a `Group` needs it.
    Grouped,
    Open(dl::Handle),
    Closed,
}

/// A shared object that is ready for the dynamic linker, or has been linked.
pub struct Library {
    path: CString,
    linkage: Linkage,
    /// Never dropped while the dynamic linker has the object: it may come to run its code, up to the process's end.
    body: Mutex<Option<Body>>,
    state: Mutex<State>,
    /// Of the file.
    size: u64,
    /// Whether code of it runs while it is linked.
    has_resolvers: bool,
}

/// How much of a library is where.
#[derive(Clone)]
pub struct Share {
    /// Why all of it was loaded at once; empty if it was not.
    pub reason: String,
    /// Bytes of the file.
    pub size: u64,
    /// Bytes that are filled when they are touched.
    pub lazy_bytes: u64,
    /// Those of them that are in memory.
    pub filled_bytes: u64,
    pub figures: Option<Figures>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Library {
    /// Lay an object out in memory, as far as the dynamic linker needs it, and check it.
    ///
    /// `whole`: why to load it whole, if that is wanted. `crc`: the CRC-32 of the file, which is checked if it is loaded
    /// whole. `hide`: hide its constructors from the dynamic linker even then, for a `Group`. May wait for the source;
    /// forks wait for it.
    ///
    /// # Errors
    /// Malformed, with the field that is wrong; what the source raises; no memory.
    pub fn prepare(
        source: Arc<dyn Source>,
        name: &str,
        window_bytes: u64,
        whole: Option<String>,
        crc: Option<u32>,
        hide: bool,
    ) -> std::result::Result<Self, RegionError> {
        let size = source.size();
        let reason = match whole {
            Some(reason) => reason,
            None if size < WORTH_BYTES => format!("its {size} bytes are not worth being left out"),
            None => match Self::paged(&source, name, window_bytes)? {
                Ok(mut paged) => {
                    paged.region.rest()?;
                    let linkage = std::mem::take(&mut paged.plan.linkage);
                    return Ok(Self::of(size, Body::Paged(Box::new(paged)), linkage, false));
                }
                Err(reason) => reason,
            },
        };
        let file = region::reading(|| {
            let copied = copy(source.as_ref(), &label(name), crc);
            source.rest();
            source::trim(0);
            copied
        })??;
        // Checked after it was copied: what is read twice might differ.
        let mut plan = plan_of(Reader::of_file(&file, size)?)?;
        if hide {
            plan.hide_constructors(file.as_fd())?;
        }
        memfd::add_seals(file.as_fd(), memfd::SEALS_IMMUTABLE)?;
        let linkage = std::mem::take(&mut plan.linkage);
        let has_resolvers = plan.whole == Some(Whole::IndirectFunctions);
        let hidden = hide.then(|| Box::new(plan));
        Ok(Self::of(size, Body::Whole { file, reason, hidden }, linkage, has_resolvers))
    }

    fn of(size: u64, body: Body, linkage: Linkage, has_resolvers: bool) -> Self {
        let path = path_of(body.file());
        let state = Mutex::new(State::Prepared);
        Self { path, linkage, body: Mutex::new(Some(body)), state, size, has_resolvers }
    }

    /// A region that shows the object, with what is needed at once filled in; or why that cannot be.
    fn paged(
        source: &Arc<dyn Source>,
        name: &str,
        window_bytes: u64,
    ) -> std::result::Result<std::result::Result<Paged, String>, RegionError> {
        let settings = region::Settings {
            name: name.to_owned(),
            window_bytes,
            discard: Discard::Pressure,
            backend: Backend::Thread,
            executable: false,
            shared: Some(unused(region::shared_file(&label(name), source.size())?)?),
            budget_bytes: None,
            sparse: true,
        };
        let region = match Region::open(Arc::clone(source), settings) {
            Ok(region) => region,
            Err(RegionError::Core(Error::Unsupported(text))) => return Ok(Err(text)),
            Err(error) => return Err(error),
        };
        if !region.serves_system_calls() {
            return Ok(Err("userfaultfd is allowed for faults in user mode only (vm.unprivileged_userfaultfd), \
                           and system calls read constants of libraries"
                .to_owned()));
        }
        // Before anything is looked up here and there.
        region.recall()?;
        let plan = plan_of(Reader::of_region(&region))?;
        if let Some(whole) = plan.whole {
            return Ok(Err(whole.reason().to_owned()));
        }
        if plan.lazy(region.window_bytes() as u64) < WORTH_BYTES {
            return Ok(Err("little of it could be left out".to_owned()));
        }
        for range in &plan.eager {
            region.pin(range.start, range.end - range.start)?;
        }
        let file = region.shared_file().ok_or_else(|| Error::Invalid("the region is not shared".to_owned()))?;
        plan.hide_constructors(file)?;
        Ok(Ok(Paged { region, plan }))
    }

    /// By what path the dynamic linker opens it, and knows it from then on.
    #[must_use]
    pub fn path(&self) -> &CStr {
        &self.path
    }

    #[must_use]
    pub const fn linkage(&self) -> &Linkage {
        &self.linkage
    }

    /// Whether it has indirect functions, whose resolvers run while it is linked.
    #[must_use]
    pub const fn has_resolvers(&self) -> bool {
        self.has_resolvers
    }

    /// Whether a `Group` can have it: it is not linked, and its constructors are hidden.
    #[must_use]
    pub fn is_ready_for_a_group(&self) -> bool {
        self.is_hidden() && matches!(*lock(&self.state), State::Prepared)
    }

    /// Whether its constructors are hidden from the dynamic linker, so that they are to be run here.
    fn is_hidden(&self) -> bool {
        lock(&self.body).as_ref().is_some_and(|body| body.hidden().is_some())
    }

    /// Have the dynamic linker load it, and run its constructors. What it needs must be loaded before, unless the dynamic
    /// linker finds it by itself.
    ///
    /// Returns the handle, which is the library's: `close` gives it back.
    ///
    /// # Errors
    /// What the dynamic linker says, with the path in it; or that filling failed.
    pub fn open(&self, mode: c_int) -> std::result::Result<dl::Handle, OpenError> {
        let mut state = lock(&self.state);
        match &*state {
            State::Open(handle) => {
                self.publish(mode)?;
                return Ok(*handle);
            }
            State::Grouped => {
                let mode = mode | libc::RTLD_NOLOAD;
                let handle = dl::Handle::open(&self.path, mode).map_err(OpenError::Linker)?;
                *state = State::Open(handle);
                return Ok(handle);
            }
            State::Closed => return Err(OpenError::Linker("the library is closed".to_owned())),
            State::Prepared => {}
        }
        if !self.is_hidden() {
            // Constructors run inside and may do anything, except opening the same library again.
            let handle = dl::Handle::open(&self.path, mode).map_err(OpenError::Linker)?;
            *state = State::Open(handle);
            return Ok(handle);
        }
        // Nobody else is to find symbols of it before its constructors have run.
        let handle = dl::Handle::open(&self.path, mode & !libc::RTLD_GLOBAL).map_err(OpenError::Linker)?;
        *state = State::Open(handle);
        drop(state);
        self.attach()?;
        self.construct()?;
        self.publish(mode)?;
        Ok(handle)
    }

    /// The dynamic linker has loaded it for something else, which holds it.
    pub(super) fn note_loaded(&self) {
        *lock(&self.state) = State::Grouped;
    }

    /// What was added to the addresses of an object that is loaded.
    fn bias(&self) -> std::result::Result<usize, OpenError> {
        let found = match &*lock(&self.state) {
            State::Open(handle) => handle.bias(),
            State::Grouped => dl::bias_of(&self.path).ok_or_else(|| "the dynamic linker has lost it".to_owned()),
            State::Prepared | State::Closed => Err("the library is not open".to_owned()),
        };
        found.map_err(OpenError::Linker)
    }

    /// It was mapped: fill what is touched of it from now on, if it is not there as a whole.
    pub(super) fn attach(&self) -> std::result::Result<(), OpenError> {
        let bias = self.bias()?;
        if let Some(Body::Paged(paged)) = &*lock(&self.body) {
            paged.attach(bias)?;
            // Where /proc/self/pagemap cannot be read, it takes more memory, and that is all.
            let _dropped = paged.drop_hidden(bias);
        }
        Ok(())
    }

    /// Run its constructors, if they are hidden. Once, after `attach`.
    pub(super) fn construct(&self) -> std::result::Result<(), OpenError> {
        let Some((init, array)) = lock(&self.body).as_ref().and_then(Body::hidden).map(Plan::constructors) else {
            return Ok(());
        };
        let bias = self.bias()?;
        let at = |address: u64| bias + address as usize;
        // SAFETY: the addresses were checked to lie within the object, which is linked; its constructors were hidden from
        // the dynamic linker, and run here once, after the state ceased to be Prepared.
        unsafe { dl::construct(init.map(at), at(array.start), ((array.end - array.start) / 8) as usize) };
        Ok(())
    }

    /// Make the symbols of what is loaded known to all, if the mode says so.
    fn publish(&self, mode: c_int) -> std::result::Result<(), OpenError> {
        if mode & libc::RTLD_GLOBAL == 0 {
            return Ok(());
        }
        // The reference that this counts is not needed.
        let global = dl::Handle::open(&self.path, mode | libc::RTLD_NOLOAD).map_err(OpenError::Linker)?;
        global.close().map_err(OpenError::Linker)
    }

    /// Give the library's own reference back. True if the object was unloaded: others may hold references, and some objects
    /// are never unloaded.
    ///
    /// # Errors
    /// What the dynamic linker says.
    pub fn close(&self) -> std::result::Result<bool, String> {
        self.let_go()?;
        Ok(self.settle())
    }

    /// Give the library's own reference back, if it holds one. Destructors may run.
    pub(super) fn let_go(&self) -> std::result::Result<(), String> {
        if let Some(region) = self.region() {
            // Now, as long as its views are mapped. Without notes later processes are slower, and that is all.
            let _noted = region.remember();
        }
        let before = std::mem::replace(&mut *lock(&self.state), State::Closed);
        if let State::Open(handle) = before { handle.close() } else { Ok(()) }
    }

    /// Give up what is behind it, unless the dynamic linker still has it. True if it has not.
    pub(super) fn settle(&self) -> bool {
        if dl::Handle::find(&self.path).is_some() {
            return false;
        }
        if let Some(body) = lock(&self.body).take() {
            if let Body::Paged(paged) = &body {
                paged.region.detach();
            }
            drop(body);
        }
        true
    }

    /// Fill all of it, which then stays until the kernel or `discard` takes it.
    ///
    /// # Errors
    /// What the source raises.
    pub fn fill(&self) -> std::result::Result<(), RegionError> {
        match self.region() {
            Some(region) => region.prefetch(0, region.size()),
            None => Ok(()),
        }
    }

    /// Take back what can be filled again. Returns how many bytes that was.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn discard(&self) -> Result<u64> {
        match self.region() {
            Some(region) => Ok(region.discard(0, region.size())? as u64 * region.window_bytes() as u64),
            None => Ok(0),
        }
    }

    fn region(&self) -> Option<Arc<Region>> {
        match &*lock(&self.body) {
            Some(Body::Paged(paged)) => Some(Arc::clone(&paged.region)),
            _ => None,
        }
    }

    /// # Errors
    /// What the kernel refuses.
    pub fn share(&self) -> Result<Share> {
        let nothing = Share { reason: String::new(), size: self.size, lazy_bytes: 0, filled_bytes: 0, figures: None };
        match &*lock(&self.body) {
            Some(Body::Paged(paged)) => {
                let lazy = paged.plan.lazy_ranges(paged.region.window_bytes() as u64);
                Ok(Share {
                    lazy_bytes: lazy.iter().map(|range| range.end - range.start).sum(),
                    filled_bytes: paged.region.resident_of(&lazy)?,
                    figures: Some(paged.region.figures()),
                    ..nothing
                })
            }
            Some(Body::Whole { reason, .. }) => Ok(Share { reason: reason.clone(), ..nothing }),
            None => Ok(Share { reason: "it is closed".to_owned(), ..nothing }),
        }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        if matches!(*lock(&self.state), State::Prepared) {
            return;
        }
        // Still loaded: its code needs what is behind it until the process ends.
        if let Some(body) = lock(&self.body).take() {
            std::mem::forget(body);
        }
    }
}

/// Why the dynamic linker has not loaded an object.
#[derive(Debug)]
pub enum OpenError {
    Linker(String),
    Region(RegionError),
}

impl From<RegionError> for OpenError {
    fn from(error: RegionError) -> Self {
        Self::Region(error)
    }
}

impl From<Error> for OpenError {
    fn from(error: Error) -> Self {
        Self::Region(error.into())
    }
}

impl Paged {
    /// The object was mapped: fill what is touched of it from now on.
    fn attach(&self, bias: usize) -> std::result::Result<(), RegionError> {
        let views = self.plan.lazy_segments().map(|segment| {
            let start = segment.address / PAGE * PAGE;
            let len = (segment.address + segment.file_bytes).next_multiple_of(PAGE) - start;
            let access = if segment.executable { Access::ReadExecute } else { Access::Read };
            View::new(bias + start as usize, len as usize, (segment.offset / PAGE * PAGE) as usize, access)
        });
        let attached = self.region.attach(views.collect(), &self.plan.kept());
        if let Err(error) = attached {
            // It is mapped, and can be unmapped only by running its destructors: so it must be whole.
            self.region.pin(0, self.region.size())?;
            return Err(error.into());
        }
        for range in self.plan.spent_lazy() {
            self.region.spend(&range)?;
        }
        Ok(())
    }

    /// Take from the file what lies below private copies of the object's writable pages: nobody sees it any more. Pages that
    /// are written later are not found.
    fn drop_hidden(&self, bias: usize) -> Result<()> {
        let Some(file) = self.region.shared_file() else { return Ok(()) };
        let pagemap = Pagemap::open()?;
        // A page of the file where two segments meet is shown by both.
        let shown: Vec<PageRange> = self.plan.lazy_segments().map(Segment::pages).collect();
        for segment in self.plan.segments.iter().filter(|segment| segment.writable) {
            let pages = segment.pages();
            let mut copies = Vec::new();
            let start = bias + (segment.address / PAGE * PAGE) as usize;
            pagemap.private_pages(start, PageRange::new(0, pages.len), &mut copies)?;
            copies.iter_mut().for_each(|copy| copy.start += pages.start);
            // Pages at its ends may have what is in no segment: section headers and their names, for debuggers.
            let first = PageRange::between(pages.start, segment.offset.div_ceil(PAGE));
            let last = PageRange::between((segment.offset + segment.file_bytes) / PAGE, pages.end());
            let kept = shown.iter().chain([&first, &last]).filter(|range| range.len > 0);
            for hidden in kept.fold(copies, |left, kept| subtract(&left, &[*kept])) {
                memfd::punch_hole(file, hidden.start * PAGE, hidden.len * PAGE)?;
            }
        }
        Ok(())
    }
}

impl Plan {
    /// Overwrite, in the memory file, what would make the dynamic linker run constructors.
    fn hide_constructors(&self, file: BorrowedFd<'_>) -> Result<()> {
        self.constructor_tags
            .iter()
            .try_for_each(|place| memfd::write_all(file, &HIDDEN_TAG.to_le_bytes(), *place).map(drop))
    }

    /// `DT_INIT` and `DT_INIT_ARRAY`, as addresses in the object.
    fn constructors(&self) -> (Option<u64>, Range<u64>) {
        (self.init, self.init_array.clone())
    }

    /// What is spent and lies in segments that the dynamic linker only reads, so that a touch would be served.
    fn spent_lazy(&self) -> impl Iterator<Item = Range<u64>> {
        let within = |range: &Range<u64>, segment: &Segment| {
            segment.offset <= range.start && range.end <= segment.offset + segment.file_bytes
        };
        let lazy = move |range: &&Range<u64>| self.lazy_segments().any(|segment| within(range, segment));
        self.spent.iter().filter(lazy).cloned()
    }

    /// What must be there as long as the object is loaded: what is eager and not spent.
    fn kept(&self) -> Vec<Range<u64>> {
        let mut kept = self.eager.clone();
        for spent in self.spent_lazy() {
            let around = |range: Range<u64>| {
                let (start, end) = (spent.start.clamp(range.start, range.end), spent.end.clamp(range.start, range.end));
                [range.start..start, end..range.end]
            };
            kept = kept.into_iter().flat_map(around).filter(|range| range.start < range.end).collect();
        }
        kept
    }

    /// The segments that the dynamic linker only reads.
    pub fn lazy_segments(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|segment| segment.is_lazy())
    }

    /// Ranges of the file, in whole windows, that can be left until they are touched.
    #[must_use]
    pub fn lazy_ranges(&self, window: u64) -> Vec<Range<u64>> {
        let mut left = Vec::new();
        for segment in self.lazy_segments() {
            let (mut at, end) = (segment.offset / PAGE * PAGE, segment.offset + segment.file_bytes);
            for eager in &self.eager {
                let (start, stop) = (eager.start / window * window, eager.end.next_multiple_of(window));
                if stop <= at || start >= end {
                    continue;
                }
                if start > at {
                    left.push(at..start);
                }
                at = at.max(stop);
            }
            if at < end {
                left.push(at..end);
            }
        }
        left
    }

    fn lazy(&self, window: u64) -> u64 {
        self.lazy_ranges(window).iter().map(|range| range.end - range.start).sum()
    }
}

impl Body {
    /// What was read of it, if its constructors are hidden.
    fn hidden(&self) -> Option<&Plan> {
        match self {
            Self::Whole { hidden, .. } => hidden.as_deref(),
            Self::Paged(paged) => Some(&paged.plan),
        }
    }

    fn file(&self) -> BorrowedFd<'_> {
        match self {
            Self::Whole { file, .. } => file.as_fd(),
            Self::Paged(paged) => paged.region.shared_file().expect("a paged library's region is shared"),
        }
    }
}

/// The path by which the dynamic linker opens a file. Not below /proc/self: a debugger that looks for it is another process.
pub(super) fn path_of(file: BorrowedFd<'_>) -> CString {
    CString::new(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())).expect("no NUL in it")
}

/// Move a new file's descriptor until its path is not the name of something that the dynamic linker has loaded.
///
/// It compares names before files, and numbers of descriptors come again that were closed behind our back, as daemons
/// close all.
pub(super) fn unused(mut file: OwnedFd) -> Result<OwnedFd> {
    let mut taken = Vec::new();
    while dl::Handle::find(&path_of(file.as_fd())).is_some() {
        let moved = file.try_clone();
        let moved = moved.map_err(|error| Error::os("fcntl(F_DUPFD_CLOEXEC)", error.raw_os_error().unwrap_or(0)))?;
        taken.push(std::mem::replace(&mut file, moved));
    }
    Ok(file)
}

/// What the file is called in `/proc/PID/maps`: the end of the object's name.
fn label(name: &str) -> CString {
    /// The kernel takes 249 bytes.
    const MOST: usize = 200;
    let start = (name.len().saturating_sub(MOST)..).find(|at| name.is_char_boundary(*at)).unwrap_or(0);
    CString::new(format!("quire:{}", &name[start..]).replace('\0', "")).expect("no NUL is left")
}

/// Read and check an object. A part that cannot be had is told as such, and not as one that is wrong.
fn plan_of(reader: Reader<'_>) -> std::result::Result<Plan, RegionError> {
    let file = object::ReadCache::new(reader);
    let plan = Plan::read(&file);
    match (plan, file.into_inner().failure) {
        (Err(_), Some(failure)) => Err(failure),
        (plan, _) => Ok(plan?),
    }
}

/// Copy all of a source into a file.
fn copy(source: &dyn Source, label: &CStr, crc: Option<u32>) -> std::result::Result<OwnedFd, RegionError> {
    let file = unused(memfd::create(label)?)?;
    let size = source.size();
    memfd::truncate(file.as_fd(), size)?;
    let mut buffer = vec![0; COPY_BYTES.min(size as usize)];
    let mut hasher = crc32fast::Hasher::new();
    for at in (0..size).step_by(COPY_BYTES) {
        let part = &mut buffer[..(size - at).min(COPY_BYTES as u64) as usize];
        source.fill(at, part)?;
        hasher.update(part);
        memfd::write_all(file.as_fd(), part, at)?;
    }
    if crc.is_some_and(|crc| crc != hasher.finalize()) {
        return Err(Failure::new("CRC-32 mismatch", 0).into());
    }
    Ok(file)
}
