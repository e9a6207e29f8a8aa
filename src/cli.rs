//! Every verb and option; help, completions and man pages all come from here.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Block-level replication and high availability for machines that share no storage.
#[derive(Parser)]
#[command(
    name = "holdfast",
    version,
    max_term_width = 100,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 a confirmation is missing, \
                  4 no replicator answers, 5 checked and found bad."
)]
pub struct Cli {
    #[command(flatten)]
    pub place: Place,
    #[command(subcommand)]
    pub verb: Verb,
}

/// Which node a command speaks to.
#[derive(Args)]
pub struct Place {
    /// Control socket of the running replicator [default: what the configuration says]
    #[arg(long, global = true, env = "HOLDFAST_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Configuration file [default: /etc/holdfast/holdfast.toml]
    #[arg(long, global = true, env = "HOLDFAST_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Subcommand)]
pub enum Verb {
    /// Give this node an identity
    Init(Init),
    /// Print a token with which another node can join this one, and wait for it
    Token(Token),
    /// Join the node that printed the token, so that the two trust each other
    Join(Join),
    /// Show or change the certificate by which peers know this node
    #[command(subcommand)]
    Certificate(Certificate),
    /// Have the running replicator read its peers and certificates again (as SIGHUP does)
    Reload,
    /// Run the replicator
    Replicator,
    /// Show services, copies, links, lag and resync
    Status(Status),
    /// Show the event log: every decision, and why
    Events(Events),
    /// Create and change volumes
    #[command(subcommand)]
    Volume(Volume),
    /// Make this node's copy the primary: the one that accepts writes
    Promote(Promote),
    /// Stop accepting writes on this node
    Demote(Service),
    /// Stop a service on this node cleanly while the replicator runs on; `attach` or the replicator's next start takes it up again
    Detach(Detach),
    /// Take a detached service up again on this node, from its disks as they are now
    Attach(Service),
    /// Allow the link to a peer, or to all of them
    Connect(Peer),
    /// Cut the link to a peer, or to all of them
    Disconnect(Peer),
    /// Hold back resync and verify (mirroring goes on), or with --io the application's requests
    Pause(Hold),
    /// Let go on what `pause` held back
    Resume(Hold),
    /// Compare the copies block by block, while in use
    Verify(Verify),
    /// Show a running resync, with rate and time left
    Resync(Resync),
    /// Declare this node's copy worthless and take a full copy from the peer
    Invalidate(Discard),
    /// Show or resolve a split brain: two copies with writes that the other lacks
    #[command(subcommand)]
    SplitBrain(SplitBrain),
    /// Say what the last handshake with a peer decided, and from which facts
    ExplainHandshake(ExplainHandshake),
    /// Print what the metadata of this node's copies say, from the disk itself
    DumpMetadata(DumpMetadata),
    /// Show replication, a crash and a failover on this machine, and check every claim
    Demo(Demo),
    /// Print a completion script
    Completions(Completions),
    /// Print the manual page, or write one for every verb
    Man(Man),
}

#[derive(Args)]
pub struct StateDir {
    /// State directory of this node [default: what the configuration says, or /var/lib/holdfast]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

#[derive(Args)]
pub struct Init {
    /// Name of this node, known to its peers [default: the configuration's, or the host name]
    #[arg(long)]
    pub name: Option<String>,
    #[command(flatten)]
    pub state: StateDir,
}

#[derive(Subcommand)]
pub enum Certificate {
    /// Show the fingerprints of the certificate in use and of the next one
    Show(StateDir),
    /// Make the next certificate; peers that are connected are told of it
    Prepare(StateDir),
    /// Use the next certificate from now on
    Activate {
        #[command(flatten)]
        state: StateDir,
        /// Even where a peer has not confirmed it: it refuses this node until the two join anew
        #[arg(long)]
        force: bool,
        /// Do not ask before a force
        #[arg(long, requires = "force")]
        yes: bool,
    },
}

#[derive(Args)]
pub struct LinkAddress {
    /// Address of this node's link, for the other node to remember; may be repeated
    /// [default: the addresses the configuration listens on]
    #[arg(long, value_name = "IP:PORT")]
    pub link_address: Vec<std::net::SocketAddr>,
}

#[derive(Args)]
pub struct Token {
    /// Where to wait for the joining node (UDP)
    #[arg(long, value_name = "IP:PORT", default_value = "0.0.0.0:7742")]
    pub listen: std::net::SocketAddr,
    /// Address at which the joining node finds this one; may be repeated
    /// [default: the address of --listen, or those of the link]
    #[arg(long, value_name = "IP:PORT")]
    pub address: Vec<std::net::SocketAddr>,
    /// Minutes until the token expires
    #[arg(long, value_name = "MINUTES", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=1440))]
    pub valid: u64,
    #[command(flatten)]
    pub link: LinkAddress,
    #[command(flatten)]
    pub state: StateDir,
}

#[derive(Args)]
pub struct Join {
    /// The token; read from standard input when left out, which keeps it out of process lists
    pub token: Option<String>,
    #[command(flatten)]
    pub link: LinkAddress,
    #[command(flatten)]
    pub state: StateDir,
}

#[derive(Args)]
pub struct Service {
    /// Name of the service; may be left out where the node has only one
    pub service: Option<String>,
}

#[derive(Args)]
pub struct Peer {
    #[command(flatten)]
    pub service: Service,
    /// Only the link to this node
    #[arg(long)]
    pub peer: Option<String>,
}

#[derive(Args)]
pub struct Status {
    /// One JSON object
    #[arg(long)]
    pub json: bool,
    /// Show it anew every second until interrupted; with --json one object per line
    #[arg(long)]
    pub watch: bool,
    /// Milliseconds between two screens
    #[arg(long, value_name = "MS", default_value_t = 1000, requires = "watch", value_parser = clap::value_parser!(u32).range(100..=60_000))]
    pub interval: u32,
    /// Exit with 5 unless every service is healthy
    #[arg(long, conflicts_with = "watch")]
    pub check: bool,
}

#[derive(Args)]
pub struct Events {
    /// Go on with new events until interrupted
    #[arg(long, short)]
    pub follow: bool,
    /// One JSON object per line
    #[arg(long)]
    pub json: bool,
    /// Only the last so many
    #[arg(long, short = 'n', value_name = "COUNT")]
    pub last: Option<u32>,
}

#[derive(Args)]
pub struct Detach {
    #[command(flatten)]
    pub service: Service,
    /// Do not ask, also where the primary's application will wait
    #[arg(long)]
    pub yes: bool,
}

#[derive(Subcommand)]
pub enum Volume {
    /// Create this node's copy of a service's volumes, as the configuration describes them
    Create(VolumeCreate),
    /// Take over disks with data on them as this node's copy
    Adopt(VolumeAdopt),
    /// List volumes
    List {
        /// One JSON array
        #[arg(long)]
        json: bool,
    },
    /// Make a volume larger: where the service is primary, on every copy while it is in use; with the service stopped, this node's
    /// copy alone, to be done on every node
    Grow {
        /// Name of the service
        service: String,
        /// Name of the volume
        volume: String,
        /// Bytes, or with a unit as in 20GiB; a device must be large enough already, a file is made longer
        /// [default: all that the device has; to be named while the service runs]
        size: Option<String>,
    },
    /// Stop using the disks of this node's copy of a service, as if they had failed: a primary goes on through another copy that is
    /// connected and in sync, and is refused where there is none
    DetachDisk(Service),
    /// Use the disks of this node's copy again, after they failed or were detached: the copy is brought up to date by another one.
    /// Not on a primary
    AttachDisk(Service),
    /// Start a volume anew on an empty disk, to be filled from the peer (with the replicator stopped)
    ReplaceDisk(VolumeReplace),
    /// Take the metadata off this node's copy of a volume; its data stays (with the replicator stopped)
    Remove(VolumeRemove),
}

#[derive(Args)]
pub struct Sizes {
    /// Room for old blocks during a resync, per volume, as in 2GiB [default: by size]
    #[arg(long, value_name = "SIZE")]
    pub undo_size: Option<String>,
    /// Bytes for one bit of the dirty bitmap, a power of two from 4KiB to 1MiB [default: by size]
    #[arg(long, value_name = "SIZE")]
    pub grain: Option<String>,
    /// Blocks of the activity log [default: 64]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(8..=4096))]
    pub activity_log_blocks: Option<u32>,
}

#[derive(Args)]
pub struct VolumeCreate {
    /// Name of the service
    pub service: String,
    /// Replace metadata that is there: this copy's history and what it knows of its peers are lost
    #[arg(long)]
    pub overwrite_metadata: bool,
    /// Write zeroes over the whole of every volume, whatever is there: copies that were all made like this need no initial copy
    #[arg(long)]
    pub zero: bool,
    /// Do not ask before metadata or data is discarded
    #[arg(long)]
    pub yes: bool,
    #[command(flatten)]
    pub sizes: Sizes,
}

#[derive(Args)]
pub struct VolumeAdopt {
    /// Name of the service
    pub service: String,
    /// With internal metadata: nothing of the data lies behind the configured size
    #[arg(long)]
    pub assume_shrunk: bool,
    #[command(flatten)]
    pub sizes: Sizes,
}

#[derive(Args)]
pub struct VolumeReplace {
    /// Name of the service
    pub service: String,
    /// Name of the volume
    pub volume: String,
    /// The new disk has metadata already: replace it
    #[arg(long)]
    pub overwrite_metadata: bool,
    /// Do it without asking
    #[arg(long)]
    pub yes: bool,
    #[command(flatten)]
    pub sizes: Sizes,
}

#[derive(Args)]
pub struct VolumeRemove {
    /// Name of the service
    pub service: String,
    /// Name of the volume
    pub volume: String,
    /// Do it without asking
    #[arg(long)]
    pub yes: bool,
}

#[derive(Args)]
pub struct Promote {
    #[command(flatten)]
    pub service: Service,
    /// Promote even where acknowledged writes may be lost; shows first what would be
    #[arg(long)]
    pub force: bool,
    /// Do not ask before a force
    #[arg(long, requires = "force")]
    pub yes: bool,
}

#[derive(Args)]
pub struct Discard {
    #[command(flatten)]
    pub service: Service,
    /// Do it without asking
    #[arg(long)]
    pub yes: bool,
}

#[derive(Args)]
pub struct Hold {
    #[command(flatten)]
    pub service: Service,
    /// The application's requests instead of resync and verify
    #[arg(long)]
    pub io: bool,
}

#[derive(Args)]
pub struct Verify {
    #[command(flatten)]
    pub service: Service,
    /// Only this volume
    #[arg(long)]
    pub volume: Option<String>,
    /// Stay until it is finished; exit code 5 if the copies differ
    #[arg(long, conflicts_with = "stop")]
    pub wait: bool,
    /// End the one that runs
    #[arg(long)]
    pub stop: bool,
}

#[derive(Args)]
pub struct Resync {
    #[command(flatten)]
    pub service: Service,
    /// Stay until every copy has everything
    #[arg(long)]
    pub wait: bool,
}

#[derive(Subcommand)]
pub enum SplitBrain {
    /// What each side has that the other lacks
    Show(Service),
    /// Give up this node's writes since the two parted, and take the peer's
    Resolve {
        #[command(flatten)]
        service: Service,
        /// Whose writes survive; to keep this node's, run the same on the other node with `theirs`
        #[arg(long, value_enum)]
        keep: Keep,
        /// Do it without asking
        #[arg(long)]
        yes: bool,
    },
    /// List what this node's copy wrote alone and gave up, as it was saved before it was overwritten
    Saved {
        /// Name of the service in the configuration
        service: String,
    },
    /// Remove a save, once what is wanted of it was exported
    RemoveSaved {
        /// Name of the service in the configuration
        service: String,
        /// Name of the save, as `split-brain saved` lists it
        #[arg(long, value_name = "NAME")]
        save: String,
        /// Do it without asking
        #[arg(long)]
        yes: bool,
    },
    /// Write saved blocks into a file or device, each at its own offset in the volume
    Export {
        /// Name of the service in the configuration
        service: String,
        /// Name of its volume
        volume: String,
        /// Name of the save, as `split-brain saved` lists it
        #[arg(long, value_name = "NAME")]
        save: String,
        /// Where to: best a copy of the volume as it was then; a file that is not there is made, sparse
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Keep {
    /// The peer's; this node's are discarded
    Theirs,
    /// This node's; the peer still has to agree to discard its own
    Mine,
}

#[derive(Args)]
pub struct ExplainHandshake {
    /// Name of the service
    pub service: String,
    /// Name of the peer's node
    pub peer: String,
}

#[derive(Args)]
pub struct DumpMetadata {
    /// Only this service
    pub service: Option<String>,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
pub struct Demo {
    /// One JSON object as the last line; the story goes to standard error
    #[arg(long)]
    pub json: bool,
    /// Leave the two nodes running and say how to look at them
    #[arg(long)]
    pub keep: bool,
}

#[derive(Args)]
pub struct Completions {
    /// For which shell; where the script belongs is in that shell's manual
    pub shell: clap_complete::Shell,
}

#[derive(Args)]
pub struct Man {
    /// Write one page per verb into this directory
    #[arg(long, value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definitions_fit_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_place_may_stand_before_or_behind_the_verb() {
        for arguments in [
            ["holdfast", "--socket", "/s", "status"],
            ["holdfast", "status", "--socket", "/s"],
        ] {
            let cli = Cli::try_parse_from(arguments)
                .ok()
                .and_then(|cli| cli.place.socket);
            assert_eq!(cli, Some(PathBuf::from("/s")), "{arguments:?}");
        }
    }

    #[test]
    fn consent_without_force_makes_no_sense() {
        assert!(Cli::try_parse_from(["holdfast", "promote", "db", "--yes"]).is_err());
        assert!(Cli::try_parse_from(["holdfast", "promote", "db", "--force", "--yes"]).is_ok());
    }
}
