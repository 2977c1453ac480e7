//! What does ggml know that `llama-cpp-2` does not pass on?
//!
//! The PCI addresses of devices, the memory of a model with its context by device ([`Memory`], through
//! ffi/memory.cpp), how many rows of logits a context has room for ([`with_outputs`]), and which part of a model each
//! device gets ([`Split`]). The contexts made by [`Memory`]
//! are nobody else's: the two ways to llama.cpp never share one.
//!
//! Call only after the back ends are loaded (`LlamaBackend::init`).
#![expect(unsafe_code, reason = "llama.cpp's functions that have no safe wrapper")]

use agentd_domain::device::Placement;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_sys_2::{
    GGML_BACKEND_DEVICE_TYPE_CPU, LLAMA_LOAD_MODE_NONE, ggml_backend_dev_count, ggml_backend_dev_get,
    ggml_backend_dev_get_props, ggml_backend_dev_name, ggml_backend_dev_t, ggml_backend_dev_type,
    ggml_backend_load, ggml_backend_reg_count, ggml_backend_reg_dev_count, ggml_backend_reg_get,
    ggml_backend_reg_name, llama_context_default_params, llama_context_params, llama_max_devices,
    llama_model_default_params, llama_model_params,
};
use std::ffi::{CStr, CString, c_char};
use std::path::Path;

/// As `agentd_buffer` in ffi/memory.cpp.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Buffer {
    /// 0 is host memory, else one more than the device's index in ggml's list.
    pub(crate) device: u64,
    pub(crate) model_bytes: u64,
    pub(crate) context_bytes: u64,
    pub(crate) compute_bytes: u64,
}

/// An `agentd_memory` of ffi/memory.cpp; only its address is known here.
#[repr(C)]
struct Raw {
    _hidden: [u8; 0],
}

unsafe extern "C" {
    fn agentd_memory_open(
        path: *const c_char,
        model: *const llama_model_params,
        context: *const llama_context_params,
        error: *mut c_char,
        room: usize,
    ) -> *mut Raw;
    fn agentd_memory_close(memory: *mut Raw);
    fn agentd_memory_buffers(memory: *const Raw, into: *mut Buffer, room: usize) -> i64;
    fn agentd_memory_vocabulary(memory: *const Raw) -> u32;
    fn agentd_memory_fill(memory: *mut Raw, tokens: u32) -> i64;
    fn agentd_outputs_of_next(rows: u32);
    fn agentd_split_of_next(shares: *const f32, count: usize);
}

/// Room for a reason, which C++ cuts to it.
const ERROR_BYTES: usize = 512;

/// The back ends that are loaded, by llama.cpp's names, with the number of their devices.
pub(crate) fn registered() -> Vec<(String, u32)> {
    // SAFETY: takes nothing and returns a number.
    let count = unsafe { ggml_backend_reg_count() };
    let one = |index| {
        // SAFETY: the index is below the count; back ends are never removed from ggml's list, and by ggml's contract a name
        // lives as long as its back end.
        let (name, devices) = unsafe {
            let registered = ggml_backend_reg_get(index);
            (CStr::from_ptr(ggml_backend_reg_name(registered)), ggml_backend_reg_dev_count(registered))
        };
        (name.to_string_lossy().into_owned(), u32::try_from(devices).unwrap_or(u32::MAX))
    };
    (0..count).map(one).collect()
}

/// Loads the back end in this file, unlike [`load_backends_from_path`](llama_cpp_2::llama_backend::load_backends_from_path)
/// with its reasons in llama.cpp's log when it cannot.
pub(crate) fn load(file: &Path) {
    let Ok(path) = CString::new(file.as_os_str().as_encoded_bytes()) else { return };
    // SAFETY: the path ends with a zero byte and outlives the call. What the file's own start does is llama.cpp's, from the
    // package that this program came with.
    unsafe { ggml_backend_load(path.as_ptr()) };
}

/// Whether memory is taken, or only counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Allocation {
    Counted,
    /// Copied from the file, not mapped, so that it shows as this process's own.
    Taken,
}

/// The context that `make` makes has room for so many rows of logits in one batch, 0 for one for every token.
///
/// `llama-cpp-2` 0.1.160 has no setter for `n_outputs_max`; the linker leads its call past ffi/memory.cpp, which sets it.
pub(crate) fn with_outputs<T>(rows: u32, make: impl FnOnce() -> T) -> T {
    // SAFETY: takes a number and writes a variable of this thread.
    unsafe { agentd_outputs_of_next(rows) };
    let made = make();
    // SAFETY: as above. Nothing is left for a context that somebody else makes.
    unsafe { agentd_outputs_of_next(0) };
    made
}

/// A [`Placement`] as llama.cpp takes it (`load_tensors` in `llama-model.cpp`): the layer `n` of so many that go to devices is
/// the first device's whose share and those before it are more than `n`. With numbers of layers as shares that is exact.
pub(crate) struct Split {
    /// In ggml's list.
    devices: Vec<usize>,
    shares: Vec<f32>,
    layers: u32,
}

impl Split {
    pub(crate) fn of(placement: &Placement) -> Result<Self, String> {
        // SAFETY: takes nothing and returns a number.
        let most = unsafe { llama_max_devices() };
        if placement.stretches.len() > most {
            return Err(format!("llama.cpp takes {most} devices at most"));
        }
        let place = |name: &str| {
            let found = (0..device_count()).find(|index| {
                // SAFETY: the index is below the count; devices are never removed from ggml's list, and by ggml's contract
                // a name lives as long as its device.
                let own = unsafe { CStr::from_ptr(ggml_backend_dev_name(ggml_backend_dev_get(*index))) };
                own.to_bytes() == name.as_bytes()
            });
            found.ok_or_else(|| format!("there is no device {name}"))
        };
        let devices: Result<Vec<usize>, String> =
            placement.stretches.iter().map(|stretch| place(&stretch.device)).collect();
        let shares = placement.stretches.iter().map(|stretch| stretch.layers as f32).collect();
        Ok(Self { devices: devices?, shares, layers: placement.layers() })
    }

    /// What `load` loads is split like this.
    pub(crate) fn with<T>(&self, load: impl FnOnce(LlamaModelParams) -> T) -> Result<T, String> {
        let parameters = LlamaModelParams::default().with_n_gpu_layers(self.layers);
        let parameters = parameters.with_devices(&self.devices).map_err(|error| error.to_string())?;
        // SAFETY: the numbers are as many as is said; C++ copies them into a variable of this thread.
        unsafe { agentd_split_of_next(self.shares.as_ptr(), self.shares.len()) };
        let loaded = load(parameters);
        // SAFETY: of no numbers none is read. Nothing is left for a model that somebody else loads.
        unsafe { agentd_split_of_next(self.shares.as_ptr(), 0) };
        Ok(loaded)
    }

    /// The same for llama.cpp's own parameters: its list of devices, closed by a null, and as many shares as it reads.
    fn raw(&self) -> (Vec<ggml_backend_dev_t>, Vec<f32>) {
        let address = |index: &usize| {
            // SAFETY: the index was below the count when it was found, and devices are never removed.
            unsafe { ggml_backend_dev_get(*index) }
        };
        let devices = self.devices.iter().map(address).chain([std::ptr::null_mut()]).collect();
        // SAFETY: takes nothing and returns a number.
        let most = unsafe { llama_max_devices() };
        let shares = self.shares.iter().copied().chain(std::iter::repeat(0.0)).take(most).collect();
        (devices, shares)
    }
}

/// A model and a context that exist to be measured.
pub(crate) struct Memory(*mut Raw);

impl Memory {
    /// Blocks as long as a load does. llama.cpp may end the process over a file whose content lies. `outputs` as for
    /// [`with_outputs`].
    pub(crate) fn open(
        path: &Path,
        split: Option<&Split>,
        context: &LlamaContextParams,
        outputs: u32,
        allocation: Allocation,
    ) -> Result<Self, String> {
        let path = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|error| error.to_string())?;
        // SAFETY: takes nothing and returns a value.
        let mut model = unsafe { llama_model_default_params() };
        model.no_alloc = allocation == Allocation::Counted;
        model.load_mode = LLAMA_LOAD_MODE_NONE;
        let mut placed = split.map(Split::raw);
        if let (Some(split), Some((devices, shares))) = (split, &mut placed) {
            model.n_gpu_layers = i32::try_from(split.layers).unwrap_or(i32::MAX);
            model.devices = devices.as_mut_ptr();
            model.tensor_split = shares.as_ptr();
        }
        let mut context = raw(context);
        context.n_outputs_max = outputs;
        let mut error: [c_char; ERROR_BYTES] = [0; ERROR_BYTES];
        // SAFETY: the path ends with a zero byte; both structures are the ones of llama.cpp's header, made by its own
        // defaults; the lists they point to end as llama.cpp wants it (`Split::raw`); `error` has the room that is
        // said. All outlive the call, and C++ keeps none of them.
        let opened = unsafe {
            agentd_memory_open(
                path.as_ptr(),
                &raw const model,
                &raw const context,
                error.as_mut_ptr(),
                error.len(),
            )
        };
        if opened.is_null() { Err(words(&error)) } else { Ok(Self(opened)) }
    }

    /// Host memory first, then each device of ggml's list.
    pub(crate) fn buffers(&self) -> Vec<Buffer> {
        let mut buffers = vec![Buffer::default(); device_count() + 1];
        // SAFETY: the address came from `open` and lives; the buffer has the room that is said, of the same layout.
        let count = unsafe { agentd_memory_buffers(self.0, buffers.as_mut_ptr(), buffers.len()) };
        buffers.truncate(usize::try_from(count).unwrap_or(0));
        buffers
    }

    pub(crate) fn vocabulary(&self) -> u32 {
        // SAFETY: the address came from `open` and lives.
        unsafe { agentd_memory_vocabulary(self.0) }
    }

    /// Computes so many tokens and returns the rows of logits of the last batch. Not after [`Allocation::Counted`].
    pub(crate) fn fill(&mut self, tokens: u32) -> Result<u64, String> {
        // SAFETY: the address came from `open` and lives; nobody else computes on this context, as `&mut` says.
        let rows = unsafe { agentd_memory_fill(self.0, tokens) };
        u64::try_from(rows).map_err(|_| format!("llama.cpp could not compute {tokens} tokens: {rows}"))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the address came from `open` and is not used again.
        unsafe { agentd_memory_close(self.0) };
    }
}

/// `0000:c1:00.0` of each device in ggml's order; `None` for those that are on no bus. Asks each device for its memory
/// too, so not after one was lost: CUDA's back end ends the process then.
pub(crate) fn device_addresses() -> Vec<Option<String>> {
    (0..device_count())
        .map(|index| {
            // SAFETY: an all-zero `ggml_backend_dev_props` is a valid value: numbers and null pointers.
            let mut properties = unsafe { std::mem::zeroed() };
            // SAFETY: the index is below the count; devices are never removed from ggml's list; the structure is ours.
            unsafe { ggml_backend_dev_get_props(ggml_backend_dev_get(index), &raw mut properties) };
            let id: *const c_char = properties.device_id;
            if id.is_null() {
                return None;
            }
            // SAFETY: not null, and by ggml's contract a string that lives as long as the device.
            let id = unsafe { CStr::from_ptr(id) };
            Some(id.to_string_lossy().into_owned())
        })
        .collect()
}

/// Whether models are computed on anything but the processor. Asks no device for its memory.
pub(crate) fn any_accelerator() -> bool {
    (0..device_count()).any(|index| {
        // SAFETY: the index is below the count; devices are never removed from ggml's list.
        let kind = unsafe { ggml_backend_dev_type(ggml_backend_dev_get(index)) };
        kind != GGML_BACKEND_DEVICE_TYPE_CPU
    })
}

fn device_count() -> usize {
    // SAFETY: takes nothing and reads a list that only loading back ends changes.
    unsafe { ggml_backend_dev_count() }
}

/// The same parameters as llama.cpp's own structure. What `llama-cpp-2` cannot set has its default there too.
fn raw(wanted: &LlamaContextParams) -> llama_context_params {
    // SAFETY: takes nothing and returns a value.
    let mut context = unsafe { llama_context_default_params() };
    context.n_ctx = wanted.n_ctx().map_or(0, std::num::NonZeroU32::get);
    context.n_batch = wanted.n_batch();
    context.n_ubatch = wanted.n_ubatch();
    context.n_seq_max = wanted.n_seq_max();
    context.n_threads = wanted.n_threads();
    context.n_threads_batch = wanted.n_threads_batch();
    context.pooling_type = i32::from(wanted.pooling_type());
    context.flash_attn_type = wanted.flash_attention_policy();
    context.type_k = wanted.type_k().into();
    context.type_v = wanted.type_v().into();
    context.embeddings = wanted.embeddings();
    context.offload_kqv = wanted.offload_kqv();
    context.op_offload = wanted.op_offload();
    context.swa_full = wanted.swa_full();
    context.kv_unified = wanted.kv_unified();
    context.no_perf = true;
    context
}

fn words(text: &[c_char]) -> String {
    let bytes: Vec<u8> =
        text.iter().map(|byte| byte.to_ne_bytes()[0]).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
