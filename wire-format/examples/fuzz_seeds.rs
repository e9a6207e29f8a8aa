//! Writes the first inputs of the fuzz targets: `cargo run -p holdfast-wire-format --example fuzz_seeds -- fuzz/corpus`.

#[path = "../tests/common/mod.rs"]
mod common;
#[allow(dead_code)]
#[path = "../../fuzz/src/lib.rs"]
mod targets;

fn main() -> std::io::Result<()> {
    let Some(directory) = std::env::args_os().nth(1) else {
        eprintln!("the directory is missing (fuzz/corpus)");
        std::process::exit(2);
    };
    let directory = std::path::PathBuf::from(directory);
    for (target, name, input) in common::seeds::all_seeds(&targets::BLOCKS) {
        let directory = directory.join(target);
        std::fs::create_dir_all(&directory)?;
        std::fs::write(directory.join(name), input)?;
    }
    Ok(())
}
