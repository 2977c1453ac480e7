//! Whatever a GGUF file says of itself: is it refused, or understood within bounds? (E20)
//!
//! In:     eight bytes, the file's length as it is claimed; then the file's head. What follows the head are zeros.
//! True:   nothing panics, nothing overflows, no range beyond the claimed length is read, no memory is taken by a claim;
//!         what is accepted can be planned for, and the plan's parts are its sum.
#![no_main]

use agentd_domain::gguf;
use agentd_gpu::plan::{Layout, Sizes, need};
use libfuzzer_sys::fuzz_target;

/// Of a head, as `agentd-domain` bounds it.
const HEAD_BYTES: u64 = 64 << 20;

fuzz_target!(|input: &[u8]| {
    let Some((length, head)) = input.split_first_chunk::<8>() else { return };
    let file_bytes = u64::from_le_bytes(*length);
    let mut read_bytes: u64 = 0;
    let checked = gguf::check(file_bytes, &mut |at, into: &mut [u8]| {
        let end = at.checked_add(into.len() as u64).expect("a range that can be");
        assert!(end <= file_bytes, "bytes up to {end} of {file_bytes} were asked for");
        read_bytes += into.len() as u64;
        for (index, byte) in into.iter_mut().enumerate() {
            *byte = usize::try_from(at).ok().and_then(|at| head.get(at + index)).copied().unwrap_or(0);
        }
        Ok(())
    });
    // Passed over once, in blocks, up to its bound: a claim of a terabyte makes nobody read it.
    assert!(read_bytes <= 2 * HEAD_BYTES, "{read_bytes} bytes were read");
    let summary = match checked {
        Ok(summary) => summary,
        Err(error) => {
            let report = error.report("model.gguf");
            assert!(!report.why.is_empty() && !report.code.is_empty());
            return;
        }
    };
    for (context_tokens, sequences) in [(0, 0), (4096, 64), (u64::MAX, u64::MAX)] {
        let sizes =
            Sizes::of_engine(&summary.shape, summary.kind(), summary.context_length, context_tokens, sequences);
        for layout in [
            Layout::host_alone("host"),
            Layout {
                host: "host".to_owned(),
                devices: vec![("first".to_owned(), 3 << 30), ("second".to_owned(), u64::MAX)],
                offloaded: Some(summary.parameters),
            },
        ] {
            let planned = need(&summary.shape, &summary.architecture, &sizes, &layout, &|_| 1 << 20);
            for device in &planned.devices {
                assert!(device.total_bytes() >= device.weights_bytes.max(device.kv_bytes));
            }
        }
    }
});
