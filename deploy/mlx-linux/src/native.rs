//! mlx-c compiled from the sources inside the published mlx-sys package, and its Rust bindings.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context, Result, ensure};

pub const COMPAT_FORMAT: &str = include_str!("../compat/format");
pub const COMPAT_HALF: &str = include_str!("../compat/half.h");
pub const COMPAT_MACH_TIME: &str = include_str!("../compat/mach_time.cpp");

/// Leaves `native/libmlxc.a` and `native/bindings.rs` in `home`.
pub fn build(mlx_c: &Path, home: &Path) -> Result<()> {
    let native = home.join("native");
    let compat = native.join("compat");
    fs::create_dir_all(&compat)?;
    fs::write(compat.join("format"), COMPAT_FORMAT)?;
    fs::write(compat.join("half.h"), COMPAT_HALF)?;
    fs::write(compat.join("mach_time.cpp"), COMPAT_MACH_TIME)?;
    compile(mlx_c, home, &native, &compat)?;
    bind(mlx_c, home, &native, &compat)
}

/// All of mlx-c but `object.cpp`, which is its template for new types and not part of the library.
fn compile(mlx_c: &Path, home: &Path, native: &Path, compat: &Path) -> Result<()> {
    let mut sources = files(&mlx_c.join("mlx/c"), "cpp")?;
    sources.retain(|path| path.file_name().is_some_and(|name| name != "object.cpp"));
    sources.push(compat.join("mach_time.cpp"));
    let total = sources.len();
    println!("mlx-linux: compiling mlx-c, {total} files");

    let objects: Vec<PathBuf> = (0..total)
        .map(|index| native.join(format!("mlxc-{index}.o")))
        .collect();
    let jobs: Vec<_> = sources.iter().zip(&objects).collect();
    let queue = Mutex::new(jobs.into_iter());
    let next = || queue.lock().expect("no worker panics").next();
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|scope| {
        let work = || -> Result<()> {
            while let Some((source, object)) = next() {
                compile_one(source, object, mlx_c, home, compat)?;
            }
            Ok(())
        };
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .try_for_each(|t| t.join().expect("no worker panics"))
    })?;

    let archive = native.join("libmlxc.a");
    run(
        Command::new("ar").arg("crs").arg(&archive).args(&objects),
        "ar",
    )?;
    objects
        .iter()
        .try_for_each(fs::remove_file)
        .context("cannot remove object files")
}

fn compile_one(
    source: &Path,
    object: &Path,
    mlx_c: &Path,
    home: &Path,
    compat: &Path,
) -> Result<()> {
    let mut compiler = Command::new("c++");
    compiler
        .args(["-std=c++20", "-O2", "-fPIC", "-w", "-c"])
        .arg("-I")
        .arg(compat)
        .arg("-I")
        .arg(mlx_c)
        .arg("-isystem")
        .arg(home.join("mlx/include"))
        .args(["-include", "half.h", "-include", "format", "-o"])
        .arg(object)
        .arg(source);
    run(&mut compiler, "the C++ compiler")
}

/// The bindings that mlx-sys would have made, with the half types that mlx-rs expects.
fn bind(mlx_c: &Path, home: &Path, native: &Path, compat: &Path) -> Result<()> {
    println!("mlx-linux: generating bindings");
    // SAFETY of the process: single-threaded here, and bindgen reads this variable when it loads.
    unsafe { std::env::set_var("LIBCLANG_PATH", home.join("clang/native")) };
    // The libclang wheel brings no headers of its own; the compiler's serve.
    let builtin = Command::new("c++")
        .arg("-print-file-name=include")
        .output()?;
    let builtin = String::from_utf8(builtin.stdout)?.trim().to_owned();
    let mut builder = bindgen::Builder::default()
        .clang_arg(format!("-I{}", mlx_c.display()))
        .clang_arg(format!("-I{}", compat.display()))
        .clang_args(["-isystem", &builtin, "-include", "half.h"])
        .blocklist_function("malloc")
        .blocklist_function("realloc");
    if !cfg!(target_arch = "aarch64") {
        builder = builder.blocklist_type("float16_t").raw_line(
            "#[repr(transparent)] #[derive(Clone, Copy, Debug, Default)] pub struct float16_t(pub u16);",
        );
    }
    for header in files(&mlx_c.join("mlx/c"), "h")? {
        builder = builder.header(header.to_string_lossy());
    }
    builder
        .generate()
        .context("bindgen could not read mlx-c's headers")?
        .write_to_file(native.join("bindings.rs"))
        .context("cannot write the bindings")
}

fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("no {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn run(command: &mut Command, what: &str) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("cannot run {what}"))?;
    ensure!(
        output.status.success(),
        "{what} failed:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
