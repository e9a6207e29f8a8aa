//! The deciding half of the replicator: takes events and the time, returns actions.
