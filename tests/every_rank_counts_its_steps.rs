//! `GET /metrics` of a whole cluster: where the time of every rank's steps went.

mod support;

use support::{Cluster, long_completion};

#[test]
fn and_the_parts_add_up() {
    let cluster = Cluster::up(&["--nodes", "3"]);
    let tokens = 40;
    assert_eq!(
        cluster
            .stream("/v1/completions", &long_completion(tokens))
            .filter(|event| event["choices"][0]["finish_reason"] == "length")
            .count(),
        1
    );
    let read = |text: &str, what: &str, rank: usize, kind: &str, part: &str| -> f64 {
        let node = rank + 1;
        let line = format!(
            "offbook_step_seconds_{what}{{rank=\"{rank}\",node=\"node-{node}\",kind=\"{kind}\",\
             part=\"{part}\"}} "
        );
        let found = text.lines().find_map(|one| one.strip_prefix(&line));
        let found = found.unwrap_or_else(|| panic!("no {line} in\n{text}"));
        found.parse().unwrap()
    };
    // The ranks that do not sample may note their last steps after the client has the last token.
    let counts = |text: &str, rank| read(text, "count", rank, "decode", "total");
    let begun = std::time::Instant::now();
    let text = loop {
        let text = cluster.get_text("/metrics");
        if (0..3).all(|rank| counts(&text, rank) >= 39.0) {
            break text;
        }
        assert!(
            begun.elapsed().as_secs() < 10,
            "steps are missing in\n{text}"
        );
    };
    let figure = |what: &str, rank, kind: &str, part: &str| read(&text, what, rank, kind, part);
    for rank in 0..3 {
        // The first token comes of the prompt's step; one step may run ahead of the end.
        let steps = figure("count", rank, "decode", "total");
        assert!(steps <= 41.0, "rank {rank}: {steps}");
        assert!(figure("count", rank, "prefill", "total") >= 1.0);
        let seconds = |part| figure("sum", rank, "decode", part);
        let parts = seconds("model") + seconds("gpu_eval") + seconds("eval");
        let total = seconds("total");
        assert!(
            total > 0.0 && (total - parts).abs() < 1e-6 * steps,
            "{total} {parts}"
        );
        assert!(seconds("collective") > 0.0, "rank {rank} met nobody");
        let path = format!(
            "offbook_collectives_path{{rank=\"{rank}\",node=\"node-{}\",path=\"",
            rank + 1
        );
        assert!(text.contains(&path), "{text}");
    }
}
