//! How many of its graphs a device has instantiated. MLX keeps the graphs of a step and updates them;
//! instantiating one anew takes as long as many collectives, and a kernel that cannot be updated would
//! do that to every step. NVIDIA's profiling interface (CUPTI) says what really happens.
#![allow(unsafe_code)]

use std::{
    ffi::c_void,
    ptr,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use cudarc::cupti::sys;

use crate::measure::device;

/// Graphs that this process's device has instantiated since this was asked first. `None` where that
/// cannot be known: without CUDA, without CUPTI's library, or while another profiler uses it.
pub(crate) fn instantiated() -> Option<u64> {
    static WATCHED: OnceLock<bool> = OnceLock::new();
    let watched = *WATCHED.get_or_init(|| device() == CUDA && watch().is_some());
    watched.then(|| INSTANTIATED.load(Relaxed))
}

fn watch() -> Option<()> {
    // SAFETY: looks for the library, and calls into it only when it is there; the callback is a
    // function that lives as long as the process and takes no user data.
    unsafe {
        if !sys::is_culib_present() {
            return None;
        }
        let mut subscriber = ptr::null_mut();
        let subscribed = sys::cuptiSubscribe(&mut subscriber, Some(called), ptr::null_mut());
        subscribed.result().ok()?;
        for function in INSTANTIATING {
            let domain = sys::CUpti_CallbackDomain::CUPTI_CB_DOMAIN_DRIVER_API;
            let enabled = sys::cuptiEnableCallback(1, subscriber, domain, function as u32);
            enabled.result().ok()?;
        }
    }
    Some(())
}

/// Called by the driver, at the beginning and at the end of a function that was asked for.
unsafe extern "C" fn called(
    _: *mut c_void,
    _: sys::CUpti_CallbackDomain,
    _: sys::CUpti_CallbackId,
    data: *const c_void,
) {
    // SAFETY: of the domain that was asked for, the data is this structure, valid during the call.
    let site = unsafe { (*data.cast::<sys::CUpti_CallbackData>()).callbackSite };
    if site == sys::CUpti_ApiCallbackSite::CUPTI_API_ENTER {
        INSTANTIATED.fetch_add(1, Relaxed);
    }
}

static INSTANTIATED: AtomicU64 = AtomicU64::new(0);
/// What `device` says of this one.
const CUDA: &str = "gpu (cuda)";
const INSTANTIATING: [sys::CUpti_driver_api_trace_cbid; 5] = {
    use sys::CUpti_driver_api_trace_cbid_enum as function;
    [
        function::CUPTI_DRIVER_TRACE_CBID_cuGraphInstantiate,
        function::CUPTI_DRIVER_TRACE_CBID_cuGraphInstantiate_v2,
        function::CUPTI_DRIVER_TRACE_CBID_cuGraphInstantiateWithFlags,
        function::CUPTI_DRIVER_TRACE_CBID_cuGraphInstantiateWithParams,
        function::CUPTI_DRIVER_TRACE_CBID_cuGraphInstantiateWithParams_ptsz,
    ]
};
