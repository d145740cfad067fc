//! Reading a streamed chat completion: bytes into events, wherever they were cut.

use serde_json::Value;

/// Bytes of which no whole line has come yet.
#[derive(Debug, Default)]
pub(super) struct Events {
    line: Vec<u8>,
}

/// What a line of the stream says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    Thought(String),
    Content(String),
    Finish(String),
    Error(String),
    Done,
}

impl Events {
    /// The events that are complete with these bytes.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Vec<Event> {
        let mut events = Vec::new();
        for byte in bytes {
            match byte {
                b'\n' => events.extend(read(&std::mem::take(&mut self.line))),
                // A line without end is no stream of events.
                _ if self.line.len() < LINE_BYTES_MAX => self.line.push(*byte),
                _ => return vec![Event::Error("a line is too long".into())],
            }
        }
        events
    }
}

/// Comments and empty lines say nothing.
fn read(line: &[u8]) -> Vec<Event> {
    let Some(data) = line.strip_prefix(b"data:") else {
        return Vec::new();
    };
    let data = data.trim_ascii();
    if data == b"[DONE]" {
        return vec![Event::Done];
    }
    let Ok(chunk) = serde_json::from_slice::<Value>(data) else {
        return vec![Event::Error("an event is no JSON".into())];
    };
    if let Some(error) = chunk.get("error") {
        let why = error["message"].as_str().unwrap_or("no reason was given");
        return vec![Event::Error(why.to_owned())];
    }
    let choice = &chunk["choices"][0];
    let text = |value: &Value| {
        value
            .as_str()
            .filter(|text| !text.is_empty())
            .map(str::to_owned)
    };
    let delta = &choice["delta"];
    let parts = [
        text(&delta["reasoning_content"]).map(Event::Thought),
        text(&delta["content"]).map(Event::Content),
        text(&choice["finish_reason"]).map(Event::Finish),
    ];
    parts.into_iter().flatten().collect()
}

/// Far more than a token's chunk.
const LINE_BYTES_MAX: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_wherever_the_bytes_were_cut() {
        let stream = ": keep-alive\n\n\
            data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\r\n\r\n\
            data: {\"choices\":[{\"delta\":{\"reasoning_content\":\"hm\"}}]}\n\n\
            data: {\"choices\":[{\"delta\":{\"content\":\"é\"}}]}\n\n\
            data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n\n";
        let expected = [
            Event::Thought("hm".into()),
            Event::Content("é".into()),
            Event::Finish("stop".into()),
            Event::Done,
        ];
        for place in 0..stream.len() {
            let (before, after) = stream.as_bytes().split_at(place);
            let mut events = Events::default();
            let mut read = events.push(before);
            read.extend(events.push(after));
            assert_eq!(read, expected, "cut at {place}");
        }
    }

    #[test]
    fn an_error_in_the_stream_is_an_event() {
        let line =
            b"data: {\"error\":{\"message\":\"a shard was lost\",\"code\":\"shard_lost\"}}\n";
        let lost = [Event::Error("a shard was lost".into())];
        assert_eq!(Events::default().push(line), lost);
        assert!(matches!(
            Events::default().push(b"data: nonsense\n")[..],
            [Event::Error(_)]
        ));
    }
}
