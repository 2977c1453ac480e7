//! Does the real engine keep the promises of B12, B14, E4, E6, E7, E9, E10, E16, E17 and of the GGUF lines of B20?
//!
//! Real process, real llama.cpp, the models that the image builder makes. The mathematics is compared with NumPy
//! scripts in `tests/fixtures/models` that share no code with us or with llama.cpp.

mod client;
mod companion;
mod conversations;
mod devices;
mod files;
mod formula;
mod guesses;
mod holders;
mod limits;
mod mathematics;
mod measured;
mod package;
mod plan;
mod rude;
mod seeded;
mod shapes;
mod sharing;
mod spread;
mod turns;
mod vulkan;
