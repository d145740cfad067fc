//! Prepares MLX for unmodified mlx-rs on Linux: `mlx-linux [cpu|cuda-13]`.
//!
//! mlx-sys builds MLX itself on macOS alone. On Linux, Cargo lets a `[target.<triple>.mlx]` table
//! take the place of its build script; this tool makes what such a table has to point at, and the
//! table. It reads the repository it lies in, writes `.mlx/` and `.cargo/config.toml` there, and
//! does nothing when both are as they should be.

mod wheel;
mod native;
mod cargo_config;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use wheel::Flavour;

fn main() -> ExitCode {
    match prepare() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mlx-linux: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn prepare() -> Result<()> {
    if cfg!(target_os = "macos") {
        println!("mlx-linux: nothing to do, mlx-sys builds MLX itself on macOS");
        return Ok(());
    }
    let flavour = Flavour::from_arguments(std::env::args().skip(1))?;
    let root = repository_root()?;
    let home = root.join(".mlx").join(flavour.name());
    let stamp = stamp(&flavour)?;
    let stamp_file = home.join("stamp");
    if std::fs::read_to_string(&stamp_file).is_ok_and(|found| found == stamp) {
        return cargo_config::write(&root, &home, &flavour);
    }

    require(
        "python3",
        &["-m", "pip", "--version"],
        "Python 3 with pip (Debian: python3-pip)",
    )?;
    require("c++", &["--version"], "a C++20 compiler (Debian: g++)")?;
    require("ar", &["--version"], "binutils (Debian: binutils)")?;

    println!(
        "mlx-linux: preparing MLX {} ({})",
        wheel::MLX_VERSION,
        flavour.name()
    );
    if home.exists() {
        std::fs::remove_dir_all(&home)
            .with_context(|| format!("cannot clear {}", home.display()))?;
    }
    std::fs::create_dir_all(&home).with_context(|| format!("cannot make {}", home.display()))?;
    wheel::install(&flavour, &home)?;
    let mlx_c = mlx_c_sources(&root)?;
    native::build(&mlx_c, &home)?;
    cargo_config::write(&root, &home, &flavour)?;
    // Last, so that an interrupted run starts over.
    std::fs::write(&stamp_file, stamp).context("cannot write the stamp")?;
    println!("mlx-linux: done");
    Ok(())
}

/// The repository this tool was built in, two folders above its manifest.
fn repository_root() -> Result<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    root.canonicalize()
        .context("the repository that this tool was built in has moved")
}

/// Changes when anything does that the prepared files depend on.
fn stamp(flavour: &Flavour) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(flavour.name());
    hash.update(wheel::MLX_VERSION);
    for source in [
        include_str!("main.rs"),
        include_str!("wheel.rs"),
        include_str!("native.rs"),
        native::COMPAT_FORMAT,
        native::COMPAT_HALF,
        native::COMPAT_MACH_TIME,
    ] {
        hash.update(source);
    }
    hash.update(std::env::consts::ARCH);
    Ok(hash
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// Says in one line what is missing and how to get it.
fn require(program: &str, arguments: &[&str], what: &str) -> Result<()> {
    let works = Command::new(program)
        .args(arguments)
        .output()
        .is_ok_and(|o| o.status.success());
    ensure!(works, "missing: {what}");
    Ok(())
}

/// Where the published mlx-sys package keeps mlx-c.
fn mlx_c_sources(root: &Path) -> Result<PathBuf> {
    println!("mlx-linux: fetching crates");
    let output = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()))
        .args(["metadata", "--format-version", "1", "--manifest-path"])
        .arg(root.join("Cargo.toml"))
        .stderr(std::process::Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    ensure!(
        output.status.success(),
        "`cargo metadata` failed: is the network there?"
    );
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let manifest = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|package| package["name"] == "mlx-sys")
        .and_then(|package| package["manifest_path"].as_str());
    let Some(manifest) = manifest else {
        bail!("the workspace does not depend on mlx-sys")
    };
    Ok(Path::new(manifest).with_file_name("src").join("mlx-c"))
}
