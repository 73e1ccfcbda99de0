//! Shared objects that are linked in one step, because they need each other or count on being loaded together.

use std::ffi::{CString, c_int};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use super::library::{Library, OpenError, path_of, unused};
use super::root;
use crate::sys::{dl, memfd};
use crate::{Error, Result};

/// What of a mode is about linking.
const LINKING: c_int = libc::RTLD_LAZY | libc::RTLD_NOW | libc::RTLD_DEEPBIND;

/// Objects that are loaded and unloaded together.
pub struct Group {
    members: Vec<Arc<Library>>,
    /// What has them linked, and keeps them in each other's sight. None once it is closed.
    root: Mutex<Option<Root>>,
}

struct Root {
    file: OwnedFd,
    path: CString,
    handle: dl::Handle,
}

impl Group {
    /// Have the dynamic linker load objects in one step, then run their constructors.
    ///
    /// The objects were prepared for being linked together: none has constructors that the dynamic linker sees. `needed`
    /// are the names in the order in which symbols are looked up: the paths of the members, and what else comes between
    /// them. `order` is that of the constructors: places in `members`, each once. Of `mode` only what is about linking
    /// matters; `Library::open` does the rest.
    ///
    /// # Errors
    /// What the dynamic linker says: nothing was loaded then, and each member is as it was. That filling failed: all are
    /// closed then, and no constructor has run.
    pub fn link(
        members: Vec<Arc<Library>>,
        needed: &[CString],
        order: &[usize],
        mode: c_int,
    ) -> std::result::Result<Self, OpenError> {
        check(&members, order)?;
        let root = Root::open(needed, mode & LINKING)?;
        let group = Self { members, root: Mutex::new(Some(root)) };
        // References to each would change the order of destructors; `Library::open` takes one when it is asked to.
        group.members.iter().for_each(|member| member.note_loaded());
        if let Err(error) = group.attach() {
            group.close().map_err(OpenError::Linker)?;
            return Err(error);
        }
        for place in order {
            group.members[*place].construct()?;
        }
        Ok(group)
    }

    /// Have what is touched of the members filled from now on.
    fn attach(&self) -> std::result::Result<(), OpenError> {
        // All of them, even if one fails: destructors run when they are closed.
        let outcomes: Vec<_> = self.members.iter().map(|member| member.attach()).collect();
        outcomes.into_iter().collect()
    }

    /// Give the references to all members back. True if all were unloaded.
    ///
    /// # Errors
    /// What the dynamic linker says.
    pub fn close(&self) -> std::result::Result<bool, String> {
        let Some(root) = self.root.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(true) };
        for member in &self.members {
            member.let_go()?;
        }
        // The last reference to all of them, so that the dynamic linker chooses the order of destructors.
        root.close()?;
        let gone: Vec<_> = self.members.iter().map(|member| member.settle()).collect();
        Ok(!gone.contains(&false))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Still loaded: the name stays taken, up to the process's end.
        if let Some(root) = self.root.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            std::mem::forget(root.file);
        }
    }
}

fn check(members: &[Arc<Library>], order: &[usize]) -> Result<()> {
    let mut places = order.to_vec();
    places.sort_unstable();
    if !places.iter().copied().eq(0..members.len()) {
        return Err(Error::Invalid("the order of constructors has to have each object once".to_owned()));
    }
    match members.iter().find(|member| !member.is_ready_for_a_group()) {
        Some(member) => Err(Error::Invalid(format!("{:?} was not prepared for a group", member.path()))),
        None => Ok(()),
    }
}

impl Root {
    fn open(needed: &[CString], mode: c_int) -> std::result::Result<Self, OpenError> {
        let file = Self::file(needed)?;
        let path = path_of(file.as_fd());
        let handle = dl::Handle::open(&path, mode).map_err(OpenError::Linker)?;
        Ok(Self { file, path, handle })
    }

    fn file(needed: &[CString]) -> Result<OwnedFd> {
        let file = unused(memfd::create(c"quire:group")?)?;
        memfd::write_all(file.as_fd(), &root::object(needed), 0)?;
        memfd::add_seals(file.as_fd(), memfd::SEALS_IMMUTABLE)?;
        Ok(file)
    }

    fn close(self) -> std::result::Result<(), String> {
        self.handle.close()?;
        if dl::Handle::find(&self.path).is_some() {
            // The name stays taken.
            std::mem::forget(self.file);
        }
        Ok(())
    }
}
