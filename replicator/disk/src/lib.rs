//! io_uring and O_DIRECT: the disks under a replicator.
