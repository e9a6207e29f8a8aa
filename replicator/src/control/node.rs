//! What the control server needs from the process it speaks for.

use super::protocol::{EventReport, NodeStatus};
use holdfast_replicator_core::api::{AdminResult, Command, Refusal};
use std::future::Future;
use tokio::sync::broadcast;

/// A handle on the running replicator, usable from any thread; its calls reach the shards by message and never
/// wait for I/O of the application.
pub trait Node: Clone + Send + Sync + 'static {
    /// Name of this node.
    fn name(&self) -> String;

    /// A snapshot. A shard that does not answer in time is left out of no report: its last snapshot stands in.
    fn status(&self) -> impl Future<Output = NodeStatus> + Send;

    /// Hands a command to the core of a service.
    fn command(&self, service: &str, command: Command) -> impl Future<Output = AdminResult> + Send;

    /// Takes a detached service up again. `disk`: also one whose disk failed or was detached, if it is not primary.
    fn attach(&self, service: &str, disk: bool) -> impl Future<Output = AdminResult> + Send;

    /// Reads identity and trusted peers again, from files that the command line may have changed, and has the link act by them.
    fn reload(&self) -> impl Future<Output = AdminResult> + Send;

    /// Why the last handshake with that peer (by node name) ended as it did, in words.
    ///
    /// # Errors
    /// No such service or peer, or the two have not met since this process began.
    fn explain_handshake(
        &self,
        service: &str,
        peer: &str,
    ) -> impl Future<Output = Result<String, Refusal>> + Send;

    /// The last lines of the event log, oldest first, and every line after those.
    fn events(&self) -> (Vec<EventReport>, broadcast::Receiver<EventReport>);
}
