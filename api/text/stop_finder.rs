//! Where an answer ends because it said a certain word.

use super::markers;

/// Looks for stop strings in text that comes in pieces. The result does not depend on how the text
/// was cut: the string that is complete first wins, and of two that end together the longer one.
#[derive(Clone, Debug, Default)]
pub struct StopFinder {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    waiting: String,
    found: bool,
}

impl StopFinder {
    /// Empty strings are not looked for.
    pub fn new(stops: Vec<String>) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        Self {
            stops,
            ..Self::default()
        }
    }

    /// The text that is certainly before a stop string. Nothing comes once one was found.
    pub fn push(&mut self, text: &str) -> String {
        if self.found {
            return String::new();
        }
        self.waiting.push_str(text);
        if let Some(start) = self.first() {
            self.found = true;
            self.waiting.truncate(start);
            return std::mem::take(&mut self.waiting);
        }
        let begun = self
            .stops
            .iter()
            .map(|stop| markers::begun(&self.waiting, stop))
            .max();
        let certain = self.waiting.len() - begun.unwrap_or(0);
        self.waiting.drain(..certain).collect()
    }

    /// The text that waited for a stop string that never came.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.waiting)
    }

    /// Whether the answer has ended.
    pub fn found(&self) -> bool {
        self.found
    }

    fn first(&self) -> Option<usize> {
        let places = self.stops.iter().filter_map(|stop| {
            let start = self.waiting.find(stop.as_str())?;
            Some((start + stop.len(), start))
        });
        places.min().map(|(_, start)| start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split_at(text: &str, stops: &[&str], place: usize) -> (String, bool) {
        let mut finder = StopFinder::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut before = finder.push(&text[..place]) + &finder.push(&text[place..]);
        before += &finder.finish();
        (before, finder.found())
    }

    fn everywhere(text: &str, stops: &[&str], before: &str, found: bool) {
        for place in (0..=text.len()).filter(|place| text.is_char_boundary(*place)) {
            assert_eq!(
                split_at(text, stops, place),
                (before.to_owned(), found),
                "cut at {place}"
            );
        }
    }

    #[test]
    fn a_stop_string_is_found_wherever_the_text_was_cut() {
        everywhere("one two three", &["two"], "one ", true);
        everywhere("aababaac", &["abaac"], "aab", true);
        everywhere("é…ü!", &["…ü"], "é", true);
        everywhere("xabc", &["abc", "xab"], "", true);
        everywhere("xab", &["ab", "xab"], "", true);
        everywhere(
            "nothing here",
            &["nowhere", "hereafter"],
            "nothing here",
            false,
        );
    }

    #[test]
    fn nothing_comes_after_a_stop_string() {
        let mut finder = StopFinder::new(vec!["\n".into(), String::new()]);
        assert_eq!(finder.push("a\nb"), "a");
        assert_eq!(finder.push("c"), "");
        assert_eq!(finder.finish(), "");
        assert!(finder.found());
    }
}
