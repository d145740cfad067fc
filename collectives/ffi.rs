//! The border to MLX's distributed operations: our carrier behind a group of MLX's, by way of the C++
//! shim, and the operations by way of mlx-c. Nothing unwinds across in either direction.
//!
//! MLX has one all-reduce with a fixed signature: operand in, result of the same shape out, ordered
//! behind its operand. Everything of that shape goes through it (broadcast, scatter, gather to a
//! root, receive): each such operation gets a small MLX group of its own, whose [`View`] says what
//! its "all_sum" means.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, CString, c_char, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    slice,
    sync::Arc,
};

use mlx_rs::{Array, Device, DeviceType, Dtype, Stream};
use mlx_sys::{mlx_array, mlx_distributed_group, mlx_stream};

use crate::{
    carrier::{Carrier, InPlace, Work},
    error::CollectiveError,
    operation::Operation,
    reduce::Reduction,
};

/// What an MLX group stands for: a carrier, and what the all-reduce of this group does.
pub(crate) struct View {
    pub(crate) carrier: Arc<Carrier>,
    pub(crate) task: Task,
}

/// The meaning of an all-reduce, owned; see [`InPlace`].
pub(crate) enum Task {
    Reduce,
    SumScatter,
    Receive { from: usize },
    Broadcast { root: usize },
    GatherTo { root: usize, parts: Box<[usize]> },
}

/// An MLX distributed group: ours, or MLX's own ring. Belongs to the engine thread.
pub(crate) struct MlxGroup {
    group: mlx_distributed_group,
    /// Its operations belong on the device's stream.
    on_device: bool,
}

impl MlxGroup {
    /// Wraps a view. The view lives until the last operation built on this group has run.
    pub(crate) fn of(view: View) -> Result<Self, CollectiveError> {
        let (rank, size) = (view.carrier.rank(), view.carrier.size());
        let (Ok(rank), Ok(size)) = (i32::try_from(rank), i32::try_from(size)) else {
            return Err(CollectiveError::local("making a group", "too many ranks"));
        };
        let handle = Box::into_raw(Box::new(view)).cast();
        let callbacks = Callbacks { run, release };
        // SAFETY: `handle` is a live `View` whose ownership goes to the shim, which gives it back
        // through `release` exactly once; both callbacks match the types in group.h.
        let ctx = unsafe { offbook_group_new(handle, callbacks, rank, size) };
        if ctx.is_null() {
            return Err(CollectiveError::local("making a group", "out of memory"));
        }
        Ok(Self {
            group: mlx_distributed_group { ctx },
            on_device: false,
        })
    }

    /// A group of MLX's own, as the environment describes it. NCCL's operations are on the device's
    /// stream, the ring's on the CPU's.
    pub(crate) fn of_mlx(backend: MlxBackend) -> Result<Self, CollectiveError> {
        install_mlx_error_handler();
        // SAFETY: takes nothing, returns an empty handle.
        let mut group = unsafe { mlx_sys::mlx_distributed_group_new() };
        // SAFETY: `group` is a valid handle, the name a C string that outlives the call.
        let status =
            unsafe { mlx_sys::mlx_distributed_init(&mut group, true, backend.name().as_ptr()) };
        if status != 0 {
            return Err(CollectiveError::local(
                "forming a group of MLX's own",
                "MLX refused, see its log",
            ));
        }
        Ok(Self {
            group,
            on_device: backend == MlxBackend::Nccl,
        })
    }

    /// JACCL, as the environment describes it; its ranks meet over the carrier of `side`.
    pub(crate) fn of_jaccl(side: View) -> Result<Self, CollectiveError> {
        let handle = Box::into_raw(Box::new(side)).cast();
        let callbacks = Callbacks { run, release };
        let mut why = [0u8; 256];
        // SAFETY: `handle` as in `of`, which the shim gives back even when it fails; `why` is as long
        // as said.
        let ctx =
            unsafe { offbook_jaccl_new(handle, callbacks, why.as_mut_ptr().cast(), why.len()) };
        if ctx.is_null() {
            let why = CStr::from_bytes_until_nul(&why).unwrap_or_default();
            let why = why.to_string_lossy();
            return Err(CollectiveError::local("forming a JACCL group", why));
        }
        Ok(Self {
            group: mlx_distributed_group { ctx },
            on_device: false,
        })
    }

    fn stream(&self) -> Stream {
        match self.on_device {
            true => Stream::thread_local_or_default(),
            false => collective_stream(),
        }
    }

    pub(crate) fn all_sum(&self, x: &Array) -> Result<Array, CollectiveError> {
        self.unary(Operation::AllSum, x, mlx_sys::mlx_distributed_all_sum)
    }

    pub(crate) fn all_max(&self, x: &Array) -> Result<Array, CollectiveError> {
        self.unary(Operation::AllMax, x, mlx_sys::mlx_distributed_all_max)
    }

    pub(crate) fn all_min(&self, x: &Array) -> Result<Array, CollectiveError> {
        self.unary(Operation::AllMin, x, mlx_sys::mlx_distributed_all_min)
    }

    pub(crate) fn all_gather(&self, x: &Array) -> Result<Array, CollectiveError> {
        self.unary(Operation::AllGather, x, mlx_sys::mlx_distributed_all_gather)
    }

    pub(crate) fn send(&self, x: &Array, to: i32) -> Result<Array, CollectiveError> {
        let stream = self.stream();
        new_array(Operation::Send, |res| {
            // SAFETY: all four are valid handles for the duration of the call.
            unsafe {
                mlx_sys::mlx_distributed_send(res, x.as_ptr(), to, self.group, stream.as_ptr())
            }
        })
    }

    /// Only for MLX's ring; our own groups receive in place.
    pub(crate) fn recv(
        &self,
        shape: &[i32],
        dtype: Dtype,
        from: i32,
    ) -> Result<Array, CollectiveError> {
        let stream = self.stream();
        new_array(Operation::Receive, |res| {
            // SAFETY: `shape` is as long as said, the others are valid handles during the call.
            unsafe {
                mlx_sys::mlx_distributed_recv(
                    res,
                    shape.as_ptr(),
                    shape.len(),
                    dtype.into(),
                    from,
                    self.group,
                    stream.as_ptr(),
                )
            }
        })
    }

    fn unary(
        &self,
        operation: Operation,
        x: &Array,
        call: UnaryCall,
    ) -> Result<Array, CollectiveError> {
        let stream = self.stream();
        new_array(operation, |res| {
            // SAFETY: `call` is one of mlx-c's functions of this signature; all handles are valid.
            unsafe { call(res, x.as_ptr(), self.group, stream.as_ptr()) }
        })
    }
}

impl Drop for MlxGroup {
    fn drop(&mut self) {
        // SAFETY: we own the handle; operations that still need the group share what is behind it.
        unsafe { mlx_sys::mlx_distributed_group_free(self.group) };
    }
}

/// MLX's own back-ends that we can be compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MlxBackend {
    Ring,
    Nccl,
}

impl MlxBackend {
    fn name(self) -> &'static CStr {
        match self {
            Self::Ring => c"ring",
            Self::Nccl => c"nccl",
        }
    }
}

type UnaryCall = unsafe extern "C" fn(
    *mut mlx_array,
    mlx_array,
    mlx_distributed_group,
    mlx_stream,
) -> std::os::raw::c_int;

/// `x`, but evaluated only after `first`.
pub(crate) fn after(x: &Array, first: &Array) -> Result<Array, CollectiveError> {
    let refused = || CollectiveError::Mlx {
        operation: Operation::Receive,
        why: "no dependency could be made".to_owned(),
    };
    // SAFETY: every vector is created, used and freed here; the arrays are valid handles, and the
    // vectors hold references of their own. The array taken out is owned by the new `Array`.
    unsafe {
        let inputs = mlx_sys::mlx_vector_array_new_value(x.as_ptr());
        let dependencies = mlx_sys::mlx_vector_array_new_value(first.as_ptr());
        let mut outputs = mlx_sys::mlx_vector_array_new();
        let status = mlx_sys::mlx_depends(&mut outputs, inputs, dependencies);
        let result = if status == 0 {
            new_array(Operation::Receive, |res| {
                mlx_sys::mlx_vector_array_get(res, outputs, 0)
            })
        } else {
            Err(refused())
        };
        mlx_sys::mlx_vector_array_free(inputs);
        mlx_sys::mlx_vector_array_free(dependencies);
        mlx_sys::mlx_vector_array_free(outputs);
        result
    }
}

/// The stream on which collectives wait: the caller's when that is a CPU stream, so that a model on
/// the CPU and its collectives share one thread; else the default CPU stream of this thread.
pub(crate) fn collective_stream() -> Stream {
    let stream = Stream::thread_local_or_default();
    // SAFETY: the device handle is created, filled and freed here, `stream` is valid throughout.
    let on_cpu = unsafe {
        let mut device = mlx_sys::mlx_device_new();
        let mut kind = 0;
        let known = mlx_sys::mlx_stream_get_device(&mut device, stream.as_ptr()) == 0
            && mlx_sys::mlx_device_get_type(&mut kind, device) == 0;
        mlx_sys::mlx_device_free(device);
        known && kind == mlx_sys::mlx_device_type__MLX_CPU
    };
    if on_cpu { stream } else { Stream::cpu() }
}

/// mlx-c ends the process on an error unless somebody handles it; mlx-rs does, from its first
/// fallible call on.
pub(crate) fn install_mlx_error_handler() {
    let cpu = Device::new(DeviceType::Cpu, 0);
    drop(Stream::try_default_on_device(&cpu));
}

/// Whether MLX finds RDMA over Thunderbolt on this machine.
pub(crate) fn jaccl_is_available() -> bool {
    // SAFETY: takes nothing, and nothing is thrown across.
    unsafe { offbook_jaccl_is_available() != 0 }
}

/// Sets a variable that MLX reads. Only before other threads run: see [`crate::Group::ring`].
pub(crate) fn set_environment(name: &str, value: &str) -> Result<(), CollectiveError> {
    let doing = "setting an environment variable";
    let name = CString::new(name).map_err(|why| CollectiveError::local(doing, why))?;
    let value = CString::new(value).map_err(|why| CollectiveError::local(doing, why))?;
    // SAFETY: both are C strings; `Group::ring` passes on to its caller that nobody may read the
    // environment at the same time.
    match unsafe { offbook_set_environment(name.as_ptr(), value.as_ptr()) } {
        0 => Ok(()),
        _ => Err(CollectiveError::local(
            doing,
            std::io::Error::last_os_error(),
        )),
    }
}

fn new_array(
    operation: Operation,
    fill: impl FnOnce(*mut mlx_array) -> std::os::raw::c_int,
) -> Result<Array, CollectiveError> {
    // SAFETY: an empty handle, owned by the `Array` that is made of it in either case.
    let mut array = unsafe { mlx_sys::mlx_array_new() };
    let status = fill(&mut array);
    // SAFETY: as above: `array` is ours alone.
    let array = unsafe { Array::from_ptr(array) };
    match status {
        0 => Ok(array),
        _ => Err(CollectiveError::Mlx {
            operation,
            why: "it gave no reason".to_owned(),
        }),
    }
}

/// Called by the shim on the stream's thread.
extern "C" fn run(handle: *mut c_void, call: *const RawCall) -> i32 {
    // SAFETY: the shim passes the `View` that it got from `MlxGroup::of`, alive until `release`, and
    // a call that is alive until we return.
    let (view, call) = unsafe { (&*handle.cast_const().cast::<View>(), &*call) };
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: MLX keeps input and output alive until the task is done, nobody else touches them
        // meanwhile, and `RawCall` is as the shim filled it.
        let work = unsafe { work_of(view, call) }?;
        view.carrier.run(work).ok()
    }));
    match outcome {
        Ok(Some(())) => 0,
        Ok(None) => 1,
        Err(_) => {
            // Even the attempt to say so must not unwind into C++.
            let _ = catch_unwind(AssertUnwindSafe(|| view.carrier.panicked()));
            2
        }
    }
}

/// Called by the shim once, when neither the group nor an operation needs the view any more.
extern "C" fn release(handle: *mut c_void) {
    // SAFETY: the very pointer that `MlxGroup::of` made of a box, given back exactly once.
    let view = unsafe { Box::from_raw(handle.cast::<View>()) };
    let _ = catch_unwind(AssertUnwindSafe(|| drop(view)));
}

/// # Safety
/// The memory that `call` points to is valid for its length and not touched by others during `'a`.
unsafe fn work_of<'a>(view: &'a View, call: &'a RawCall) -> Option<Work<'a>> {
    let dtype = Dtype::try_from(call.dtype).ok()?;
    // SAFETY: as promised by the caller; an empty array has no memory, and none is made up for it.
    let input = unsafe { bytes(call.input, call.input_bytes) };
    match call.kind {
        CALL_SEND => Some(Work::Send {
            dtype,
            input,
            to: usize::try_from(call.peer).ok()?,
        }),
        CALL_ALL_GATHER => {
            // SAFETY: MLX allocates the output of a gather afresh: it does not overlap the input.
            let output = unsafe { bytes_mut(call.output, call.output_bytes) };
            Some(Work::AllGather {
                dtype,
                input,
                output,
            })
        }
        kind => {
            let task = in_place(kind, &view.task)?;
            if call.input != call.output.cast_const() {
                // SAFETY: two allocations of the same size; `input` is not used after this.
                unsafe { bytes_mut(call.output, call.output_bytes) }.copy_from_slice(input);
            }
            // SAFETY: the only reference to the output from here on; `input` may be the same memory
            // and is not used any more.
            let data = unsafe { bytes_mut(call.output, call.output_bytes) };
            Some(Work::InPlace { task, dtype, data })
        }
    }
}

fn in_place(kind: u32, task: &Task) -> Option<InPlace<'_>> {
    Some(match (kind, task) {
        (CALL_ALL_SUM, Task::Reduce) => InPlace::Reduce(Reduction::Sum),
        (CALL_ALL_MAX, Task::Reduce) => InPlace::Reduce(Reduction::Max),
        (CALL_ALL_MIN, Task::Reduce) => InPlace::Reduce(Reduction::Min),
        (CALL_ALL_SUM, Task::SumScatter) => InPlace::SumScatter,
        (CALL_ALL_SUM, Task::Receive { from }) => InPlace::Receive { from: *from },
        (CALL_ALL_SUM, Task::Broadcast { root }) => InPlace::Broadcast { root: *root },
        (CALL_ALL_SUM, Task::GatherTo { root, parts }) => InPlace::GatherTo { root: *root, parts },
        _ => return None,
    })
}

/// # Safety
/// As for [`slice::from_raw_parts`], but for an empty slice any pointer will do.
unsafe fn bytes<'a>(pointer: *const c_void, length: usize) -> &'a [u8] {
    match length {
        0 => &[],
        // SAFETY: as the caller promises.
        _ => unsafe { slice::from_raw_parts(pointer.cast(), length) },
    }
}

/// # Safety
/// As for [`slice::from_raw_parts_mut`], but for an empty slice any pointer will do.
unsafe fn bytes_mut<'a>(pointer: *mut c_void, length: usize) -> &'a mut [u8] {
    match length {
        0 => &mut [],
        // SAFETY: as the caller promises.
        _ => unsafe { slice::from_raw_parts_mut(pointer.cast(), length) },
    }
}

// The same numbers stand in group.h.
const CALL_ALL_SUM: u32 = 0;
const CALL_ALL_MAX: u32 = 1;
const CALL_ALL_MIN: u32 = 2;
const CALL_ALL_GATHER: u32 = 3;
const CALL_SEND: u32 = 4;

/// `offbook_call` in group.h.
#[repr(C)]
struct RawCall {
    kind: u32,
    dtype: u32,
    peer: i32,
    input: *const c_void,
    input_bytes: usize,
    output: *mut c_void,
    output_bytes: usize,
}

/// `offbook_callbacks` in group.h.
#[repr(C)]
struct Callbacks {
    run: extern "C" fn(*mut c_void, *const RawCall) -> i32,
    release: extern "C" fn(*mut c_void),
}

// SAFETY: the signatures are those of group.h.
unsafe extern "C" {
    fn offbook_group_new(
        handle: *mut c_void,
        callbacks: Callbacks,
        rank: i32,
        size: i32,
    ) -> *mut c_void;
    fn offbook_jaccl_is_available() -> i32;
    fn offbook_jaccl_new(
        handle: *mut c_void,
        callbacks: Callbacks,
        why: *mut c_char,
        why_bytes: usize,
    ) -> *mut c_void;
    fn offbook_set_environment(name: *const c_char, value: *const c_char) -> i32;
}
