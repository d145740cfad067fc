//! The marks by which MiniMax models, and models like them, structure an answer.

pub(super) const THINK: &str = "<think>";
pub(super) const THINK_END: &str = "</think>";
pub(super) const CALL: &str = "<minimax:tool_call>";
pub(super) const CALL_END: &str = "</minimax:tool_call>";
pub(super) const INVOKE: &str = "<invoke name=";
pub(super) const INVOKE_END: &str = "</invoke>";
pub(super) const PARAMETER: &str = "<parameter name=";
pub(super) const PARAMETER_END: &str = "</parameter>";

/// Those that a vocabulary may hold as single tokens.
pub(super) const ALL: [&str; 4] = [THINK, THINK_END, CALL, CALL_END];

/// How many bytes at the end of `text` could be the beginning of `mark`, and so must wait.
pub(super) fn begun(text: &str, mark: &str) -> usize {
    let longest = text.len().min(mark.len().saturating_sub(1));
    let begins = |length: &usize| {
        let start = text.len() - length;
        text.is_char_boundary(start) && mark.starts_with(&text[start..])
    };
    (1..=longest).rev().find(begins).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_become_the_mark_waits() {
        assert_eq!(begun("a</thi", THINK_END), 5);
        assert_eq!(begun("a</thin<", THINK_END), 1);
        assert_eq!(begun("a</think>", THINK_END), 0);
        assert_eq!(begun("", THINK_END), 0);
        assert_eq!(begun("é", "é!"), 2);
        assert_eq!(begun("aab", "aabaac"), 3);
        assert_eq!(begun("x", ""), 0);
    }
}
