//! How an application reaches a volume: NBD.
