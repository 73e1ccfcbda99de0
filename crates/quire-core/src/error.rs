//! One error type, sorted by whose fault it is; the binding turns each variant into a Python exception.

use std::fmt;

use crate::source::Failure;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, Clone)]
pub enum Error {
    /// A descriptor whose content the kernel does not guarantee to be immutable.
    NotImmutable(String),
    /// Bytes from outside that do not follow docs/formats.md.
    Malformed(String),
    /// A source could not give bytes.
    Page(Failure),
    /// An operation that a forked child cannot do.
    Forked(&'static str),
    /// The kernel or its settings lack something.
    Unsupported(String),
    /// Plain misuse.
    Invalid(String),
    /// Views are exported, so the memory cannot go away.
    Exported(String),
    /// Not enough memory or address space.
    Memory(String),
    /// A system call failed.
    Os { call: &'static str, errno: i32, hint: String },
}

impl Error {
    /// The last system call's failure.
    #[must_use]
    pub fn last_os(call: &'static str) -> Self {
        Self::os(call, std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    }

    #[must_use]
    pub fn os(call: &'static str, errno: i32) -> Self {
        let hint = match errno {
            libc::EFBIG => "files may not be as large in this process: raise RLIMIT_FSIZE (ulimit -f)".to_owned(),
            libc::ENOSPC => "no memory is left for this file".to_owned(),
            libc::EMFILE => {
                "this process has too many open descriptors: raise RLIMIT_NOFILE or close snapshots".to_owned()
            }
            _ => String::new(),
        };
        Self::Os { call, errno, hint }
    }

    #[must_use]
    pub fn hinted(self, text: &str) -> Self {
        match self {
            Self::Os { call, errno, .. } => Self::Os { call, errno, hint: text.to_owned() },
            other => other,
        }
    }

    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Os { errno, .. } => *errno,
            _ => 0,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotImmutable(text)
            | Self::Malformed(text)
            | Self::Unsupported(text)
            | Self::Invalid(text)
            | Self::Exported(text)
            | Self::Memory(text) => f.write_str(text),
            Self::Page(failure) => failure.fmt(f),
            Self::Forked(call) => {
                write!(
                    f,
                    "{call}: this process was forked and holds a private copy; only the process that made the object can do this"
                )
            }
            Self::Os { call, errno, hint } => {
                write!(f, "{call}: {}", std::io::Error::from_raw_os_error(*errno))?;
                if hint.is_empty() { Ok(()) } else { write!(f, " ({hint})") }
            }
        }
    }
}

impl std::error::Error for Error {}
