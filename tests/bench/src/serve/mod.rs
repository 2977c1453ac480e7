//! How does agentd serve many agents on one model, beside llama-server on the same file?
//!
//! Both run on this machine at once and are loaded in turn, so that what disturbs one disturbs the other; ratios are
//! taken pair by pair. agentd's is the whole way of an agent's request ([`ours`]), llama-server's its own HTTP ([`peer`]).
//! The models have seeded weights (`tests/models`): the shape, the arithmetic and the memory of Qwen2.5-0.5B.
//! Workloads: [`workloads`], one function each. What must hold before any of it means something: [`parity`].

mod client;
mod load;
mod ours;
mod parity;
mod peer;
mod pressure;
mod processes;
mod workloads;

use crate::report;
use anyhow::{Context as _, Result, ensure};
use image::cache::Cache;
use image::source::Checkout;
use image::{models, programs};
use load::Load;
use ours::Ours;
use peer::{CacheOf, Kind, Peer, Setting};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use tests_host::scene::Programs;
use tests_models::{Layout, QWEN_HALF_BILLION, SMALL, Shape};
use tests_tidy::promises::{Bench, Row};

/// Of weights, `BYTES_PER_THREAD` in the engine's `model.rs`: more threads only wait for each other. llama-server is
/// started with as many threads, so that small models are compared too.
const BYTES_PER_THREAD: u64 = 32 * 1024 * 1024;

/// What is measured, and how large.
#[derive(Debug, Clone)]
pub struct Options {
    /// 0 is parity, 1 to 9 are the workloads, 18 is the idle engine; empty is all.
    pub workloads: Vec<u8>,
    /// The small shape and short prompts: minutes instead of hours.
    pub quick: bool,
    pub layout: Layout,
    /// Pairs of runs, interleaved.
    pub pairs: usize,
    /// With ggml's back end compiled for this machine alone, instead of the variant that agentd chooses.
    pub native: bool,
}

#[derive(Clone)]
pub(crate) struct Context {
    options: Options,
    checkout: Checkout,
    programs: Programs,
    peer: peer::Programs,
    /// The program of agents that wait.
    idle: PathBuf,
    shape: Shape,
    model: PathBuf,
    threads: u32,
    _folder: Arc<tempfile::TempDir>,
}

/// Each workload is a result of its own, so that they can be measured in several runs.
pub fn measure(options: Options) -> Result<Vec<Bench>> {
    let context = Context::prepare(options)?;
    let chosen =
        |number: u8| context.options.workloads.is_empty() || context.options.workloads.contains(&number);
    let mut benches = Vec::new();
    let mut loops = None;
    if chosen(0) {
        let mut rows = parity::words_agree(&context)?;
        let (found, measured) = parity::loops(&context)?;
        loops = Some(found);
        rows.extend(measured);
        benches.push(context.result(0, rows));
    }
    for (number, name, workload) in workloads::ALL {
        if chosen(number) {
            println!("W{number}: {name}");
            // What the others show is not lost with it; that it was not measured stands among them.
            let mut rows = workload(&context).unwrap_or_else(|error| {
                println!("  not measured: {error:#}");
                let what = format!("W{number}, {name}, {}: could not be measured", context.model_words());
                vec![Row::new(what, 1.0, "failure").at_most(0.0)]
            });
            rows.iter().for_each(|row| println!("  {}: {:.3} {}", row.what, row.value, row.unit));
            if let Some(loops) = &loops {
                rows.extend(rows.iter().filter_map(|row| loops.normalised(row)).collect::<Vec<_>>());
            }
            benches.push(context.result(number, rows));
        }
    }
    if chosen(18) {
        benches.push(context.result(18, workloads::idle(&context)?));
    }
    ensure!(!benches.is_empty(), "there is no such workload: 0 to 9 and 18 are");
    Ok(benches)
}

impl Context {
    fn prepare(options: Options) -> Result<Self> {
        let cache = Cache::from_env()?;
        let checkout = Checkout::find()?;
        let peer = peer::ensure_peer(&cache, &checkout)?;
        // Named by the environment, as for the tests of `tests/host`, or built now.
        let mut programs = match Programs::from_env() {
            Ok(programs) => {
                println!("programs as AGENTD_ENGINE_BIN and the like name them");
                programs
            }
            Err(_) => built(&cache, &checkout)?,
        };
        if options.native {
            programs.backends = peer.native_backends();
        }
        let folder = tempfile::Builder::new().prefix("agentd-serve-").tempdir()?;
        let idle = folder.path().join("idle");
        crate::idle::compile(&checkout.root, &idle)?;
        let shape = if options.quick { SMALL } else { QWEN_HALF_BILLION };
        let model = tests_models::ensure(&cache.path(""), &shape, options.layout)?;
        // As the engine takes them: one for each core, and none for fewer than so many bytes of weights.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let useful = std::fs::metadata(&model)?.len().div_ceil(BYTES_PER_THREAD);
        let threads = u32::try_from(useful.min(cores as u64).max(1))?;
        Ok(Self { options, checkout, programs, peer, idle, shape, model, threads, _folder: Arc::new(folder) })
    }

    /// The same with a model that says its last token for ever.
    fn repeating(&self) -> Result<Self> {
        let shape = self.shape.repeating("parrot");
        let model = tests_models::ensure(&Cache::from_env()?.path(""), &shape, self.options.layout)?;
        Ok(Self { shape, model, ..self.clone() })
    }

    fn result(&self, workload: u8, rows: Vec<Row>) -> Bench {
        let mut bench = report::here(&format!("serve-{workload}"), rows, &self.checkout);
        bench.command = format!("scripts/bench serve --workload {workload}");
        bench
    }

    fn model_words(&self) -> String {
        format!("{} {}", self.shape.name, self.options.layout.name())
    }

    /// How agentd was started, where that is not as shipped.
    fn ours_words(&self) -> &'static str {
        if self.options.native { " natively built" } else { "" }
    }
}

/// The appliance's programs, as the image has them.
fn built(cache: &Cache, checkout: &Checkout) -> Result<Programs> {
    let built = programs::build(cache, checkout)?;
    let of = |name: &str| -> Result<PathBuf> {
        let found = built.programs.iter().find(|program| program.built.ends_with(name));
        Ok(found.with_context(|| format!("no program {name}"))?.built.clone())
    };
    let folder_of = |name: &str| -> Result<PathBuf> {
        Ok(of(name)?.parent().context("a program lies in a folder")?.to_owned())
    };
    Ok(Programs {
        fixed: folder_of("agent-launcher")?,
        dynamic: folder_of("agentd")?,
        engine: of("agentd-engine")?,
        backends: built.library_folder.join("backends"),
        models: models::ensure(&cache.path(""))?.folder,
    })
}

/// Both servers on one model, loaded in turn.
pub(crate) struct Bed {
    ours: Ours,
    peer: Peer,
    /// How [`LATE`] reaches agentd's side; as the others where nothing is set.
    late: Option<client::Place>,
}

/// Between the words of two pairs: a workload takes its seeds from below this.
const PAIR_SEEDS: u64 = 1_000_000;
/// Words that are only used to find the peer's best setting.
const SEARCH_SEED: u64 = 900 * PAIR_SEEDS;

/// The number of the agent with a priority above all others'.
pub(crate) const LATE: usize = usize::MAX;

/// Whom a load is put on: the n-th agent's way in.
pub(crate) type Way<'a> = &'a (dyn Fn(usize) -> client::Place + Sync);

/// What a workload needs of a server.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need {
    /// Of the KV cache, all sequences together.
    cells: u32,
    /// Sequences at once.
    places: u32,
    agents: usize,
}

impl Bed {
    /// Beside llama-server with as many places and one cache for all of them.
    fn start(context: &Context, need: Need) -> Result<Self> {
        let kind =
            Kind::Many { places: need.places, cache: CacheOf::All, cache_ram_mib: peer::CACHE_RAM_MIB };
        Self::beside(context, need, kind)
    }

    fn beside(context: &Context, need: Need, kind: Kind) -> Result<Self> {
        let peer = peer_as(context, need, kind)?;
        let Need { cells, places, agents } = need;
        let ours = Ours::start(&context.programs, &context.idle, &context.model, cells, places, agents)?;
        Ok(Self { ours, peer, late: None })
    }

    /// Beside llama-server as it serves this load best, by tokens per second; each way to start it is tried once, and
    /// has its rows. `longest` is the most cells that one request takes.
    fn beside_best(
        context: &Context,
        need: Need,
        longest: u32,
        what: &str,
        load: impl Fn(Way<'_>, u64) -> Load,
    ) -> Result<(Self, Kind, Vec<Row>)> {
        Self::beside_best_of(context, need, longest, what, Kind::all(need.places), load)
    }

    /// The same for ways to start it that are given.
    fn beside_best_of(
        context: &Context,
        need: Need,
        longest: u32,
        what: &str,
        ways: Vec<Kind>,
        load: impl Fn(Way<'_>, u64) -> Load,
    ) -> Result<(Self, Kind, Vec<Row>)> {
        let mut rows = Vec::new();
        let mut best: Option<(f64, Kind)> = None;
        let mut ways: VecDeque<Kind> = ways.into();
        let mut divided = false;
        while let Some(kind) = ways.pop_front() {
            let peer = peer_as(context, need, kind)?;
            warm(&peer.place);
            let load = load(&|_| peer.place.clone(), SEARCH_SEED);
            let speed = if load.failures().is_empty() { load.tokens_per_second() } else { 0.0 };
            let first_ms = load::quantile(&load.firsts_ms(), 0.5).unwrap_or(f64::NAN);
            println!(
                "  llama-server {}: {speed:.2} tokens/s, first token p50 {first_ms:.0} ms",
                kind.words()
            );
            let name = format!("{what}: llama-server {}", kind.words());
            rows.push(Row::new(format!("{name}: tokens per second"), speed, "tokens/s").detail());
            rows.push(Row::new(format!("{name}: time to first token p50"), first_ms, "ms").detail());
            if best.is_none_or(|(most, _)| speed > most) {
                best = Some((speed, kind));
            }
            // The best of all these is tried with its cache divided too.
            if ways.is_empty() && !std::mem::replace(&mut divided, true) {
                ways.extend(best.and_then(|(_, kind)| kind.divided(need.cells, longest)));
            }
        }
        let (_, kind) = best.context("llama-server was not started")?;
        Ok((Self::beside(context, need, kind)?, kind, rows))
    }

    /// The same load on both, in turn, the first changing from pair to pair; each pair has words of its own. One small
    /// request to each goes before, which touches the weights' pages.
    fn pairs(&self, pairs: usize, load: impl Fn(Way<'_>, u64) -> Load) -> Vec<Pair> {
        let places: Vec<_> = self.ours.places().to_vec();
        let late = self.late.clone();
        let ours = move |agent: usize| match &late {
            Some(place) if agent == LATE => place.clone(),
            _ => places[agent % places.len()].clone(),
        };
        let place = self.peer.place.clone();
        let theirs = move |_: usize| place.clone();
        for place in [ours(0), theirs(0)] {
            warm(&place);
        }
        let run = |pair: usize| {
            let seed = PAIR_SEEDS * (pair as u64 + 1);
            if pair.is_multiple_of(2) {
                let ours = load(&ours, seed);
                Pair { ours, theirs: load(&theirs, seed) }
            } else {
                let theirs = load(&theirs, seed);
                Pair { ours: load(&ours, seed), theirs }
            }
        };
        (0..pairs).map(run).collect()
    }
}

fn peer_as(context: &Context, need: Need, kind: Kind) -> Result<Peer> {
    Peer::start(&context.peer, &context.model, &Setting { cells: need.cells, threads: context.threads, kind })
}

/// A small request, which touches the weights' pages.
fn warm(place: &client::Place) {
    client::Ask::new(place, tests_models::words(1, 64), 8).run();
}

pub(crate) struct Pair {
    ours: Load,
    theirs: Load,
}

/// Rows of what was measured pair by pair: the ratio, and both sides as they are.
pub(crate) struct Compared<'a> {
    what: String,
    pairs: &'a [Pair],
}

impl Compared<'_> {
    /// Ours over theirs.
    fn ratio(&self, of: &str, value: impl Fn(&Load) -> Option<f64>) -> Result<Row> {
        let ratio = |pair: &Pair| Some(value(&pair.ours)? / value(&pair.theirs)?);
        let ratios: Option<Vec<f64>> = self.pairs.iter().map(ratio).collect();
        let ratios = ratios.with_context(|| {
            let failed = |load: &Load| load.failures().first().map(|&why| why.to_owned());
            let why = self.pairs.iter().find_map(|pair| failed(&pair.ours).or_else(|| failed(&pair.theirs)));
            format!(
                "{}: no {of}: {}",
                self.what,
                why.unwrap_or_else(|| "a server does not say it".to_owned())
            )
        })?;
        Row::median(format!("{}: {of}, ours over theirs", self.what), &ratios, "x")
    }

    /// Each side by itself, for the record.
    fn sides(&self, of: &str, unit: &str, value: impl Fn(&Load) -> Option<f64>) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        let side = |name: &str, values: Vec<f64>| -> Result<Row> {
            Ok(Row::median(format!("{}: {of}, {name}", self.what), &values, unit)?.detail())
        };
        let ours: Vec<f64> = self.pairs.iter().filter_map(|pair| value(&pair.ours)).collect();
        let theirs: Vec<f64> = self.pairs.iter().filter_map(|pair| value(&pair.theirs)).collect();
        for (name, values) in [("agentd", ours), ("llama-server", theirs)] {
            if !values.is_empty() {
                rows.push(side(name, values)?);
            }
        }
        Ok(rows)
    }

    /// Requests without an answer, on each side.
    fn failures(&self) -> Vec<Row> {
        let count = |of: &dyn Fn(&Pair) -> usize| self.pairs.iter().map(of).sum::<usize>() as f64;
        let asked = count(&|pair| pair.ours.all().count());
        let ours = count(&|pair| pair.ours.failures().len());
        let theirs = count(&|pair| pair.theirs.failures().len());
        let what = &self.what;
        let mut rows = vec![
            Row::new(format!("{what}: failed requests of agentd's {asked}"), ours, "requests").at_most(0.0),
            Row::new(format!("{what}: failed requests of llama-server"), theirs, "requests"),
        ];
        let said = self.pairs.iter().flat_map(|pair| pair.theirs.failures()).next();
        if let Some(said) = said {
            rows[1].what += &format!(" ({})", said.chars().take(80).collect::<String>());
        }
        rows
    }

    fn own_cpu(&self) -> Result<Row> {
        parity::own_cpu(&self.what, self.pairs.iter().flat_map(|pair| [&pair.ours, &pair.theirs]))
    }
}
