//! A loop device over a file, gone when dropped.

use std::path::{Path, PathBuf};
use std::process::Command;

pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// Attaches `file` with direct I/O; none, with the reason on standard error, where that is not possible.
    pub fn over(file: &Path) -> Option<LoopDevice> {
        let made = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on"])
            .arg(file)
            .output();
        match made {
            Ok(output) if output.status.success() => Some(LoopDevice {
                path: String::from_utf8_lossy(&output.stdout).trim().into(),
            }),
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr);
                eprintln!("skipped: no loop device here: {}", why.trim());
                None
            }
            Err(error) => {
                eprintln!("skipped: no losetup here ({error})");
                None
            }
        }
    }

    /// `/dev/loopN`
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves it to the kernel to detach the device once nobody has it open; somebody must have now.
    #[must_use]
    pub fn detach_when_unused(self) -> PathBuf {
        let path = self.path.clone();
        // Detaching a device in use is no more than a mark on it.
        drop(self);
        path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // A device still open is detached by the kernel when it is closed.
        let _ = Command::new("losetup").arg("-d").arg(&self.path).output();
    }
}
