//! Writes the tiny vision model with random weights into a folder: `cargo run --release --example
//! tiny-vlm DIR`.

fn main() -> std::io::Result<()> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| ".".into());
    ecso_llama::testing::tiny_vlm(std::path::Path::new(&folder)).map(|_| ())
}
