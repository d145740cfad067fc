//! `offbook`: one binary for every process of a cluster and for every hand that works on it.

mod cli;
mod logging;
mod cluster_file;
mod fast_synch;
mod throttle;
mod settings;
mod byte_size;
mod demo_model;
mod data_dir;
mod stop_signals;
mod local_cluster;
mod up;
mod node;
mod kept_actors;
mod backend;
mod shard;
mod generate;
mod status;
mod stress;
mod plan;
mod planner;
mod bench;
mod doctor;

use std::panic;
use std::process::{self, ExitCode};

use clap::Parser;

use cli::{BenchCommand, Cli, Command};

fn main() -> ExitCode {
    end_quietly_when_nobody_reads();
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("offbook: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Up(options) => on_this_thread(up::run(options)),
        Command::Node(options) => {
            logging::start(&options.name);
            actix::System::new().block_on(node::run(options))
        }
        Command::Shard(options) => {
            logging::start(&format!("{}/shard-0", options.name));
            actix::System::new().block_on(shard::run(options))
        }
        Command::Cluster(command) => on_this_thread(cluster_file::command(command)),
        Command::Chat(options) => {
            on_this_thread(async { Ok(offbook_api::chat_client::run(options.into()).await?) })
        }
        Command::Generate(options) => on_this_thread(generate::run(options)),
        Command::Plan(options) => on_this_thread(plan::run(options)),
        Command::Status(options) => on_this_thread(status::run(options)),
        Command::Stress(options) => on_this_thread(stress::run(options)),
        // Measured actors need an actix system around them.
        Command::Bench(command @ (BenchCommand::Message(_) | BenchCommand::Api(_))) => {
            actix::System::new().block_on(bench::run(command))
        }
        Command::Bench(command) => on_this_thread(bench::run(command)),
        Command::Doctor(options) => on_this_thread(doctor::run(options)),
        Command::Rank(options) => bench::rank::run(&options),
        Command::Callee(options) => bench::message::serve(&options),
    }
}

/// `offbook plan | head -1` is not a failure of ours: what is printed to a closed pipe ends the process,
/// without the words of a panic.
fn end_quietly_when_nobody_reads() {
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let said = info.payload_as_str().unwrap_or_default();
        if said.starts_with("failed printing to stdout") && said.contains("Broken pipe") {
            process::exit(ENDED_BY_A_CLOSED_PIPE);
        }
        report(info);
    }));
}

/// Child processes die with the thread that started them, so everything runs on the main thread.
fn on_this_thread(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

/// What a shell shows for a program that the closing of a pipe ended.
const ENDED_BY_A_CLOSED_PIPE: i32 = 141;
