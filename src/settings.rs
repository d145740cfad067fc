//! What a user may set of a cluster on this machine: what `cluster.toml` holds beside nodes, keys and the
//! model. `--set` names any of it; options of their own go over what an earlier start has left.

use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use offbook_protocol::KvBits;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::cli::LocalOptions;
use crate::cluster_file::{ClusterFile, Limits, MaxActiveTasks};

/// See the module's own words. Unknown keys are errors.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settings {
    pub(crate) adaptive_throttle: bool,
    pub(crate) max_active_tasks: MaxActiveTasks,
    pub(crate) limits: Limits,
}

impl Settings {
    /// What holds for a cluster in `folder`: what its file says if an earlier start, or the user, wrote one,
    /// else the defaults; over these what the command line says.
    ///
    /// # Errors
    /// A file that is none, or a setting that there is not. Nothing is overwritten then.
    pub(crate) fn chosen(earlier: Option<&ClusterFile>, options: &LocalOptions) -> Result<Self> {
        let mut settings = earlier.map(Self::of).unwrap_or_default();
        let limits = &mut settings.limits;
        if options.division.context > 0 {
            limits.context_tokens = options.division.context;
        }
        if options.division.kv_bits != KvBits::AsComputed {
            limits.kv_bits = options.division.kv_bits;
        }
        let seconds = |time: std::time::Duration| time.as_secs_f64();
        put(&mut limits.sequences_max, options.sequences);
        put(&mut limits.restarts_max, options.restarts);
        put(
            &mut limits.restart_pause_max_seconds,
            options.restart_pause_max.map(seconds),
        );
        put(
            &mut limits.request_deadline_seconds,
            options.request_timeout.map(seconds),
        );
        put(&mut limits.drain_seconds, options.drain.map(seconds));
        settings.with(&options.set)
    }

    fn of(file: &ClusterFile) -> Self {
        Self {
            adaptive_throttle: file.adaptive_throttle,
            max_active_tasks: file.max_active_tasks,
            limits: file.limits.clone(),
        }
    }

    fn with(&self, set: &[Setting]) -> Result<Self> {
        let mut table = Table::try_from(self).context("settings are a table")?;
        for Setting { path, value } in set {
            let name = path.join(".");
            let (last, folders) = path.split_last().context("--set needs a name")?;
            let mut place = &mut table;
            for folder in folders {
                let Some(Value::Table(inner)) = place.get_mut(folder) else {
                    bail!("--set {name}: there is no '{folder}'; {KNOWN}");
                };
                place = inner;
            }
            if !place.contains_key(last) {
                let others: Vec<&str> = place.keys().map(String::as_str).collect();
                bail!(
                    "--set {name}: there is no '{last}', but {}",
                    others.join(", ")
                );
            }
            let value = match (&place[last], value) {
                // Whoever means ten seconds may say 10.
                (Value::Float(_), Value::Integer(whole)) => Value::Float(*whole as f64),
                (_, value) => value.clone(),
            };
            place.insert(last.clone(), value);
            // One after the other, so that the error is of the one that is wrong.
            Self::deserialize(table.clone())
                .map_err(|error| anyhow::anyhow!("--set {name}: {}", error.message()))?;
        }
        Ok(Self::deserialize(table)?)
    }
}

fn put<T>(place: &mut T, said: Option<T>) {
    if let Some(said) = said {
        *place = said;
    }
}

/// The cluster file that an earlier start has left in this folder.
///
/// # Errors
/// When there is one that cannot be used: it is not overwritten.
pub(crate) fn earlier(folder: &Path) -> Result<Option<ClusterFile>> {
    let path = folder.join("cluster.toml");
    if !path.exists() {
        return Ok(None);
    }
    let file = ClusterFile::load(&path);
    let file = file.context("it was there already: repair it, or move it away to begin anew")?;
    Ok(Some(file))
}

/// `NAME=VALUE`, the name with dots as in the cluster file, the value as it is written there.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Setting {
    path: Vec<String>,
    value: Value,
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) =
            (text.split_once('=')).ok_or("it is NAME=VALUE, as in limits.kv_tokens=4096")?;
        let path: Vec<String> = name.trim().split('.').map(str::to_owned).collect();
        if path.iter().any(String::is_empty) {
            return Err(format!("'{name}' is no name, as limits.kv_tokens is"));
        }
        let read = format!("value = {value}").parse::<Table>();
        let value = read.ok().and_then(|mut table| table.remove("value"));
        let value = value.ok_or_else(|| format!("'{text}' has no number, true or false"))?;
        Ok(Self { path, value })
    }
}

const KNOWN: &str = "names begin with limits or max_active_tasks, or are adaptive_throttle; the rest of a \
                     cluster file has options of its own";

#[cfg(test)]
mod tests {
    use super::*;

    fn set(settings: &[&str]) -> Result<Settings> {
        let settings: Vec<Setting> = settings.iter().map(|text| text.parse().unwrap()).collect();
        Settings::default().with(&settings)
    }

    #[test]
    fn any_setting_of_the_cluster_file_can_be_named() {
        let chosen = set(&[
            "limits.kv_tokens=4096",
            "limits.prefix_cache = false",
            "limits.queue_deadline_seconds=5",
            "max_active_tasks.prefill=10",
            "adaptive_throttle=true",
        ]);
        let Settings {
            adaptive_throttle,
            max_active_tasks,
            limits,
        } = chosen.unwrap();
        assert!(adaptive_throttle && !limits.prefix_cache);
        assert_eq!((limits.kv_tokens, max_active_tasks.prefill), (4096, 10));
        assert!((limits.queue_deadline_seconds - 5.0).abs() < 1e-9);
        assert_eq!(max_active_tasks.decode, MaxActiveTasks::default().decode);
    }

    #[test]
    fn what_there_is_not_is_refused_with_what_there_is() {
        for (setting, part) in [
            ("limits.kv_token=1", "kv_tokens"),
            ("limit.kv_tokens=1", "names begin with limits"),
            ("nodes=1", "adaptive_throttle"),
            ("limits.kv_tokens=true", "limits.kv_tokens"),
            ("limits.sequences_max=-1", "limits.sequences_max"),
            ("limits=3", "limits"),
        ] {
            let error = format!("{:#}", set(&[setting]).unwrap_err());
            assert!(error.contains(part), "{setting}: {error}");
        }
        for text in [
            "limits.kv_tokens",
            "limits..kv=1",
            "=1",
            "limits.kv_tokens=many",
        ] {
            assert!(text.parse::<Setting>().is_err(), "{text}");
        }
    }
}
