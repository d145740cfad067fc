//! A file mapped by several processes of one host. It has its whole size, and the system has set the
//! memory aside, before its name can be seen: nobody who opens one touches a page that is not there.
#![allow(unsafe_code)]

use std::{
    fs::{File, OpenOptions},
    io::ErrorKind,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    ptr::{self, NonNull},
    sync::{Mutex, PoisonError, atomic::AtomicU8, atomic::AtomicU32, atomic::AtomicU64},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{FlockOperation, OFlags, flock},
    io::Errno,
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

use crate::error::CollectiveError;

/// Memory shared with other processes, all zeros in the beginning. What is in it, and who may write
/// where at what time, is agreed between those who map it.
#[derive(Debug)]
pub struct Segment {
    pointer: NonNull<u8>,
    bytes: usize,
    owned: Mutex<Option<Owned>>,
}

/// What whoever made the segment keeps: the name, and a lock that says that it is still alive.
#[derive(Debug)]
struct Owned {
    path: PathBuf,
    _lock: File,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is not moved until it is dropped.
unsafe impl Send for Segment {}
// SAFETY: a shared reference gives the address and the length away, nothing that is behind them.
unsafe impl Sync for Segment {}

impl Segment {
    /// The folder for segments: memory where the system has a folder for that, else the one for
    /// temporary files.
    pub fn folder() -> PathBuf {
        let memory = Path::new("/dev/shm");
        match cfg!(target_os = "linux") && memory.is_dir() {
            true => memory.to_owned(),
            false => std::env::temp_dir(),
        }
    }

    /// Makes a segment of `bytes` bytes that only this user can open. The name is taken back by
    /// [`unlink`](Self::unlink), or when the segment is dropped.
    ///
    /// # Errors
    /// [`CollectiveError::Local`] when there is something of that name, or no memory for it.
    pub fn create(path: &Path, bytes: usize) -> Result<Self, CollectiveError> {
        let failed = |why: &dyn std::fmt::Display| {
            CollectiveError::local(CREATING, format!("{}: {why}", path.display()))
        };
        let folder = path.parent().unwrap_or(Path::new("."));
        // Only its owner may read and write a temporary file.
        let unnamed = tempfile::NamedTempFile::new_in(folder).map_err(|why| failed(&why))?;
        reserve(unnamed.as_file(), bytes).map_err(|why| {
            failed(&format!(
                "{bytes} bytes cannot be set aside ({why}); make room there"
            ))
        })?;
        let lock = FlockOperation::NonBlockingLockExclusive;
        flock(unnamed.as_file(), lock).map_err(|why| failed(&why))?;
        let pointer = map(unnamed.as_file(), bytes).map_err(|why| failed(&why))?;
        // From here on the mapping is taken back whatever happens.
        let segment = Self {
            pointer,
            bytes,
            owned: Mutex::new(None),
        };
        let file = unnamed
            .persist_noclobber(path)
            .map_err(|why| match why.error.kind() {
                ErrorKind::AlreadyExists => failed(
                    &"there is one already: remove it if nobody uses it, or take another name",
                ),
                _ => failed(&why.error),
            })?;
        *segment.owned.lock().unwrap_or_else(PoisonError::into_inner) = Some(Owned {
            path: path.to_owned(),
            _lock: file,
        });
        Ok(segment)
    }

    /// Opens a segment of `bytes` bytes, and waits up to `wait` for somebody to make it.
    ///
    /// # Errors
    /// [`CollectiveError::Local`] when there is none in time, when it has another size, when it
    /// belongs to another user, or when the process that made it has ended.
    pub fn open(path: &Path, bytes: usize, wait: Duration) -> Result<Self, CollectiveError> {
        let start = Instant::now();
        loop {
            if let Some(segment) = Self::try_open(path, bytes)? {
                return Ok(segment);
            }
            if start.elapsed() >= wait {
                let why = format!("{}: nobody made it within {wait:?}", path.display());
                return Err(CollectiveError::local(OPENING, why));
            }
            thread::sleep(LOOK_AGAIN_AFTER.min(wait));
        }
    }

    /// As [`open`](Self::open), but when there is none yet that is no error.
    pub(super) fn try_open(path: &Path, bytes: usize) -> Result<Option<Self>, CollectiveError> {
        let failed = |why: &dyn std::fmt::Display| {
            CollectiveError::local(OPENING, format!("{}: {why}", path.display()))
        };
        let flags = (OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK).bits();
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        options.custom_flags(flags.cast_signed());
        let file = match options.open(path) {
            Ok(file) => file,
            Err(why) if why.kind() == ErrorKind::NotFound => return Ok(None),
            Err(why) => return Err(failed(&why)),
        };
        let found = file.metadata().map_err(|why| failed(&why))?;
        if !found.is_file() || found.uid() != rustix::process::geteuid().as_raw() {
            return Err(failed(&"it is no file of this user: take another name"));
        }
        if found.len() != bytes as u64 {
            return Err(failed(&format!(
                "it has {} bytes and not {bytes}: it belongs to another group or version, remove it",
                found.len()
            )));
        }
        // Whoever made it holds the lock for as long as it lives.
        if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
            return Err(failed(
                &"it is left over, the process that made it has ended: remove it",
            ));
        }
        let pointer = map(&file, bytes).map_err(|why| failed(&why))?;
        Ok(Some(Self {
            pointer,
            bytes,
            owned: Mutex::new(None),
        }))
    }

    /// Takes the name back, so that nothing is left over however this process ends; those who have
    /// opened the segment keep it. Does nothing for those who did not make it.
    pub fn unlink(&self) {
        let mut owned = self.owned.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(owned) = owned.take() {
            // Somebody else may have removed the file; then there is nothing left to do.
            let _ = std::fs::remove_file(&owned.path);
        }
    }

    /// Where the segment begins in this process, at the beginning of a page. Valid until the
    /// segment is dropped.
    pub fn pointer(&self) -> *mut u8 {
        self.pointer.as_ptr()
    }

    /// The four bytes at `at`, a multiple of 4, as a word that processes share.
    pub(super) fn word(&self, at: usize) -> &AtomicU32 {
        // SAFETY: in bounds and aligned, see `place`; whoever uses a word does so through atomics.
        unsafe { AtomicU32::from_ptr(self.place(at, 4).cast()) }
    }

    /// The eight bytes at `at`, a multiple of 8, as a counter that processes share.
    pub(super) fn counter(&self, at: usize) -> &AtomicU64 {
        // SAFETY: as in `word`.
        unsafe { AtomicU64::from_ptr(self.place(at, 8).cast()) }
    }

    /// The byte at `at`, for text that processes share.
    pub(super) fn letter(&self, at: usize) -> &AtomicU8 {
        // SAFETY: as in `word`.
        unsafe { AtomicU8::from_ptr(self.place(at, 1)) }
    }

    /// Where `bytes` bytes at `at` are, after a look whether they are there and aligned.
    fn place(&self, at: usize, bytes: usize) -> *mut u8 {
        let inside = at.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        assert!(inside && at.is_multiple_of(bytes), "no place in a segment");
        // SAFETY: within the mapping, which begins at a page.
        unsafe { self.pointer.as_ptr().add(at) }
    }

    /// How many bytes there are.
    #[expect(clippy::len_without_is_empty, reason = "no segment is empty")]
    pub fn len(&self) -> usize {
        self.bytes
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        self.unlink();
        // SAFETY: mapped by us with this length, and nobody has the address any more, as `pointer`
        // says. Unmapping what is mapped does not fail.
        let _ = unsafe { munmap(self.pointer.as_ptr().cast(), self.bytes) };
    }
}

/// Gives an empty file its size. On Linux the pages too: where memory is short that is an error
/// here, and would be a signal later.
fn reserve(file: &File, bytes: usize) -> std::io::Result<()> {
    if bytes == 0 {
        return Err(ErrorKind::InvalidInput.into());
    }
    file.set_len(bytes as u64)?;
    #[cfg(target_os = "linux")]
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes as u64) {
        // A file system that cannot say beforehand.
        Ok(()) | Err(Errno::OPNOTSUPP) => {}
        Err(why) => return Err(why.into()),
    }
    Ok(())
}

fn map(file: &File, bytes: usize) -> Result<NonNull<u8>, Errno> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the system chooses a place where nothing is; the file has this size and keeps it, as
    // nothing here ever changes the size of a file that has a name.
    let pointer = unsafe {
        mmap(
            ptr::null_mut(),
            bytes,
            protection,
            MapFlags::SHARED,
            file,
            0,
        )?
    };
    NonNull::new(pointer.cast()).ok_or(Errno::NOMEM)
}

const CREATING: &str = "making a shared memory segment";
const OPENING: &str = "opening a shared memory segment";

/// Opening is rare, and who waits for it waits for a process to start.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const PAGES: usize = 3 * 4096;

    fn new_path() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir_in(Segment::folder()).unwrap();
        let path = folder.path().join("segment");
        (folder, path)
    }

    fn read(segment: &Segment, at: usize) -> u8 {
        assert!(at < segment.len());
        // SAFETY: within the mapping, and a test reads and writes on one thread.
        unsafe { segment.pointer().add(at).read_volatile() }
    }

    fn write(segment: &Segment, at: usize, byte: u8) {
        assert!(at < segment.len());
        // SAFETY: as in `read`.
        unsafe { segment.pointer().add(at).write_volatile(byte) };
    }

    #[test]
    fn what_one_writes_the_other_reads() {
        let (_folder, path) = new_path();
        let made = Segment::create(&path, PAGES).unwrap();
        let opened = Segment::open(&path, PAGES, Duration::ZERO).unwrap();
        assert_eq!((made.len(), opened.len()), (PAGES, PAGES));
        assert_eq!(read(&opened, PAGES - 1), 0);
        write(&made, PAGES - 1, 7);
        assert_eq!(read(&opened, PAGES - 1), 7);
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn the_name_goes_and_the_memory_stays() {
        let (folder, path) = new_path();
        let made = Segment::create(&path, PAGES).unwrap();
        let opened = Segment::open(&path, PAGES, Duration::ZERO).unwrap();
        made.unlink();
        assert!(!path.exists());
        write(&made, 0, 9);
        drop(made);
        assert_eq!(read(&opened, 0), 9);
        drop(Segment::create(&path, PAGES).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn who_comes_first_waits() {
        let (_folder, path) = new_path();
        let waiting = thread::spawn({
            let path = path.clone();
            move || {
                let opened = Segment::open(&path, PAGES, Duration::from_secs(60));
                opened.map(|segment| segment.len())
            }
        });
        let _made = Segment::create(&path, PAGES).unwrap();
        assert_eq!(waiting.join().unwrap(), Ok(PAGES));
    }

    #[test]
    fn what_does_not_fit_is_an_error_that_says_so() {
        let (_folder, path) = new_path();
        let open = |bytes| Segment::open(&path, bytes, Duration::from_millis(5));
        let error = |opened: Result<Segment, CollectiveError>| opened.unwrap_err().to_string();
        assert!(error(open(PAGES)).contains("nobody made it within 5ms"));

        let made = Segment::create(&path, PAGES).unwrap();
        assert!(error(open(PAGES + 1)).contains("12288 bytes and not 12289"));
        let twice = Segment::create(&path, PAGES);
        assert!(error(twice).contains("there is one already"));
        // The one that was there is as it was.
        assert!(open(PAGES).is_ok());
        drop(made);

        // What is left when a process is killed: a file that nobody holds.
        std::fs::write(&path, [0; PAGES]).unwrap();
        assert!(error(open(PAGES)).contains("left over"));
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        open(PAGES).unwrap_err();
        assert!(error(Segment::create(&path, 0)).contains("cannot be set aside"));
    }
}
