//! MLX itself: the shared library and headers of a published wheel, checked against its checksum.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// What mlx-rs 0.33.0 is written against (through mlx-sys 0.7.0 and mlx-c 0.7.0).
pub const MLX_VERSION: &str = "0.32.2";

/// Which MLX.
#[derive(Clone, Copy, PartialEq)]
pub enum Flavour {
    Cpu,
    Cuda13,
}

impl Flavour {
    pub fn from_arguments(mut arguments: impl Iterator<Item = String>) -> Result<Self> {
        let flavour = match arguments.next().as_deref() {
            None | Some("cpu") => Self::Cpu,
            Some("cuda-13") => Self::Cuda13,
            Some(other) => bail!("unknown flavour '{other}': cpu or cuda-13"),
        };
        ensure!(arguments.next().is_none(), "usage: mlx-linux [cpu|cuda-13]");
        Ok(flavour)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda13 => "cuda-13",
        }
    }

    fn package(self) -> &'static str {
        match self {
            Self::Cpu => "mlx-cpu",
            Self::Cuda13 => "mlx-cuda-13",
        }
    }

    /// SHA-256 of the wheel for this machine.
    fn checksum(self) -> Result<&'static str> {
        Ok(match (self, std::env::consts::ARCH) {
            (Self::Cpu, "x86_64") => {
                "fc5d31b90fc4f457b2f9614ed45651a567d22a6a11a03d114a90a4e10bdd8878"
            }
            (Self::Cpu, "aarch64") => {
                "d0f94625588b51a878786dd51cec5617894ce586cf3c94645ce1b64e24c27c0b"
            }
            (Self::Cuda13, "x86_64") => {
                "335094ccd1c0c6dc3e09c8caba207c8180602bacc0c38ba20c1d81e9456ab394"
            }
            (_, arch) => bail!("there is no {} wheel for {arch}", self.package()),
        })
    }
}

/// Leaves `mlx/` (library, headers), `clang/` (for the bindings) and, for CUDA, `nvidia/` in `home`.
pub fn install(flavour: &Flavour, home: &Path) -> Result<()> {
    let clang_checksum = match std::env::consts::ARCH {
        "x86_64" => "c533091d8a3bbf7460a00cb6c1a71da93bffe148f172c7d03b1c31fbf8aa2a0b",
        "aarch64" => "54dda940a4a0491a9d1532bf071ea3ef26e6dbaf03b5000ed94dd7174e8f9592",
        arch => bail!("there is no libclang wheel for {arch}"),
    };
    let requirements = home.join("requirements.txt");
    let pinned = format!(
        "{}=={MLX_VERSION} --hash=sha256:{}\nlibclang==18.1.1 --hash=sha256:{clang_checksum}\n",
        flavour.package(),
        flavour.checksum()?,
    );
    fs::write(&requirements, pinned)?;
    println!("mlx-linux: downloading {} and libclang", flavour.package());
    pip(
        &["--no-deps", "--require-hashes", "--requirement"],
        &requirements,
        home,
    )?;
    if *flavour == Flavour::Cuda13 {
        println!("mlx-linux: downloading the CUDA libraries that MLX needs at run time (2 GB)");
        fs::write(&requirements, CUDA_RUNTIME)?;
        pip(&["--no-deps", "--requirement"], &requirements, home)?;
    }
    ensure!(
        home.join("mlx/lib/libmlx.so").is_file(),
        "the wheel holds no mlx/lib/libmlx.so"
    );
    Ok(())
}

/// pip verifies checksums, resumes nothing, and speaks to whichever index the user has set up.
fn pip(how: &[&str], requirements: &Path, home: &Path) -> Result<()> {
    let status = Command::new("python3")
        .args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
        ])
        .args([
            "--no-compile",
            "--only-binary=:all:",
            "--upgrade",
            "--target",
        ])
        .arg(home)
        .args(how)
        .arg(requirements)
        .env("PIP_ROOT_USER_ACTION", "ignore")
        .status()
        .context("cannot run pip")?;
    ensure!(
        status.success(),
        "pip could not install the wheels (they need glibc 2.35 or newer, and the network)"
    );
    Ok(())
}

/// What `libmlx.so` of the CUDA wheel loads when a program starts.
const CUDA_RUNTIME: &str = "\
nvidia-cudnn-cu13>=9,<10
nvidia-nccl-cu13
nvidia-cublas>=13,<14
nvidia-cufft>=12,<13
nvidia-cuda-nvrtc>=13,<14
nvidia-cuda-runtime>=13,<14
";
