//! PE files: programs and libraries of Windows. Addresses are relative to the image base (RVA) unless it is said.

use object::endian::{LittleEndian as LE, U16, U32};
use object::pe::{self, ImageDosHeader, ImageNtHeaders32, ImageNtHeaders64};
use object::read::pe::{
    DataDirectories, ExportTable, ImageNtHeaders, ImageOptionalHeader, ImageThunkData, RelocationBlockIterator,
    SectionTable,
};
use object::{FileKind, Pod, ReadRef};

use super::{Names, Window, malformed};
use crate::Result;

/// A name longer than this is none (the linker of Windows stops at 4096).
const NAME_MAX: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub is_64: bool,
    pub machine: u16,
    pub characteristics: u16,
    pub entry: u32,
    /// Where the image is to be, absolute.
    pub image_base: u64,
    pub section_align: u32,
    pub file_align: u32,
    pub image_size: u32,
    pub headers_size: u32,
    pub subsystem: u16,
    pub dll_characteristics: u16,
    pub stack_reserve: u64,
    pub stack_commit: u64,
    /// (address, size) of each data directory.
    pub directories: Vec<(u32, u32)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    pub name: Vec<u8>,
    pub address: u32,
    pub memory_size: u32,
    pub offset: u32,
    pub file_size: u32,
    pub flags: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Import {
    pub library: Vec<u8>,
    /// None if it is imported by number.
    pub name: Option<Vec<u8>>,
    /// The number, or for a name where to look first.
    pub number: u16,
    /// Which word gets the address.
    pub slot: u64,
    /// Resolved at the first call.
    pub is_delayed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    pub name: Option<Vec<u8>>,
    pub ordinal: u32,
    pub address: u32,
    /// `LIBRARY.NAME` of what it stands for.
    pub forward: Option<Vec<u8>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// Absolute, as the file has it.
    pub start: u64,
    pub end: u64,
    pub index: u64,
    pub zero_fill: u32,
    /// Absolute addresses of the functions that are called for every thread.
    pub callbacks: Vec<u64>,
}

macro_rules! ask {
    ($window:expr, $view:ident => $body:expr) => {
        $window.ask(|data| match FileKind::parse(data) {
            Ok(FileKind::Pe32) => {
                let $view = View::<ImageNtHeaders32, _>::new(data)?;
                $body
            }
            Ok(FileKind::Pe64) => {
                let $view = View::<ImageNtHeaders64, _>::new(data)?;
                $body
            }
            _ => Err(malformed("e_lfanew", "there is no PE header where it points to")),
        })
    };
}

/// # Errors
/// Malformed: a header is cut, or is not that of a PE file; Page, as everywhere here.
pub fn header(window: &Window) -> Result<Header> {
    ask!(window, view => Ok(view.describe()))
}

/// # Errors
/// Malformed: the section table lies outside of the file.
pub fn sections(window: &Window) -> Result<Vec<Section>> {
    ask!(window, view => Ok(view.sections.iter().map(section).collect()))
}

/// Those of the import directory, then those of the delay import directory.
///
/// # Errors
/// Malformed: a table or a name is in no section, or does not end.
pub fn imports(window: &Window) -> Result<Vec<Import>> {
    ask!(window, view => view.imports())
}

/// # Errors
/// Malformed: a table or a name is in no section, or does not end.
pub fn exports(window: &Window) -> Result<Vec<Export>> {
    ask!(window, view => view.exports())
}

/// (address, type) of the places to which the distance from the image base is added; padding left out.
///
/// # Errors
/// Malformed: the directory is in no section, or a block of it is cut.
pub fn relocations(window: &Window) -> Result<Vec<(u32, u16)>> {
    ask!(window, view => view.relocations())
}

/// # Errors
/// Malformed: the directory or the list of callbacks is in no section.
pub fn tls(window: &Window) -> Result<Option<Tls>> {
    ask!(window, view => view.tls())
}

struct View<'d, P: ImageNtHeaders, R: ReadRef<'d>> {
    data: R,
    headers: &'d P,
    directories: DataDirectories<'d>,
    sections: SectionTable<'d>,
}

fn section(header: &pe::ImageSectionHeader) -> Section {
    let name = header.raw_name().to_vec();
    Section {
        name,
        address: header.virtual_address.get(LE),
        memory_size: header.virtual_size.get(LE),
        offset: header.pointer_to_raw_data.get(LE),
        file_size: header.size_of_raw_data.get(LE),
        flags: header.characteristics.get(LE).0,
    }
}

impl<'d, P: ImageNtHeaders, R: ReadRef<'d>> View<'d, P, R> {
    fn new(data: R) -> Result<Self> {
        let dos = ImageDosHeader::parse(data).map_err(|why| malformed("the DOS header", why))?;
        let mut offset = dos.nt_headers_offset().into();
        let (headers, directories) = P::parse(data, &mut offset).map_err(|why| malformed("the PE header", why))?;
        let sections = headers.sections(data, offset).map_err(|why| malformed("NumberOfSections", why))?;
        Ok(Self { data, headers, directories, sections })
    }

    fn describe(&self) -> Header {
        let file = self.headers.file_header();
        let optional = self.headers.optional_header();
        Header {
            is_64: self.headers.is_type_64(),
            machine: file.machine.get(LE).0,
            characteristics: file.characteristics.get(LE).0,
            entry: optional.address_of_entry_point(),
            image_base: optional.image_base(),
            section_align: optional.section_alignment(),
            file_align: optional.file_alignment(),
            image_size: optional.size_of_image(),
            headers_size: optional.size_of_headers(),
            subsystem: optional.subsystem().0,
            dll_characteristics: optional.dll_characteristics().0,
            stack_reserve: optional.size_of_stack_reserve(),
            stack_commit: optional.size_of_stack_commit(),
            directories: self.directories.iter().map(pe::ImageDataDirectory::address_range).collect(),
        }
    }

    fn directory(&self, index: usize) -> Option<(u32, u32)> {
        let (address, size) = self.directories.get(index)?.address_range();
        (address != 0).then_some((address, size))
    }

    /// What the file has from an address on, to the end of its section.
    fn at(&self, address: u32, field: &str) -> Result<&'d [u8]> {
        for header in self.sections.iter() {
            let Section { address: start, memory_size, offset, file_size, .. } = section(header);
            // Old linkers leave the size in memory out.
            let size = if memory_size == 0 { file_size } else { memory_size.min(file_size) };
            let Some(inside) = address.checked_sub(start).filter(|inside| *inside < size) else { continue };
            // The whole section, so that the next address in it is read from what is kept.
            let bytes = self.data.read_bytes_at(offset.into(), size.into()).map_err(|()| {
                malformed(field, format_args!("its section at {start:#x} ends past the end of the file"))
            })?;
            return Ok(&bytes[inside as usize..]);
        }
        let headers = self.headers.optional_header().size_of_headers();
        if address < headers {
            let bytes = self.data.read_bytes_at(address.into(), (headers - address).into());
            return bytes.map_err(|()| malformed(field, "SizeOfHeaders is past the end of the file"));
        }
        Err(malformed(field, format_args!("{address:#x} is in no section")))
    }

    fn one_at<T: Pod>(&self, address: u32, field: &str) -> Result<&'d T> {
        let bytes = self.at(address, field)?;
        object::pod::from_bytes(bytes)
            .map(|(found, _)| found)
            .map_err(|()| malformed(field, format_args!("it is cut at the end of its section, {address:#x}")))
    }

    fn name_at(&self, address: u32, names: &mut Names, field: &str) -> Result<Vec<u8>> {
        let bytes = self.at(address, field)?;
        let end = bytes.iter().take(NAME_MAX).position(|byte| *byte == 0);
        let end = end.ok_or_else(|| malformed(field, format_args!("the name at {address:#x} does not end")))?;
        names.take(&bytes[..end], field)
    }

    fn imports(&self) -> Result<Vec<Import>> {
        let mut found = Vec::new();
        let mut names = Names::of(self.data);
        if let Some((address, _)) = self.directory(pe::IMAGE_DIRECTORY_ENTRY_IMPORT) {
            let field = "the import directory";
            for index in 0u32.. {
                let at = step(address, index, size_of::<pe::ImageImportDescriptor>(), field)?;
                let entry: &pe::ImageImportDescriptor = self.one_at(at, field)?;
                // The loader of Windows stops where there is no name or no address table.
                if entry.name.get(LE) == 0 || entry.first_thunk.get(LE) == 0 {
                    break;
                }
                let library = self.name_at(entry.name.get(LE), &mut names, field)?;
                let slots = entry.first_thunk.get(LE);
                let lookup = entry.original_first_thunk.get(LE);
                let lookup = if lookup == 0 { slots } else { lookup };
                self.thunks(&library, lookup, slots, false, &mut names, &mut found)?;
            }
        }
        if let Some((address, _)) = self.directory(pe::IMAGE_DIRECTORY_ENTRY_DELAY_IMPORT) {
            let field = "the delay import directory";
            for index in 0u32.. {
                let at = step(address, index, size_of::<pe::ImageDelayloadDescriptor>(), field)?;
                let entry: &pe::ImageDelayloadDescriptor = self.one_at(at, field)?;
                if entry.dll_name_rva.get(LE) == 0 {
                    break;
                }
                if entry.attributes.get(LE) & 1 == 0 {
                    return Err(malformed(field, "it has absolute addresses, as only Visual C++ 6 wrote them"));
                }
                let library = self.name_at(entry.dll_name_rva.get(LE), &mut names, field)?;
                let lookup = entry.import_name_table_rva.get(LE);
                let slots = entry.import_address_table_rva.get(LE);
                self.thunks(&library, lookup, slots, true, &mut names, &mut found)?;
            }
        }
        Ok(found)
    }

    fn thunks(
        &self,
        library: &[u8],
        lookup: u32,
        slots: u32,
        is_delayed: bool,
        names: &mut Names,
        into: &mut Vec<Import>,
    ) -> Result<()> {
        let field = "an import lookup table";
        let word = size_of::<P::ImageThunkData>();
        let mut rest = self.at(lookup, field)?;
        for index in 0.. {
            let (thunk, behind): (&P::ImageThunkData, _) =
                object::pod::from_bytes(rest).map_err(|()| malformed(field, "it does not end"))?;
            rest = behind;
            let thunk = *thunk;
            if thunk.raw() == 0 {
                break;
            }
            let slot = u64::from(slots) + index * word as u64;
            let library = names.take(library, field)?;
            into.push(if thunk.is_ordinal() {
                Import { library, name: None, number: thunk.ordinal(), slot, is_delayed }
            } else {
                let at = thunk.address();
                let hint: &U16<LE> = self.one_at(at, field)?;
                let name = self.name_at(step(at, 1, 2, field)?, names, field)?;
                Import { library, name: Some(name), number: hint.get(LE), slot, is_delayed }
            });
        }
        Ok(())
    }

    fn exports(&self) -> Result<Vec<Export>> {
        let field = "the export directory";
        let Some((address, size)) = self.directory(pe::IMAGE_DIRECTORY_ENTRY_EXPORT) else { return Ok(Vec::new()) };
        let bytes = self.at(address, field)?;
        let bytes =
            bytes.get(..size as usize).ok_or_else(|| malformed(field, "its size is past the end of the section"))?;
        let table = ExportTable::parse(bytes, address).map_err(|why| malformed(field, why))?;
        let mut names = Names::of(self.data);
        let base = u32::from(table.ordinal_base());
        let addresses: &[U32<LE>] = table.addresses();
        let mut has_name = vec![false; addresses.len()];
        let mut found = Vec::new();
        for (pointer, index) in table.name_iter() {
            let name = self.name_at(pointer, &mut names, "AddressOfNames")?;
            let at = addresses.get(usize::from(index.0)).ok_or_else(|| {
                malformed("AddressOfNameOrdinals", format_args!("{} is none of the exports", index.0))
            })?;
            has_name[usize::from(index.0)] = true;
            let ordinal = base + u32::from(index.0);
            found.push(self.export(&table, Some(name), ordinal, at.get(LE), &mut names)?);
        }
        for (index, at) in addresses.iter().enumerate() {
            if !has_name[index] && at.get(LE) != 0 {
                found.push(self.export(&table, None, base + index as u32, at.get(LE), &mut names)?);
            }
        }
        Ok(found)
    }

    fn export(
        &self,
        table: &ExportTable<'d>,
        name: Option<Vec<u8>>,
        ordinal: u32,
        address: u32,
        names: &mut Names,
    ) -> Result<Export> {
        let field = "AddressOfFunctions";
        let forward = table.forward_string(address).map_err(|why| malformed(field, why))?;
        let forward = forward.map(|text| names.take(text, field)).transpose()?;
        Ok(Export { name, ordinal, address, forward })
    }

    fn relocations(&self) -> Result<Vec<(u32, u16)>> {
        let field = "the base relocation directory";
        let Some((address, size)) = self.directory(pe::IMAGE_DIRECTORY_ENTRY_BASERELOC) else { return Ok(Vec::new()) };
        if size == 0 {
            return Ok(Vec::new());
        }
        let bytes = self.at(address, field)?;
        let bytes =
            bytes.get(..size as usize).ok_or_else(|| malformed(field, "its size is past the end of the section"))?;
        let mut blocks = RelocationBlockIterator::new(bytes);
        let mut found = Vec::new();
        while let Some(block) = blocks.next().map_err(|why| malformed(field, why))? {
            found.extend(block.map(|each| (each.virtual_address, each.typ.0)).filter(|(_, kind)| *kind != 0));
        }
        Ok(found)
    }

    fn tls(&self) -> Result<Option<Tls>> {
        let field = "the TLS directory";
        let Some((address, _)) = self.directory(pe::IMAGE_DIRECTORY_ENTRY_TLS) else { return Ok(None) };
        let base = self.headers.optional_header().image_base();
        let (start, end, index, list, zero_fill);
        if self.headers.is_type_64() {
            let found: &pe::ImageTlsDirectory64 = self.one_at(address, field)?;
            (start, end) = (found.start_address_of_raw_data.get(LE), found.end_address_of_raw_data.get(LE));
            (index, list) = (found.address_of_index.get(LE), found.address_of_call_backs.get(LE));
            zero_fill = found.size_of_zero_fill.get(LE);
        } else {
            let found: &pe::ImageTlsDirectory32 = self.one_at(address, field)?;
            (start, end) =
                (found.start_address_of_raw_data.get(LE).into(), found.end_address_of_raw_data.get(LE).into());
            (index, list) = (found.address_of_index.get(LE).into(), found.address_of_call_backs.get(LE).into());
            zero_fill = found.size_of_zero_fill.get(LE);
        }
        let mut callbacks = Vec::new();
        if list != 0 {
            let field = "AddressOfCallBacks";
            let inside = list.checked_sub(base).and_then(|inside| u32::try_from(inside).ok());
            let inside = inside.ok_or_else(|| malformed(field, format_args!("{list:#x} is not in the image")))?;
            let mut rest = self.at(inside, field)?;
            loop {
                let (found, behind): (&P::ImageThunkData, _) =
                    object::pod::from_bytes(rest).map_err(|()| malformed(field, "the list does not end"))?;
                rest = behind;
                match found.raw() {
                    0 => break,
                    callback => callbacks.push(callback),
                }
            }
        }
        Ok(Some(Tls { start, end, index, zero_fill, callbacks }))
    }
}

fn step(address: u32, count: u32, each: usize, field: &str) -> Result<u32> {
    u32::try_from(u64::from(address) + u64::from(count) * each as u64)
        .map_err(|_| malformed(field, "its address overflows"))
}
