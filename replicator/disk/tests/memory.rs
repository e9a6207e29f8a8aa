//! In a process of its own, since it locks all of it.

#[test]
fn memory_is_locked_or_the_refusal_says_what_to_do() {
    let warnings = holdfast_disk::lock_process_memory();
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let locked = status
        .lines()
        .find_map(|line| line.strip_prefix("VmLck:"))
        .expect("VmLck");
    let refused = warnings
        .iter()
        .any(|warning| warning.what.contains("locking the memory"));
    assert_eq!(refused, locked.trim() == "0 kB", "{warnings:?} {locked}");
    for warning in warnings {
        assert!(warning.to_string().contains("systemd unit"), "{warning}");
    }
}
