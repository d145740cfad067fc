//! `offbook bench`: figures that anybody can measure again.

mod api;
mod collective;
mod decode;
mod loss;
mod prefill_memory;
pub(crate) mod message;
mod serve;
mod step;
pub(crate) mod ranks;
pub(crate) mod wire;
pub(crate) mod rank;
mod form;

use anyhow::Result;

use crate::cli::BenchCommand;
use crate::logging;

pub(crate) async fn run(command: BenchCommand) -> Result<()> {
    logging::start("bench");
    match command {
        BenchCommand::Api(options) => api::run(options).await,
        BenchCommand::Collective(options) => collective::run(options).await,
        BenchCommand::Decode(options) => decode::run(options).await,
        BenchCommand::Loss(options) => loss::run(options).await,
        BenchCommand::Message(options) => message::run(options).await,
        BenchCommand::PrefillMemory(options) => prefill_memory::run(options).await,
        BenchCommand::Serve(options) => serve::run(options).await,
        BenchCommand::Step(options) => step::run(options).await,
    }
}
