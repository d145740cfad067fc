//! The last epoch begun, on disk: a head that restarts goes on counting, so that what an earlier
//! life of the cluster still says can be told from the present one.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::PathBuf;

use offbook_protocol::Epoch;

#[derive(Debug)]
pub(super) struct EpochFile {
    path: PathBuf,
}

impl EpochFile {
    /// The file and what it holds; 0 when it is not there yet.
    pub(super) fn open(path: PathBuf) -> io::Result<(Self, Epoch)> {
        let last = match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map(Epoch).map_err(|_| {
                let why = format!("{} does not hold an epoch; remove it", path.display());
                io::Error::new(ErrorKind::InvalidData, why)
            })?,
            Err(error) if error.kind() == ErrorKind::NotFound => Epoch(0),
            Err(error) => return Err(error),
        };
        Ok((Self { path }, last))
    }

    /// Replaces the file in one step: it is either the old one or the new one, never half of it.
    pub(super) fn store(&self, epoch: Epoch) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let mut file = fs::File::create(&new)?;
        writeln!(file, "{epoch}")?;
        file.sync_all()?;
        fs::rename(&new, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counting_goes_on_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("epoch");
        let (file, last) = EpochFile::open(path.clone()).unwrap();
        assert_eq!(last, Epoch(0));
        file.store(Epoch(7)).unwrap();
        assert_eq!(EpochFile::open(path.clone()).unwrap().1, Epoch(7));
        fs::write(&path, "seven").unwrap();
        assert!(
            EpochFile::open(path)
                .unwrap_err()
                .to_string()
                .contains("remove it")
        );
    }
}
