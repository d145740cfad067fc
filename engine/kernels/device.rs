//! A kernel of ours as a node of MLX's graph, which launches it among its own. For CUDA it is compiled here: MLX
//! would compile it with headers that take seconds. For Metal MLX compiles it when it first runs.
#![allow(unsafe_code)]

mod cuda;

use std::ffi::{CString, c_char, c_void};
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ptr;

use mlx_rs::error::Exception;
use mlx_rs::{Array, Dtype, Stream};

/// What a kernel is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Language {
    Cuda = 1,
    Metal = 2,
}

impl Language {
    /// That of the device that MLX computes on, if it is one of these.
    pub(super) fn of_default_device() -> Option<Self> {
        // SAFETY: takes nothing, asks MLX.
        match unsafe { offbook_kernel_language() } {
            1 => Some(Self::Cuda),
            2 => Some(Self::Metal),
            _ => None,
        }
    }

    /// The name of a type of numbers.
    fn name_of(self, dtype: Dtype) -> Result<&'static str, Exception> {
        Ok(match (self, dtype) {
            (_, Dtype::Float32) => "float",
            (Self::Cuda, Dtype::Float16) => "float16",
            (Self::Cuda, Dtype::Bfloat16) => "bfloat16",
            (Self::Metal, Dtype::Float16) => "half",
            (Self::Metal, Dtype::Bfloat16) => "bfloat16_t",
            _ => {
                return Err(Exception::custom(format!(
                    "no kernel computes in {dtype:?}"
                )));
            }
        })
    }

    fn names(self) -> &'static str {
        match self {
            Self::Cuda => include_str!("cuda.h"),
            Self::Metal => include_str!("metal.h"),
        }
    }
}

/// What a kernel is made of.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) name: &'static str,
    /// By name, each with the type of its numbers, which may be a [`Constant`]'s name.
    pub(super) inputs: &'static [(&'static str, &'static str)],
    pub(super) outputs: &'static [(&'static str, &'static str)],
    /// What it takes beside them, on CUDA.
    pub(super) scalars: &'static [&'static str],
    /// What stands before it, beside the names of its language.
    pub(super) header: &'static str,
    pub(super) body: &'static str,
}

/// What a body is compiled for, by the name that it has there.
#[derive(Clone, Copy, Debug)]
pub(super) enum Constant {
    Int(&'static str, i32),
    Float(&'static str, f32),
    Type(&'static str, Dtype),
}

/// One launch: blocks in two dimensions, of so many threads.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    pub(super) blocks: [i32; 2],
    pub(super) threads: i32,
}

/// A kernel, for certain constants.
#[derive(Debug)]
pub(super) struct Kernel {
    kernel: *mut c_void,
}

// SAFETY: it is never changed after it was made; MLX copies what it keeps of it for a launch.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Kernel {
    pub(super) fn new(
        language: Language,
        source: &Source,
        constants: &[Constant],
    ) -> Result<Self, Exception> {
        let mut known = String::new();
        for constant in constants {
            let written = match *constant {
                Constant::Int(name, value) => writeln!(known, "constexpr int {name} = {value};"),
                Constant::Float(name, value) => {
                    writeln!(known, "constexpr float {name} = {value:e}f;")
                }
                Constant::Type(name, dtype) => {
                    writeln!(known, "using {name} = {};", language.name_of(dtype)?)
                }
            };
            written.map_err(|why| Exception::custom(why.to_string()))?;
        }
        let kernel = match language {
            Language::Cuda => of_cuda(source, &known)?,
            Language::Metal => of_metal(source, &known)?,
        };
        match kernel.is_null() {
            true => Err(Exception::custom("MLX makes no kernels for this device")),
            false => Ok(Self { kernel }),
        }
    }

    /// The outputs, still to be evaluated.
    ///
    /// # Safety
    /// With these inputs the kernel stays inside them and the outputs, and writes all of these.
    pub(super) unsafe fn run<const OUTPUTS: usize>(
        &self,
        inputs: &[&Array],
        outputs: [(&[i32], Dtype); OUTPUTS],
        scalars: &[i32],
        grid: Grid,
    ) -> Result<[Array; OUTPUTS], Exception> {
        let stream = Stream::thread_local_or_default();
        let handles: Vec<*const c_void> = inputs
            .iter()
            .map(|array| array.as_ptr().ctx.cast_const())
            .collect();
        let outputs = outputs.map(|(shape, dtype)| RawOutput {
            shape: shape.as_ptr(),
            dimensions: shape.len(),
            dtype: dtype.into(),
            item_bytes: item_bytes(dtype),
        });
        let launch = RawLaunch {
            inputs: handles.as_ptr(),
            input_count: handles.len(),
            outputs: outputs.as_ptr(),
            output_count: OUTPUTS,
            scalars: scalars.as_ptr(),
            scalar_count: scalars.len(),
            grid,
        };
        let mut results = [ptr::null_mut(); OUTPUTS];
        // SAFETY: all handles are alive during the call, MLX shares what it keeps, and there is a place for
        // each result; the rest the caller promises.
        let status = unsafe {
            offbook_kernel_run(
                self.kernel,
                &raw const launch,
                stream.as_ptr().ctx,
                results.as_mut_ptr(),
            )
        };
        match status {
            // SAFETY: on success each is a new array that nobody else owns.
            0 => Ok(results.map(|ctx| unsafe { Array::from_ptr(mlx_sys::mlx_array { ctx }) })),
            _ => Err(Exception::custom("MLX refuses the launch of a kernel")),
        }
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // SAFETY: made by `new`, freed once; what waits to run has its own copy.
        unsafe { offbook_kernel_free(self.kernel) };
    }
}

/// With its signature, compiled.
fn of_cuda(source: &Source, known: &str) -> Result<*mut c_void, Exception> {
    let inputs = source.inputs.iter();
    let inputs = inputs.map(|(name, of)| format!("const {of}* {name}"));
    let outputs = source.outputs.iter();
    let outputs = outputs.map(|(name, of)| format!("{of}* {name}"));
    let scalars = source.scalars.iter().map(|name| format!("unsigned {name}"));
    let all: Vec<String> = inputs.chain(outputs).chain(scalars).collect();
    let text = format!(
        "{}{}{known}extern \"C\" __global__ void {}({}) {{\n{}}}\n",
        Language::Cuda.names(),
        source.header,
        source.name,
        all.join(", "),
        source.body
    );
    let cubin = cuda::compile(&text)?;
    let name = text_for_c(source.name)?;
    // SAFETY: a string and some bytes, which the call copies.
    Ok(unsafe { offbook_cubin_kernel_new(name.as_ptr(), cubin.as_ptr().cast(), cubin.len()) })
}

fn of_metal(source: &Source, known: &str) -> Result<*mut c_void, Exception> {
    // The attributes that MLX is to declare have to stand in the body.
    let body = bare(Language::Metal.names()) + known + &bare(source.body);
    let all = |names: &[(&str, &str)]| {
        let names = names.iter().map(|(name, _)| text_for_c(name));
        names.collect::<Result<Vec<_>, _>>()
    };
    let (inputs, outputs) = (all(source.inputs)?, all(source.outputs)?);
    let pointers = |of: &[CString]| of.iter().map(|name| name.as_ptr()).collect::<Vec<_>>();
    let (input_names, output_names) = (pointers(&inputs), pointers(&outputs));
    // MLX keeps one kernel for a name, and compiles it anew whenever its text is another.
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    let name = text_for_c(&format!("{}_{:016x}", source.name, hasher.finish()))?;
    let (header, body) = (text_for_c(&bare(source.header))?, text_for_c(&body)?);
    let raw = RawText {
        name: name.as_ptr(),
        header: header.as_ptr(),
        body: body.as_ptr(),
        inputs: input_names.as_ptr(),
        input_count: input_names.len(),
        outputs: output_names.as_ptr(),
        output_count: output_names.len(),
    };
    // SAFETY: all strings are alive during the call, which copies them.
    Ok(unsafe { offbook_metal_text_kernel_new(&raw const raw) })
}

fn text_for_c(text: &str) -> Result<CString, Exception> {
    CString::new(text).map_err(|why| Exception::custom(why.to_string()))
}

/// Of the types that kernels put out.
fn item_bytes(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::Float16 | Dtype::Bfloat16 => 2,
        _ => 4,
    }
}

/// MLX looks a kernel of Metal up by all of its text at every launch, so what is no code is left out.
fn bare(text: &str) -> String {
    let mut bare = String::with_capacity(text.len());
    for line in text.lines().map(str::trim_start) {
        if !line.is_empty() && !line.starts_with("//") {
            bare += line;
            bare.push('\n');
        }
    }
    bare
}

/// `offbook_kernel_text` in kernels.h.
#[repr(C)]
struct RawText {
    name: *const c_char,
    header: *const c_char,
    body: *const c_char,
    inputs: *const *const c_char,
    input_count: usize,
    outputs: *const *const c_char,
    output_count: usize,
}

/// `offbook_kernel_output` in kernels.h.
#[repr(C)]
struct RawOutput {
    shape: *const i32,
    dimensions: usize,
    dtype: u32,
    item_bytes: u32,
}

/// `offbook_kernel_launch` in kernels.h.
#[repr(C)]
struct RawLaunch {
    inputs: *const *const c_void,
    input_count: usize,
    outputs: *const RawOutput,
    output_count: usize,
    scalars: *const i32,
    scalar_count: usize,
    grid: Grid,
}

// SAFETY: the signatures are those of kernels.h.
unsafe extern "C" {
    fn offbook_kernel_language() -> i32;
    fn offbook_cubin_kernel_new(
        name: *const c_char,
        cubin: *const c_char,
        bytes: usize,
    ) -> *mut c_void;
    fn offbook_metal_text_kernel_new(text: *const RawText) -> *mut c_void;
    fn offbook_kernel_free(kernel: *mut c_void);
    fn offbook_kernel_run(
        kernel: *const c_void,
        launch: *const RawLaunch,
        stream: *const c_void,
        results: *mut *mut c_void,
    ) -> i32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_is_no_code_is_left_out() {
        let text = "// A comment.\n\n  int a = 1; // behind\n    return a;\n";
        assert_eq!(bare(text), "int a = 1; // behind\nreturn a;\n");
    }
}
