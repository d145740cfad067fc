//! `.cargo/config.toml`: what stands in for mlx-sys' build script on this machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::wheel::Flavour;

const MARK: &str = "# Written by deploy/mlx-linux; `make mlx` writes it again.\n";

/// Writes the file only when it would change, so that Cargo rebuilds nothing for no reason.
pub fn write(root: &Path, home: &Path, flavour: &Flavour) -> Result<()> {
    let path = root.join(".cargo/config.toml");
    let wanted = render(home, flavour)?;
    let found = fs::read_to_string(&path).ok();
    if found.as_ref() == Some(&wanted) {
        return Ok(());
    }
    ensure!(
        found.is_none_or(|text| text.starts_with(MARK)),
        "{} is not ours: merge it by hand, or move it away and run this again",
        path.display()
    );
    fs::create_dir_all(root.join(".cargo"))?;
    fs::write(&path, wanted).with_context(|| format!("cannot write {}", path.display()))
}

fn render(home: &Path, flavour: &Flavour) -> Result<String> {
    let native = home.join("native");
    let library = home.join("mlx/lib");
    let include = home.join("mlx/include");
    let mut link_arguments = vec![format!("-Wl,-rpath,{}", library.display())];
    if *flavour == Flavour::Cuda13 {
        for folder in nvidia_libraries(home)? {
            link_arguments.push(format!("-Wl,-rpath,{}", folder.display()));
        }
        // The driver's own library is there only where a driver is.
        link_arguments.push("-Wl,--allow-shlib-undefined".into());
    }
    let flags: Vec<String> = link_arguments
        .iter()
        .map(|argument| format!("\"-Clink-arg={argument}\""))
        .collect();
    let flags = flags.join(", ");
    let arch = std::env::consts::ARCH;
    let (native, library, include) = (native.display(), library.display(), include.display());
    Ok(format!(
        r#"{MARK}
# mlx-sys declares `links = "mlx"`: this table takes the place of its build script.
[target.{arch}-unknown-linux-gnu.mlx]
rustc-link-search = ["native={native}", "native={library}"]
rustc-link-lib = ["static=mlxc", "dylib=mlx", "dylib=stdc++"]
rustc-env = {{ OUT_DIR = "{native}" }}
include = "{include}"

[target.{arch}-unknown-linux-gnu]
rustflags = [{flags}]
rustdocflags = [{flags}]
"#
    ))
}

/// Every `nvidia/*/lib`, where the CUDA packages lay their libraries.
fn nvidia_libraries(home: &Path) -> Result<Vec<PathBuf>> {
    let nvidia = home.join("nvidia");
    let mut found = Vec::new();
    for entry in fs::read_dir(&nvidia).with_context(|| format!("no {}", nvidia.display()))? {
        let library = entry?.path().join("lib");
        if library.is_dir() {
            found.push(library);
        }
    }
    found.sort();
    Ok(found)
}
