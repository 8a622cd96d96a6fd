//! Files that are either absent or complete.
//!
//! A process may be killed, or a machine lose power, between any two instructions. What is written here goes to a temporary
//! name in the same directory, is forced to the disk, and takes its final name in one step; the directory is forced too,
//! because on many file systems a rename that is not can be forgotten after a crash.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use tempfile::NamedTempFile;

/// Creates or replaces the file at `path` with what `fill` writes.
///
/// On any error, `fill`'s own included, the old file (if any) is untouched and the temporary one is removed.
pub fn write(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let temporary = temporary_beside(path)?;
    let mut buffered = BufWriter::with_capacity(1 << 20, temporary.as_file());
    fill(&mut buffered)?;
    buffered.flush()?;
    drop(buffered);
    temporary.as_file().sync_all()?;
    temporary.persist(path).map_err(|error| error.error)?;
    sync_dir(parent(path))
}

/// The same for a `fill` that wants the name of a file: it creates or replaces the file at the path it is given.
pub fn write_named(path: &Path, fill: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let temporary = temporary_beside(path)?;
    // `fill` may put a file of its own in the place of ours, one that shuts others out.
    let permissions = temporary.as_file().metadata()?.permissions();
    let temporary = temporary.into_temp_path();

    fill(&temporary)?;
    let filled = OpenOptions::new().write(true).open(&temporary)?;
    filled.set_permissions(permissions)?;
    filled.sync_all()?;
    drop(filled);
    temporary.persist(path).map_err(|error| error.error)?;
    sync_dir(parent(path))
}

/// An empty file from which `path` can be reached by a rename. It is removed when the value is dropped.
fn temporary_beside(path: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".kvfold-").suffix(".tmp");
    // tempfile's own default shuts out everybody but the owner, which is right for secrets and wrong for models.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(parent(path))
}

/// Forces the entries of directory `path` (names created, renamed or removed in it) to the disk.
///
/// Systems that cannot open a directory as a file keep this promise themselves or not at all, so there it does nothing.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
}

/// The directory that `path` is an entry of; `.` for a bare name, for which [`Path::parent`] gives an empty path.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_keeps_the_old_file_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write(&path, |w| w.write_all(b"old")).unwrap();
        let error = write(&path, |w| {
            w.write_all(b"half of the new")?;
            Err(io::Error::other("the disk is full"))
        });
        assert_eq!(error.unwrap_err().to_string(), "the disk is full");
        let error = write_named(&path, |temporary| {
            std::fs::write(temporary, b"half of the new")?;
            Err(io::Error::other("the disk is full"))
        });
        assert_eq!(error.unwrap_err().to_string(), "the disk is full");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn others_may_read_what_the_umask_lets_them() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("ours"), |w| w.write_all(b"x")).unwrap();
        write_named(&dir.path().join("named"), |temporary| {
            let private = NamedTempFile::new_in(dir.path())?;
            private.persist(temporary)?;
            Ok(())
        })
        .unwrap();
        std::fs::write(dir.path().join("plain"), b"x").unwrap();
        let mode = |name| std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode("ours"), mode("plain"));
        assert_eq!(mode("named"), mode("plain"));
    }

    #[test]
    fn a_bare_name_lies_in_the_current_directory() {
        assert_eq!(parent(Path::new("model")), Path::new("."));
        assert_eq!(parent(Path::new("a/model")), Path::new("a"));
    }
}
