//! `fast_synch` from the environment: our own name for it, and those that users' scripts have.

use anyhow::{Result, bail};
use offbook_protocol::FastSynch;

/// What was asked for on the command line, else in the environment, else in the configuration.
///
/// # Errors
/// When the environment holds something that is none of the three.
pub(crate) fn chosen(asked: Option<FastSynch>, configured: FastSynch) -> Result<FastSynch> {
    if let Some(asked) = asked {
        return Ok(asked);
    }
    let set = VARIABLES
        .iter()
        .find_map(|name| Some((name, std::env::var(name).ok()?)));
    set.map_or(Ok(configured), |(name, text)| read(name, &text))
}

fn read(name: &str, text: &str) -> Result<FastSynch> {
    match text {
        "1" => Ok(FastSynch::On),
        "0" => Ok(FastSynch::Off),
        _ => match text.parse() {
            Ok(fast_synch) => Ok(fast_synch),
            Err(_) => bail!("{name} is '{text}': set it to auto, on, off or require"),
        },
    }
}

/// The first that is set counts. The last is MLX's own switch for its fences.
const VARIABLES: [&str; 3] = [
    "OFFBOOK_FAST_SYNCH",
    "EXO_FAST_SYNCH",
    "MLX_METAL_FAST_SYNCH",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_is_read_and_others_are_named() {
        let read = |text| read("EXO_FAST_SYNCH", text).ok();
        assert_eq!(read("on"), Some(FastSynch::On));
        assert_eq!(read("1"), Some(FastSynch::On));
        assert_eq!(read("off"), Some(FastSynch::Off));
        assert_eq!(read("0"), Some(FastSynch::Off));
        assert_eq!(read("require"), Some(FastSynch::Require));
        let error = super::read("EXO_FAST_SYNCH", "yes").expect_err("it is no spelling");
        assert!(error.to_string().contains("EXO_FAST_SYNCH is 'yes'"));
    }

    #[test]
    fn the_command_line_comes_first() {
        let chosen = chosen(Some(FastSynch::Off), FastSynch::Require).expect("it was asked for");
        assert_eq!(chosen, FastSynch::Off);
    }
}
