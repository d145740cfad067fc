//! Compiles the C++ shim against the very MLX headers that mlx-sys was built from.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=shim");
    let include = env::var_os("DEP_MLX_INCLUDE")
        .expect("mlx-sys tells where MLX's headers are; on Linux run `make mlx` first");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .file("shim/host.cpp")
        .file("shim/kernels.cpp")
        .includes(env::split_paths(&include))
        // MLX's headers are not ours to silence one by one.
        .warnings(false)
        .flag_if_supported("-Wno-deprecated-declarations");
    build.compile("offbook_engine");
}
