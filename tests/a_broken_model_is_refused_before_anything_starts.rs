//! A file of a model that no restart could repair is named at once, and no process is started for it.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::offbook;

fn demo_model() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/demo/model"))
}

/// What is made of the demo model's file of that name.
enum Break {
    With(&'static str),
    Pipe,
}

#[test]
fn and_the_file_is_named() {
    let cases = [
        ("tokenizer.json", Break::With("{\"model\": 3}")),
        ("tokenizer.json", Break::Pipe),
        ("chat_template.jinja", Break::With("{% if %}")),
        (
            "generation_config.json",
            Break::With("{\"top_p\": \"high\"}"),
        ),
        ("config.json", Break::With("[")),
        ("config.json", Break::Pipe),
    ];
    for (name, broken) in cases {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path();
        for file in demo_model().read_dir().unwrap() {
            let file = file.unwrap();
            std::os::unix::fs::symlink(file.path(), model.join(file.file_name())).unwrap();
        }
        let file = model.join(name);
        std::fs::remove_file(&file).unwrap();
        match broken {
            Break::With(text) => std::fs::write(&file, text).unwrap(),
            Break::Pipe => assert!(
                Command::new("mkfifo")
                    .arg(&file)
                    .status()
                    .unwrap()
                    .success()
            ),
        }
        for command in [&["up", "--http", "127.0.0.1:0"][..], &["plan"]] {
            let said = refused(command, model);
            assert!(said.contains(name), "{command:?}: {said}");
            assert!(
                !said.contains("process=\"node"),
                "{command:?} has started: {said}"
            );
        }
    }
}

/// The error of a command that ends by itself.
fn refused(command: &[&str], model: &Path) -> String {
    let mut child = offbook();
    child.args(command).arg("--model").arg(model);
    child.env("OFFBOOK_LOG", "debug").stderr(Stdio::piped());
    let mut child = child.spawn().unwrap();
    let begun = Instant::now();
    while child.try_wait().unwrap().is_none() && begun.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{command:?}: {said}");
    said
}
