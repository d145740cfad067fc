//! Answers under way, on disk: what a head node that was killed needs to finish them.
//!
//! One file per answer, readable by its owner alone: a line that says what was asked, then a line for
//! every token in the order in which they were written to the client. The first line is on the disk
//! (`fsync`) before the client has its first byte; tokens are handed to the system before the client
//! has them, and not forced to the disk: a process that dies loses none, a machine that loses its power
//! may lose the last ones, and draws the same again, as their noise depends on seed and position alone.
//! Answers that are not streamed are kept in the same way: what is drawn before they are complete need not
//! be drawn again.
//! A file is removed when its answer is over and its client has had time to read it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use offbook_protocol::{Candidate, FinishReason, SampledToken, SequenceId};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Where the answers of one head node are kept.
#[derive(Clone, Debug)]
pub struct Journal {
    folder: PathBuf,
    /// Records stay, whatever becomes of their answers.
    kept: Arc<AtomicBool>,
}

/// What was asked: enough to ask it again, word for word.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Asked {
    /// What the client knows the answer by.
    pub(crate) id: String,
    /// The client's own name for its request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) request_id: Option<String>,
    /// In seconds since 1970.
    pub(crate) created: u64,
    pub(crate) endpoint: Endpoint,
    /// The client's parameters, and the seed that was drawn where it gave none.
    pub(crate) body: Value,
    /// Token ids: rendered again, a template might say another day.
    pub(crate) prompts: Vec<Vec<u32>>,
    /// The text of a conversation's prompt.
    pub(crate) rendered: Option<String>,
}

/// Who was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Endpoint {
    Chat,
    Completions,
}

/// An answer that was under way when its node died.
#[derive(Debug)]
pub(crate) struct Unfinished {
    pub(crate) asked: Asked,
    /// Every token that the client may have, with the choice that it belongs to, in order.
    pub(crate) tokens: Vec<(usize, SampledToken)>,
    pub(crate) record: Record,
}

/// The file of one answer. Dropped before its end, the file goes: its client has left.
#[derive(Debug)]
pub(crate) struct Record {
    file: File,
    /// None once it is not to go with this value.
    path: Option<PathBuf>,
    kept: Arc<AtomicBool>,
    /// Writing failed once: nothing more is written, and that was said.
    broken: bool,
}

impl Journal {
    /// Keeps answers in `folder`, which is made if it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(folder: PathBuf) -> io::Result<Self> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)?;
        let kept = Arc::new(AtomicBool::new(false));
        Ok(Self { folder, kept })
    }

    /// This process is about to end, in order: what breaks off from now on is left to the next one, as if
    /// it had been killed.
    pub fn keep_all(&self) {
        self.kept.store(true, Ordering::Release);
    }

    /// Begins the record of an answer. Waits for the disk.
    pub(crate) fn begin(&self, asked: &Asked) -> io::Result<Record> {
        let path = self.folder.join(format!("{}.{SUFFIX}", asked.id));
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .mode(0o600)
            .open(&path)?;
        let mut record = Record {
            file,
            path: Some(path),
            kept: Arc::clone(&self.kept),
            broken: false,
        };
        record.line(asked)?;
        record.file.sync_data()?;
        Ok(record)
    }

    /// The answers that a former process of this node has left, the oldest first. Files that cannot be
    /// read stay where they are, and are named in the log.
    pub(crate) fn unfinished(&self) -> io::Result<Vec<Unfinished>> {
        let mut unfinished = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            if path.extension().is_none_or(|suffix| suffix != SUFFIX) {
                continue;
            }
            match read(&path, &self.kept) {
                Ok(found) => unfinished.push(found),
                Err(error) => {
                    let file = path.display();
                    tracing::warn!(%file, %error, "an answer's record cannot be read");
                }
            }
        }
        unfinished.sort_by_key(|found| found.asked.created);
        Ok(unfinished)
    }
}

impl Record {
    /// Notes a token, before the client has it. A disk that takes no more costs the record, not the
    /// answer.
    pub(crate) fn token(&mut self, choice: usize, token: &SampledToken) {
        if self.broken {
            return;
        }
        if let Err(error) = self.line(&TokenLine::of(choice, token)) {
            self.broken = true;
            let file = self.path.as_deref().unwrap_or(Path::new("")).display();
            tracing::warn!(%file, %error, "an answer is not recorded any more: is the disk full?");
        }
    }

    /// The answer is over. Its record stays for a while: its client may not have read it all.
    pub(crate) fn finish(mut self) {
        if let Some(path) = self.path.take() {
            tokio::spawn(async move {
                tokio::time::sleep(KEPT_FOR).await;
                remove(&path);
            });
        }
    }

    fn line(&mut self, line: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        // One write: a line is there whole, or it is the last one and torn.
        self.file.write_all(&text)
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if let Some(path) = &self.path
            && !self.kept.load(Ordering::Acquire)
        {
            remove(path);
        }
    }
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        let file = path.display();
        tracing::warn!(%file, %error, "an answer's record cannot be removed");
    }
}

fn read(path: &Path, kept: &Arc<AtomicBool>) -> io::Result<Unfinished> {
    let text = fs::read(path)?;
    let mut lines = text.split_inclusive(|&byte| byte == b'\n');
    let asked = serde_json::from_slice(lines.next().unwrap_or_default())?;
    let (mut tokens, mut whole) = (Vec::new(), text.len());
    for line in lines {
        // A torn line was not given to the client.
        if line.last() != Some(&b'\n') {
            whole -= line.len();
            break;
        }
        tokens.push(serde_json::from_slice::<TokenLine>(line)?.token());
    }
    let file = OpenOptions::new().append(true).open(path)?;
    file.set_len(whole as u64)?;
    Ok(Unfinished {
        asked,
        tokens,
        record: Record {
            file,
            path: Some(path.to_owned()),
            kept: Arc::clone(kept),
            broken: false,
        },
    })
}

/// A token as it stands in a record. Log-probabilities are written as bits: they may be infinite, for
/// which JSON has no number.
#[derive(Serialize, Deserialize)]
struct TokenLine {
    choice: usize,
    token: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    logprob: Option<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    top: Vec<(u32, u32)>,
    #[serde(default, skip_serializing_if = "is_zero")]
    cached_tokens: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    finish: Option<FinishReason>,
}

impl TokenLine {
    fn of(choice: usize, token: &SampledToken) -> Self {
        let top = token.top.iter();
        Self {
            choice,
            token: token.token,
            logprob: token.logprob.map(f32::to_bits),
            top: top.map(|one| (one.token, one.logprob.to_bits())).collect(),
            cached_tokens: token.cached_tokens,
            finish: token.finish,
        }
    }

    fn token(self) -> (usize, SampledToken) {
        let candidate = |(token, bits)| Candidate {
            token,
            logprob: f32::from_bits(bits),
        };
        let token = SampledToken {
            // Of a scheduler that is gone.
            sequence: SequenceId(0),
            token: self.token,
            logprob: self.logprob.map(f32::from_bits),
            top: self.top.into_iter().map(candidate).collect(),
            cached_tokens: self.cached_tokens,
            finish: self.finish,
        };
        (self.choice, token)
    }
}

fn is_zero(tokens: &u32) -> bool {
    *tokens == 0
}

const SUFFIX: &str = "answer";
/// Longer than a client needs to find that its connection is gone.
const KEPT_FOR: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn asked(id: &str) -> Asked {
        Asked {
            id: id.into(),
            request_id: Some("mine".into()),
            created: 7,
            endpoint: Endpoint::Completions,
            body: json!({"prompt": [1, 2], "seed": 5}),
            prompts: vec![vec![1, 2]],
            rendered: None,
        }
    }

    fn token(id: u32, finish: Option<FinishReason>) -> SampledToken {
        SampledToken {
            sequence: SequenceId(0),
            token: id,
            logprob: Some(-0.1),
            top: vec![Candidate {
                token: 9,
                logprob: f32::NEG_INFINITY,
            }],
            cached_tokens: id % 2 * 20,
            finish,
        }
    }

    #[test]
    fn what_was_recorded_is_found_again_without_a_torn_end() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path().join("answers")).unwrap();
        let mut record = journal.begin(&asked("one")).unwrap();
        record.token(0, &token(3, None));
        record.token(1, &token(4, Some(FinishReason::Stop)));
        record.file.write_all(b"{\"choice\":0,\"to").unwrap();
        // As when the process is killed.
        std::mem::forget(record);
        let mut found = journal.unfinished().unwrap();
        assert_eq!(found.len(), 1);
        let mut found = found.remove(0);
        assert_eq!(found.asked, asked("one"));
        let expected = [(0, token(3, None)), (1, token(4, Some(FinishReason::Stop)))];
        assert_eq!(found.tokens, expected);
        // And it can be gone on with.
        found.record.token(0, &token(5, None));
        std::mem::forget(found.record);
        assert_eq!(journal.unfinished().unwrap()[0].tokens.len(), 3);
    }

    #[test]
    fn a_client_that_leaves_takes_its_record_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path().to_owned()).unwrap();
        let record = journal.begin(&asked("one")).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        drop(record);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_process_that_ends_in_order_leaves_its_records_to_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path().to_owned()).unwrap();
        let mut record = journal.begin(&asked("one")).unwrap();
        record.token(0, &token(3, None));
        journal.clone().keep_all();
        drop(record);
        let next = Journal::open(folder.path().to_owned()).unwrap();
        let found = next.unfinished().unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].tokens, [(0, token(3, None))]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_over_is_kept_for_a_while() {
        let folder = tempfile::tempdir().unwrap();
        let files = || fs::read_dir(folder.path()).unwrap().count();
        let journal = Journal::open(folder.path().to_owned()).unwrap();
        journal.begin(&asked("one")).unwrap().finish();
        assert_eq!(files(), 1);
        tokio::time::sleep(2 * KEPT_FOR).await;
        assert_eq!(files(), 0);
    }

    #[test]
    fn others_cannot_read_what_was_asked() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path().join("answers")).unwrap();
        let record = journal.begin(&asked("one")).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&journal.folder), 0o700);
        assert_eq!(mode(record.path.as_deref().unwrap()), 0o600);
    }
}
