//! The module `quire._native`: a thin binding of `quire-core`. No logic lives here.

mod calls;
mod digest;
mod door;
mod errors;
mod image;
mod lent;
mod library;
mod live;
mod mapping;
mod pack;
mod probe;
mod procmaps;
mod purgeable;
mod region;
mod remote;
mod segment;
mod snapshot;
mod source;

use pyo3::prelude::*;

#[global_allocator]
static ALLOCATOR: quire_core::sys::alloc::Large = quire_core::sys::alloc::Large;

#[pymodule(gil_used = true)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    quire_core::forking::install().map_err(errors::Raised::from)?;
    module.add("PAGE_SIZE", quire_core::PAGE)?;
    module.add("MAX_LAYERS", quire_core::MAX_LAYERS)?;
    module.add_class::<snapshot::Snapshot>()?;
    module.add_class::<segment::Segment>()?;
    module.add_class::<mapping::Mapping>()?;
    module.add_class::<library::Library>()?;
    module.add_class::<lent::Lent>()?;
    module.add_class::<library::Group>()?;
    module.add_class::<live::LiveSegment>()?;
    module.add_class::<live::WritableAlias>()?;
    module.add_class::<live::MirrorView>()?;
    module.add_class::<source::Source>()?;
    module.add_class::<pack::FrameEncoder>()?;
    module.add_class::<purgeable::Purgeable>()?;
    module.add_class::<purgeable::PurgeableStore>()?;
    module.add_class::<purgeable::PurgeableEntry>()?;
    module.add_class::<image::elf::ElfFile>()?;
    module.add_class::<image::pe::PeFile>()?;
    module.add_class::<image::macho::MachOFile>()?;
    module.add_function(wrap_pyfunction!(image::macho::macho_members, module)?)?;
    module.add_function(wrap_pyfunction!(image::elf::elf_name, module)?)?;
    module.add_function(wrap_pyfunction!(digest::digest, module)?)?;
    module.add_function(wrap_pyfunction!(library::is_loaded, module)?)?;
    module.add_function(wrap_pyfunction!(purgeable::available_bytes, module)?)?;
    module.add_class::<region::Region>()?;
    module.add_function(wrap_pyfunction!(region::region_file, module)?)?;
    module.add_function(wrap_pyfunction!(region::remember_touched, module)?)?;
    module.add_function(wrap_pyfunction!(probe::probe, module)?)?;
    module.add_function(wrap_pyfunction!(procmaps::read_maps, module)?)?;
    module.add_function(wrap_pyfunction!(remote::program_source, module)?)?;
    module.add_function(wrap_pyfunction!(remote::zygote_source, module)?)?;
    module.add_function(wrap_pyfunction!(calls::spawn_calls, module)?)?;
    module.add_function(wrap_pyfunction!(calls::calls_code_address, module)?)?;
    Ok(())
}
