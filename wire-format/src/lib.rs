//! Every byte layout of Holdfast: frames between nodes, metadata on disk.
