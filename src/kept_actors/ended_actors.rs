//! The actors with which a process of this node ended, on disk: its last words go to whoever started it,
//! and are lost there, while the head asks the next process how its actors are.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use offbook_protocol::ActorReport;

/// A file for each, in a folder of the node's. Whoever removes it forgets them.
#[derive(Clone, Debug)]
pub(super) struct EndedActors {
    folder: PathBuf,
}

impl EndedActors {
    /// Of the node that keeps its state here.
    pub(super) fn of(data: &Path) -> Self {
        Self {
            folder: data.join("ended-actors"),
        }
    }

    /// All that were noted, of all the node's processes. What cannot be read is left out: nobody is to be
    /// kept from starting by it.
    pub(super) fn read(&self) -> Vec<ActorReport> {
        let files = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let paths = files.map(|file| file.path());
        let noted = paths.filter(|path| path.extension().is_some_and(|kind| kind == KIND));
        noted.filter_map(|path| read(&path)).collect()
    }

    /// Notes one as it is, in place of what was noted of it before.
    pub(super) fn note(&self, actor: &ActorReport) {
        if let Err(error) = self.write(actor) {
            tracing::warn!(actor = actor.name, %error, "the end of an actor is not noted");
        }
    }

    /// In one step: the file is either the old one or the new one.
    fn write(&self, actor: &ActorReport) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let path = self.folder.join(&actor.name).with_extension(KIND);
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(actor)?)?;
        fs::rename(new, path)
    }
}

fn read(path: &Path) -> Option<ActorReport> {
    let text = fs::read(path).ok()?;
    match serde_json::from_slice(&text) {
        Ok(actor) => Some(actor),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "not the record of an actor");
            None
        }
    }
}

const KIND: &str = "json";

#[cfg(test)]
mod tests {
    use super::*;

    fn actor(name: &str, restarts: u32) -> ActorReport {
        ActorReport {
            process: "node-1".into(),
            name: name.into(),
            restarts,
            last_error: "panic: a fault of ours".into(),
            ended_at: Some(1),
            dead_letters: 0,
            last_dead_letter: None,
            given_up: true,
        }
    }

    #[test]
    fn what_was_noted_last_is_read_and_what_is_broken_is_left_out() {
        let data = tempfile::tempdir().unwrap();
        let ended = EndedActors::of(data.path());
        assert!(ended.read().is_empty(), "nothing was noted");
        for actor in [actor("a", 0), actor("a", 1), actor("b", 2)] {
            ended.note(&actor);
        }
        fs::write(data.path().join("ended-actors/c.json"), "{").unwrap();
        fs::write(data.path().join("ended-actors/d.new"), "{}").unwrap();
        let mut read = ended.read();
        read.sort_by(|a, b| a.name.cmp(&b.name));
        assert_eq!(read, [actor("a", 1), actor("b", 2)]);
    }
}
