//! Every state in which a power cut may leave a copy's files, opened by what opens them at a start.
//!
//! Whole replicators run on real files. A recording below them has every write, zeroing and flush in order, and what the
//! application was promised. From it each image that the disk's contract permits is rebuilt, and checked
//! (`docs/testing.md` says how many, and what is looked at).

mod check;
mod client;
mod disk;
#[cfg(feature = "planted-defects")]
mod planted;
mod recover;
#[allow(dead_code)] // shared with `nodes`, which uses the rest
#[path = "../nodes/support.rs"]
mod support;
mod workloads;

macro_rules! workloads {
    ($($name:ident: $workload:ident;)*) => {
        #[cfg(feature = "planted-defects")]
        const WORKLOADS: &[&str] = &[$(stringify!($workload)),*];

        /// Records that workload and looks at its images.
        #[cfg(feature = "planted-defects")]
        async fn run(workload: &str) -> workloads::Verdict {
            match workload {
                $(stringify!($workload) => workloads::$workload().await,)*
                other => panic!("no workload {other}"),
            }
        }

        $(#[cfg(not(feature = "planted-defects"))]
        #[tokio::test]
        async fn $name() {
            workloads::$workload().await.unwrap_or_else(|wrong| panic!("{wrong}"));
        })*
    };
}

workloads! {
    metadata_is_made_over_a_used_device: create_over_something_else;
    a_device_with_data_is_adopted: adopt;
    copies_are_attached_promoted_written_and_stopped: attach_write_stop;
    the_other_copy_is_lost_and_returns: lost_and_back;
    a_resync_leads_back_until_it_is_complete: resync;
    a_rollback_that_is_cut_is_done_again: rollback;
    a_volume_grows_offline: grow;
}
