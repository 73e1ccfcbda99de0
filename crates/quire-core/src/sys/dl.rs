//! The dynamic linker: opening objects, finding where they are, running their constructors.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicI32, AtomicPtr, Ordering};

/// An object that the dynamic linker has; counted there.
#[derive(Debug, Clone, Copy)]
pub struct Handle(*mut c_void);

// SAFETY: a handle is a name for the dynamic linker, which takes it from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above; nothing can be changed through it without the dynamic linker's own lock.
unsafe impl Sync for Handle {}

/// What the dynamic linker says of its last failure in this thread.
fn error() -> String {
    // SAFETY: dlerror returns null or a string that stays until the thread's next call.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "the dynamic linker gave no reason".to_owned();
    }
    // SAFETY: just checked; copied at once.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

impl Handle {
    /// Open an object by its path. Its constructors run inside, and those of what it needs.
    pub fn open(path: &CStr, mode: c_int) -> Result<Self, String> {
        // SAFETY: the path is a C string. Running the code of an object is what the caller asks for.
        let handle = unsafe { libc::dlopen(path.as_ptr(), mode) };
        if handle.is_null() { Err(error()) } else { Ok(Self(handle)) }
    }

    /// An object that is loaded already and goes by this name; nothing is counted.
    #[must_use]
    pub fn find(name: &CStr) -> Option<Self> {
        // SAFETY: as above; with RTLD_NOLOAD nothing is loaded.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_LAZY) };
        if handle.is_null() {
            return None;
        }
        // SAFETY: the reference just taken is given back; whoever loaded the object still holds theirs.
        unsafe { libc::dlclose(handle) };
        Some(Self(handle))
    }

    /// Give the reference back. The last one runs destructors and unmaps the object.
    pub fn close(self) -> Result<(), String> {
        // SAFETY: the handle came from dlopen, and its owner gives it back once.
        if unsafe { libc::dlclose(self.0) } == 0 { Ok(()) } else { Err(error()) }
    }

    #[must_use]
    pub fn address(self) -> usize {
        self.0 as usize
    }

    /// What was added to the addresses that the object's headers have.
    pub fn bias(self) -> Result<usize, String> {
        /// The public head of the dynamic linker's `struct link_map`.
        #[repr(C)]
        struct LinkMap {
            bias: usize,
            name: *const c_char,
            dynamic: *const c_void,
        }
        let mut map: *const LinkMap = std::ptr::null();
        // SAFETY: RTLD_DI_LINKMAP stores a pointer, for which there is room.
        let rc = unsafe { libc::dlinfo(self.0, libc::RTLD_DI_LINKMAP, (&raw mut map).cast()) };
        if rc != 0 || map.is_null() {
            return Err(error());
        }
        // SAFETY: the map lives as long as the object, to which the handle holds a reference.
        Ok(unsafe { (*map).bias })
    }
}

/// What was added to the addresses of the object that has this path, if there is one.
#[must_use]
pub fn bias_of(path: &CStr) -> Option<usize> {
    struct Search<'a> {
        path: &'a CStr,
        found: Option<usize>,
    }
    unsafe extern "C" fn look(info: *mut libc::dl_phdr_info, _size: usize, search: *mut c_void) -> c_int {
        // SAFETY: both pointers are those of the call below: the dynamic linker's, and the search that it was given.
        let (info, search) = unsafe { (&*info, &mut *search.cast::<Search<'_>>()) };
        // SAFETY: names are null or strings that stay while the dynamic linker calls.
        if !info.dlpi_name.is_null() && unsafe { CStr::from_ptr(info.dlpi_name) } == search.path {
            search.found = Some(info.dlpi_addr as usize);
        }
        c_int::from(search.found.is_some())
    }
    let mut search = Search { path, found: None };
    // SAFETY: the function only reads what it is given, and the search outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut search).cast()) };
    search.found
}

static ARGC: AtomicI32 = AtomicI32::new(0);
static ARGV: AtomicPtr<*mut c_char> = AtomicPtr::new(std::ptr::null_mut());

extern "C" fn note_arguments(argc: c_int, argv: *mut *mut c_char, _envp: *mut *mut c_char) {
    ARGC.store(argc, Ordering::Relaxed);
    ARGV.store(argv, Ordering::Relaxed);
}

/// glibc calls constructors with the arguments of `main`; being one is the way to know them.
#[used]
// SAFETY: glibc calls what stands in this section with these three arguments, once, when this object is loaded.
#[unsafe(link_section = ".init_array")]
static NOTE_ARGUMENTS: extern "C" fn(c_int, *mut *mut c_char, *mut *mut c_char) = note_arguments;

type Constructor = extern "C" fn(c_int, *mut *mut c_char, *mut *mut c_char);

/// Run the constructors of an object as the dynamic linker would: `DT_INIT`, then those of `DT_INIT_ARRAY` in order.
///
/// # Safety
/// `init` is the address of a constructor, and `array` of as many pointers to constructors as `count` says, of an object
/// that is loaded and linked and whose constructors have not run.
pub unsafe fn construct(init: Option<usize>, array: usize, count: usize) {
    unsafe extern "C" {
        static mut environ: *mut *mut c_char;
    }
    let call = |address: usize| {
        // SAFETY: the caller promises that it is a constructor.
        let constructor = unsafe { std::mem::transmute::<usize, Constructor>(address) };
        // SAFETY: libc's own variable, read as libc reads it.
        let environment = unsafe { environ };
        constructor(ARGC.load(Ordering::Relaxed), ARGV.load(Ordering::Relaxed), environment);
    };
    if let Some(address) = init {
        call(address);
    }
    for place in 0..count {
        // SAFETY: the caller promises an array of that length; a constructor may have changed what follows.
        call(unsafe { (array as *const usize).add(place).read_volatile() });
    }
}
