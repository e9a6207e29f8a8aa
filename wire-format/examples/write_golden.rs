//! Writes golden files that are missing; with names as arguments, replaces those. See `tests/golden/README.md`.

#[path = "../tests/common/mod.rs"]
mod common;

use common::golden;

fn main() -> std::io::Result<()> {
    let replace: Vec<String> = std::env::args().skip(1).collect();
    let all = common::sample::all();
    if let Some(unknown) = replace
        .iter()
        .find(|name| all.iter().all(|(n, _)| n != *name))
    {
        eprintln!("there is no {unknown}");
        std::process::exit(2);
    }
    for (name, sample) in all {
        let path = golden::path(&name);
        if path.exists() && !replace.contains(&name) {
            continue;
        }
        let bytes = sample.encode();
        let text = format!(
            "# {name}, {} bytes; made by examples/write_golden.rs\n{}",
            bytes.len(),
            golden::to_text(&bytes)
        );
        std::fs::write(&path, text)?;
        println!("{}", path.display());
    }
    Ok(())
}
