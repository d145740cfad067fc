//! What a CPU computes with kernels of ours, where those of MLX cost a batch as much as so many single
//! tokens: products with quantised weights, and attention. Each is a node of MLX's graph like any other,
//! put there by the shim. Whatever concerns a row is computed in one order, whatever the company of the
//! row: tokens are the same alone and in a batch, in a prompt and one by one.

mod attention;
mod crew;
mod processor;
mod product;

use std::sync::OnceLock;

use mlx_rs::{Device, DeviceType};

pub(crate) use self::attention::{Reading, Sight, attend, attends, attends_heads_of};
pub use self::crew::CPU_THREADS;
pub(crate) use self::product::{product, product_of_each};

/// Whether this process computes on a CPU. It does not change its mind.
fn is_on_cpu() -> bool {
    static ON_CPU: OnceLock<bool> = OnceLock::new();
    *ON_CPU.get_or_init(|| {
        let device = Device::try_default().and_then(|device| device.get_type());
        matches!(device, Ok(DeviceType::Cpu))
    })
}
