//! The window of layers in flight, from the cluster file and the environment. The environment counts
//! for the shard of this machine alone; its names are those that users' scripts have.

use anyhow::{Context, Result, bail, ensure};
use offbook_actors::WindowSettings;

/// The cluster file's settings, with what the environment overrides.
///
/// # Errors
/// When the environment holds what cannot be meant.
pub(crate) fn chosen(configured: WindowSettings) -> Result<WindowSettings> {
    with(configured, |name| std::env::var(name).ok())
}

fn with(
    configured: WindowSettings,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<WindowSettings> {
    let mut settings = configured;
    if let Some(text) = environment(TASKS) {
        let tasks: u32 = text
            .parse()
            .with_context(|| format!("{TASKS} is '{text}': set it to a number of layers"))?;
        ensure!(tasks > 0, "{TASKS} must be at least 1");
        settings.prefill = tasks;
        settings.decode = tasks;
    }
    let set = ADAPTIVE
        .iter()
        .find_map(|name| Some((name, environment(name)?)));
    if let Some((name, text)) = set {
        settings.adaptive = match &*text {
            "1" | "on" | "true" => true,
            "0" | "off" | "false" => false,
            _ => bail!("{name} is '{text}': set it to 1 or 0"),
        };
    }
    Ok(settings)
}

const TASKS: &str = "MAX_ACTIVE_TASKS";
/// The first that is set counts.
const ADAPTIVE: [&str; 2] = ["OFFBOOK_ADAPTIVE_THROTTLE", "EXO_ADAPTIVE_THROTTLE"];

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<WindowSettings> {
        with(WindowSettings::default(), |name| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, text)| (*text).to_owned())
        })
    }

    #[test]
    fn the_environment_overrides_both_set_points_and_the_switch() {
        assert_eq!(read(&[]).unwrap(), WindowSettings::default());
        let settings = read(&[(TASKS, "7"), ("EXO_ADAPTIVE_THROTTLE", "1")]).unwrap();
        assert_eq!((settings.prefill, settings.decode), (7, 7));
        assert!(settings.adaptive);
        let both = [
            ("OFFBOOK_ADAPTIVE_THROTTLE", "0"),
            ("EXO_ADAPTIVE_THROTTLE", "1"),
        ];
        assert!(!read(&both).unwrap().adaptive);
    }

    #[test]
    fn what_cannot_be_meant_is_named() {
        for (name, text) in [(TASKS, "many"), (TASKS, "0"), (ADAPTIVE[1], "perhaps")] {
            let error = format!("{:#}", read(&[(name, text)]).unwrap_err());
            assert!(error.contains(name), "{error}");
        }
    }
}
