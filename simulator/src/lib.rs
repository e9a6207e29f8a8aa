//! A deterministic world that runs the cores from a seed.
