//! An agent that behaves badly in one way, named by its first argument.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("exit") => {
            println!("leaving at once");
            ExitCode::from(3)
        }
        // Touches every page, so that the memory is really charged to the cgroup.
        Some("eat-memory") => {
            println!("eating");
            let mut eaten: Vec<Vec<u8>> = Vec::new();
            loop {
                eaten.push(vec![1; 1 << 20]);
                std::hint::black_box(&eaten);
            }
        }
        other => {
            eprintln!("unknown way to misbehave: {other:?}");
            ExitCode::from(64)
        }
    }
}
