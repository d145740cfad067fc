//! The marks by which models structure an answer: thoughts alike in all, tool calls in three ways.

pub(super) const THINK: &str = "<think>";
pub(super) const THINK_END: &str = "</think>";

/// How a model writes its tool calls.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CallMarks {
    /// Around one call or several.
    pub(super) call: &'static str,
    pub(super) call_end: &'static str,
    pub(super) form: CallForm,
}

/// What lies between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallForm {
    /// Any number of calls, with marks around each and around each parameter.
    Marked(&'static ParameterMarks),
    /// One call, a JSON object with `name` and `arguments`.
    Json,
}

/// The first mark of each pair goes on with a name, in quotes or not, and `>`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ParameterMarks {
    pub(super) invoke: &'static str,
    pub(super) invoke_end: &'static str,
    pub(super) parameter: &'static str,
    pub(super) parameter_end: &'static str,
}

impl CallMarks {
    /// Those that a chat template teaches: it spells them out in what it tells the model of tools.
    /// MiniMax's if there are none.
    pub(super) fn of_template(source: &str) -> &'static Self {
        let taught = |marks: &&CallMarks| {
            let inside = match marks.form {
                CallForm::Marked(marks) => marks.invoke,
                CallForm::Json => "",
            };
            source.contains(marks.call) && source.contains(inside)
        };
        [&MINIMAX, &QWEN3_CODER, &HERMES]
            .into_iter()
            .find(taught)
            .unwrap_or(&MINIMAX)
    }
}

pub(super) static MINIMAX: CallMarks = CallMarks {
    call: "<minimax:tool_call>",
    call_end: "</minimax:tool_call>",
    form: CallForm::Marked(&ParameterMarks {
        invoke: "<invoke name=",
        invoke_end: "</invoke>",
        parameter: "<parameter name=",
        parameter_end: "</parameter>",
    }),
};

/// Qwen3-Coder begins and ends calls as [`HERMES`], and writes no JSON between.
pub(super) static QWEN3_CODER: CallMarks = CallMarks {
    call: "<tool_call>",
    call_end: "</tool_call>",
    form: CallForm::Marked(&ParameterMarks {
        invoke: "<function=",
        invoke_end: "</function>",
        parameter: "<parameter=",
        parameter_end: "</parameter>",
    }),
};

/// Qwen3, and whatever else was taught as Hermes was.
pub(super) static HERMES: CallMarks = CallMarks {
    call: "<tool_call>",
    call_end: "</tool_call>",
    form: CallForm::Json,
};

/// Those that a vocabulary may hold as single tokens.
pub(super) const ALL: [&str; 6] = [
    THINK,
    THINK_END,
    MINIMAX.call,
    MINIMAX.call_end,
    HERMES.call,
    HERMES.call_end,
];

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
    fn a_template_tells_how_its_model_calls() {
        for (source, marks) in [
            ("{{ '<minimax:tool_call>\\n<invoke name=' }}", &MINIMAX),
            (
                "<tool_call>\\n<function=name>\\n<parameter=key>",
                &QWEN3_CODER,
            ),
            ("<tool_call>\\n{\"name\": <function-name>", &HERMES),
            ("{{ messages }}", &MINIMAX),
        ] {
            assert_eq!(CallMarks::of_template(source), marks, "{source}");
        }
    }

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
