//! The demo model is part of the program: its files are written out where a shard can read them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// What the API calls the demo model.
pub(crate) const NAME: &str = "offbook-demo";

macro_rules! files {
    ($($name:literal),+ $(,)?) => {
        [$(($name, include_bytes!(concat!("../demo/model/", $name)).as_slice())),+]
    };
}

const FILES: [(&str, &[u8]); 6] = files![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

/// Writes the model into `folder`, in a directory of its own name, and returns that.
pub(crate) fn write_to(folder: &Path) -> Result<PathBuf> {
    let model = folder.join(NAME);
    fs::create_dir_all(&model).with_context(|| format!("cannot make {}", model.display()))?;
    for (name, bytes) in FILES {
        let path = model.join(name);
        fs::write(&path, bytes)
            .with_context(|| format!("cannot write {}: is the disk full?", path.display()))?;
    }
    Ok(model)
}
