//! Compiles for the device that is there, by the run-time compiler of its toolkit (NVRTC).

use std::ffi::CString;

use cudarc::driver::{result, sys::CUdevice_attribute};
use cudarc::nvrtc;
use mlx_rs::error::Exception;

/// The cubin: for this device alone, and half as long as text for any.
pub(super) fn compile(text: &str) -> Result<Vec<u8>, Exception> {
    // SAFETY: each looks for a library.
    let there =
        unsafe { nvrtc::sys::is_culib_present() && cudarc::driver::sys::is_culib_present() };
    if !there {
        let why = "CUDA's driver or run-time compiler (NVRTC) is not there";
        return Err(Exception::custom(why));
    }
    let text = CString::new(text).map_err(|why| Exception::custom(why.to_string()))?;
    let options = [
        format!("--gpu-architecture=sm_{}", architecture().map_err(failed)?),
        "--std=c++17".to_owned(),
    ];
    let program = nvrtc::result::create_program(&text, None).map_err(failed)?;
    // SAFETY: the program is alive until it is destroyed, once; the bytes are as many as it says.
    unsafe {
        let compiled = nvrtc::result::compile_program(program, &options);
        let cubin = match compiled {
            Ok(()) => cubin(program).map_err(failed),
            Err(why) => Err(Exception::custom(format!("{why:?}: {}", log(program)))),
        };
        nvrtc::result::destroy_program(program).map_err(failed)?;
        cubin
    }
}

/// Of the device that MLX computes on, the first that this process sees: 90 for 9.0.
fn architecture() -> Result<i32, cudarc::driver::DriverError> {
    use CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
    };
    result::init()?;
    let device = result::device::get(0)?;
    // SAFETY: the device is one that there is.
    unsafe {
        let attribute = |of| result::device::get_attribute(device, of);
        Ok(10 * attribute(MAJOR)? + attribute(MINOR)?)
    }
}

/// # Safety
/// The program was compiled.
unsafe fn cubin(program: nvrtc::sys::nvrtcProgram) -> Result<Vec<u8>, nvrtc::result::NvrtcError> {
    let mut bytes = 0;
    // SAFETY: as the caller promises; there is room for as many bytes as it said.
    unsafe {
        nvrtc::sys::nvrtcGetCUBINSize(program, &raw mut bytes).result()?;
        let mut cubin = vec![0u8; bytes];
        nvrtc::sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()).result()?;
        Ok(cubin)
    }
}

/// # Safety
/// The program is alive.
unsafe fn log(program: nvrtc::sys::nvrtcProgram) -> String {
    // SAFETY: as the caller promises.
    let log = unsafe { nvrtc::result::get_program_log(program) }.unwrap_or_default();
    let bytes: Vec<u8> = log.into_iter().map(|byte| byte as u8).collect();
    String::from_utf8_lossy(&bytes)
        .trim_end_matches('\0')
        .to_owned()
}

fn failed(why: impl std::fmt::Debug) -> Exception {
    Exception::custom(format!("compiling a kernel: {why:?}"))
}
