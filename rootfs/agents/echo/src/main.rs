//! The bundled agent; see the library.
#![forbid(unsafe_code)]

fn main() {
    echo_agent::run();
}
